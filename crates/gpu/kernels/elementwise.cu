// What lies between a decoder layer's matrix products, the likelihood behind them, and the lengths and moves of keys and values,
// each in one pass over its bytes.
//
// Compiled with HEAD_DIM (a multiple of 8) and BF16 (1 for bf16, 0 for f16). Arithmetic is f32, rounded once.

// out[row][i] = silu(gate_up[row][i]) * gate_up[row][width + i]; width is a multiple of 8. One thread per 8 numbers.
extern "C" __global__ void gated_silu(const uint4* gate_up, uint4* out, long long pieces, int row_pieces) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= pieces) return;
  const long long row = at / row_pieces;
  const uint4 gate = gate_up[at + row * row_pieces], up = gate_up[at + (row + 1) * row_pieces];
  auto gated = [](u32 g, u32 u) {
    const float2 x = unpack(g), y = unpack(u);
    return pack(x.x / (1.f + __expf(-x.x)) * y.x, x.y / (1.f + __expf(-x.y)) * y.y);
  };
  out[at] = make_uint4(gated(gate.x, up.x), gated(gate.y, up.y), gated(gate.z, up.z), gated(gate.w, up.w));
}

// Rotary embedding of new queries and keys, after their RMS norm if the model has one, and the new keys' and values' way
// into the cache.
//
// qkv[row][query heads, kv heads, kv heads][HEAD_DIM]: queries, and keys if there is no cache, are changed in place. cos and
// sin: f32 [row][HEAD_DIM / 2]. norm: [query heads + kv heads][HEAD_DIM] or null. keys, values: null, or where new rows go. If
// `slots` is null: position 0 of them in [kv heads, capacity, HEAD_DIM], heads `cache_head` apart. Otherwise a packed matrix
// [..][HEAD_DIM]; rows are `tokens` of one sequence after the other, and slots[sequence, kv head, token] name their places.
// One warp per row and head: grid ceil(rows * heads / 8), 256 threads.
extern "C" __global__ void rotate(half_t* qkv, const half_t* norm, const float* cos, const float* sin, half_t* keys,
                                  half_t* values, int rows, int query_heads, int kv_heads, long long cache_head, float eps,
                                  const long long* slots, int tokens) {
  constexpr int HALF = HEAD_DIM / 2, PAIRS = HALF / 2, TURNS = (PAIRS + 31) / 32;
  let_next_begin(); // the decoding attention
  const int heads = query_heads + 2 * kv_heads, lane = threadIdx.x % 32;
  const long long warp = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= (long long)rows * heads) return;
  const int row = warp / heads, head = warp % heads;
  half_t* from = qkv + warp * HEAD_DIM;
  auto place = [&](half_t* cache, int kv_head) {
    const long long dense = kv_head * cache_head + (long long)row * HEAD_DIM;
    if (!slots) return cache + dense;
    return cache + slots[((long long)(row / tokens) * kv_heads + kv_head) * tokens + row % tokens] * HEAD_DIM;
  };
  if (head >= query_heads + kv_heads) {
    if (!values) return;
    half_t* to = place(values, head - query_heads - kv_heads);
    for (int i = lane; i < HALF; i += 32) ((u32*)to)[i] = ((const u32*)from)[i];
    return;
  }
  float2 low[TURNS], high[TURNS];
  float squares = 0.f;
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int pair = lane + 32 * turn;
    low[turn] = high[turn] = make_float2(0.f, 0.f);
    if (pair < PAIRS) {
      low[turn] = unpack(((const u32*)from)[pair]);
      high[turn] = unpack(((const u32*)(from + HALF))[pair]);
    }
    squares += low[turn].x * low[turn].x + low[turn].y * low[turn].y + high[turn].x * high[turn].x + high[turn].y * high[turn].y;
  }
  if (norm) {
    for (int apart = 16; apart; apart /= 2) squares += __shfl_xor_sync(~0u, squares, apart);
    const float scale = rsqrtf(squares / HEAD_DIM + eps);
    const half_t* weight = norm + head * HEAD_DIM;
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      const int pair = lane + 32 * turn;
      if (pair >= PAIRS) continue;
      const float2 a = unpack(((const u32*)weight)[pair]), b = unpack(((const u32*)(weight + HALF))[pair]);
      low[turn] = make_float2(low[turn].x * scale * a.x, low[turn].y * scale * a.y);
      high[turn] = make_float2(high[turn].x * scale * b.x, high[turn].y * scale * b.y);
    }
  }
  half_t* to = head >= query_heads && keys ? place(keys, head - query_heads) : from;
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int pair = lane + 32 * turn;
    if (pair >= PAIRS) continue;
    const float2 c = ((const float2*)(cos + (long long)row * HALF))[pair], s = ((const float2*)(sin + (long long)row * HALF))[pair];
    const float2 l = low[turn], h = high[turn];
    ((u32*)to)[pair] = pack(l.x * c.x - h.x * s.x, l.y * c.y - h.y * s.y);
    ((u32*)(to + HALF))[pair] = pack(h.x * c.x + l.x * s.x, h.y * c.y + l.y * s.y);
  }
}

// out[head][row] = vectors[head][row], each pair of dimensions (i, i + HEAD_DIM / 2) turned by its angle, the same for all rows.
//
// cos, sin: f32 [HEAD_DIM / 2]. Rows of a head are contiguous; heads are vectors_head and out_head apart. A thread turns two pairs:
// grid ceil(rows * HEAD_DIM / 4 / blockDim), heads.
extern "C" __global__ void turn(const half_t* vectors, half_t* out, const float* cos, const float* sin, int rows,
                                long long vectors_head, long long out_head) {
  constexpr int TWOS = HEAD_DIM / 4;
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x, row = at / TWOS;
  const int two = at % TWOS;
  if (row >= rows) return;
  const u32* from = (const u32*)(vectors + blockIdx.y * vectors_head + row * HEAD_DIM);
  u32* to = (u32*)(out + blockIdx.y * out_head + row * HEAD_DIM);
  const float2 low = unpack(from[two]), high = unpack(from[TWOS + two]);
  const float2 c = ((const float2*)cos)[two], s = ((const float2*)sin)[two];
  to[two] = pack(low.x * c.x - high.x * s.x, low.y * c.y - high.y * s.y);
  to[TWOS + two] = pack(high.x * c.x + low.x * s.x, high.y * c.y + low.y * s.y);
}

// The attention output of rows whose keys were seen in two parts, by the parts' outputs and log-sum-exps: into `a`.
//
// a, b: [row][head][HEAD_DIM], rows and heads of b b_row and b_head apart; a_lse, b_lse: natural logs, [head][row], heads
// of a_lse a_lse_head apart; b_lse may be laid out [row][head] by its strides. One warp per row and head.
extern "C" __global__ void merge(half_t* a, const half_t* b, float* a_lse, const float* b_lse, int rows, int heads,
                                 long long a_row, long long a_head, long long b_row, long long b_head, long long a_lse_head,
                                 long long b_lse_row, long long b_lse_head) {
  const int lane = threadIdx.x % 32;
  const long long warp = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (warp >= (long long)rows * heads) return;
  const int row = warp / heads, head = warp % heads;
  const long long lse_at = head * a_lse_head + row;
  const float x = a_lse[lse_at], y = b_lse[row * b_lse_row + head * b_lse_head];
  const float peak = fmaxf(x, y), ex = __expf(x - peak), ey = __expf(y - peak);
  const float of_b = ey / (ex + ey);
  u32* to = (u32*)(a + row * a_row + head * a_head);
  const u32* from = (const u32*)(b + row * b_row + head * b_head);
  for (int i = lane; i < HEAD_DIM / 2; i += 32) {
    const float2 p = unpack(to[i]), q = unpack(from[i]);
    to[i] = pack(p.x + (q.x - p.x) * of_b, p.y + (q.y - p.y) * of_b);
  }
  if (lane == 0) a_lse[lse_at] = peak + __logf(ex + ey);
}

// Eight threads read a row together, each every eighth piece of 8 numbers, so that a block of 256 threads reads 32 rows at once.
constexpr int PIECES = HEAD_DIM / 8, PIECE_TURNS = (PIECES + 7) / 8;

struct Eight { float x[8]; };

__device__ __forceinline__ Eight eight(uint4 v) {
  const float2 a = unpack(v.x), b = unpack(v.y), c = unpack(v.z), d = unpack(v.w);
  return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}

__device__ __forceinline__ float sum_of_eight_threads(float x) {
  for (int apart = 4; apart; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}

// out[head][row] = log of the length of vectors[head][row][HEAD_DIM], which counts as `floor` if shorter. Rows of a head are
// contiguous, heads apart as told: grid ceil(rows / 32), heads; 256 threads.
extern "C" __global__ void log_norms(const half_t* vectors, float* out, int rows, long long head, long long out_head, float floor) {
  const int row = blockIdx.x * 32 + threadIdx.x / 8, lane = threadIdx.x % 8;
  float squares = 0.f;
  if (row < rows) {
    const uint4* from = (const uint4*)(vectors + blockIdx.y * head + (long long)row * HEAD_DIM);
    for (int i = lane; i < PIECES; i += 8) {
      const Eight of = eight(from[i]);
      for (float x : of.x) squares = fmaf(x, x, squares);
    }
  }
  squares = sum_of_eight_threads(squares);
  if (row < rows && lane == 0) out[blockIdx.y * out_head + row] = logf(fmaxf(sqrtf(squares), floor));
}

// inverse[head][row] = one over the length of vectors[head][row][HEAD_DIM], which counts as `shortest` if shorter;
// sums[head][block][HEAD_DIM] = the sum over a block's rows of vector times inverse. Rows lie as in log_norms.
// Grid ceil(rows / block_rows), heads; 256 threads.
extern "C" __global__ void __launch_bounds__(256) unit_sums(const half_t* vectors, float* inverse, float* sums, int rows,
                                                            int block_rows, long long head, float shortest) {
  const int lane = threadIdx.x % 8, group = threadIdx.x / 8;
  const int first = blockIdx.x * block_rows, end = min(rows, first + block_rows);
  float sum[PIECE_TURNS][8] = {};
  // All threads of a warp take every turn: they add up rows together.
  for (int at = first; at < end; at += 32) {
    const int row = at + group;
    Eight of[PIECE_TURNS] = {};
    float squares = 0.f;
#pragma unroll
    for (int turn = 0; turn < PIECE_TURNS; turn++) {
      const int i = lane + 8 * turn;
      if (row < end && i < PIECES) {
        of[turn] = eight(((const uint4*)(vectors + blockIdx.y * head + (long long)row * HEAD_DIM))[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; j++) squares = fmaf(of[turn].x[j], of[turn].x[j], squares);
    }
    const float scale = 1.f / fmaxf(sqrtf(sum_of_eight_threads(squares)), shortest);
    if (row < end && lane == 0) inverse[(long long)blockIdx.y * rows + row] = scale;
#pragma unroll
    for (int turn = 0; turn < PIECE_TURNS; turn++)
#pragma unroll
      for (int j = 0; j < 8; j++) sum[turn][j] = fmaf(of[turn].x[j], scale, sum[turn][j]);
  }
  // The four rows of a warp, then the eight warps.
  __shared__ float warps[8][HEAD_DIM];
#pragma unroll
  for (int turn = 0; turn < PIECE_TURNS; turn++)
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x = sum[turn][j];
      x += __shfl_xor_sync(~0u, x, 8);
      x += __shfl_xor_sync(~0u, x, 16);
      const int i = lane + 8 * turn;
      if (threadIdx.x % 32 < 8 && i < PIECES) warps[threadIdx.x / 32][8 * i + j] = x;
    }
  __syncthreads();
  for (int d = threadIdx.x; d < HEAD_DIM; d += 256) {
    float x = 0.f;
    for (int w = 0; w < 8; w++) x += warps[w][d];
    sums[((long long)blockIdx.y * gridDim.x + blockIdx.x) * HEAD_DIM + d] = x;
  }
}

// out[head][row] = inverse[head][row] times the product of vectors[head][row] and direction[head]. Rows, grid and threads as in
// log_norms.
extern "C" __global__ void cosines(const half_t* vectors, const float* inverse, const float* direction, float* out, int rows,
                                   long long head) {
  const int row = blockIdx.x * 32 + threadIdx.x / 8, lane = threadIdx.x % 8;
  float product = 0.f;
  if (row < rows) {
    const uint4* from = (const uint4*)(vectors + blockIdx.y * head + (long long)row * HEAD_DIM);
    const float4* along = (const float4*)(direction + blockIdx.y * HEAD_DIM);
    for (int i = lane; i < PIECES; i += 8) {
      const Eight of = eight(from[i]);
      const float4 a = along[2 * i], b = along[2 * i + 1];
      const float to[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      for (int j = 0; j < 8; j++) product = fmaf(of.x[j], to[j], product);
    }
  }
  product = sum_of_eight_threads(product);
  const long long at = (long long)blockIdx.y * rows + row;
  if (row < rows && lane == 0) out[at] = product * inverse[at];
}

// nats[row] = log of the sum of exp(logits[row]) - logits[row][next[row]]. A row has 8 * `pieces` logits; a block of 256 threads
// reads it once.
extern "C" __global__ void __launch_bounds__(256) row_nats(const uint4* logits, const long long* next, float* nats, int pieces) {
  const uint4* mine = logits + (long long)blockIdx.x * pieces;
  float top = -1e30f, sum = 0.f;
  auto merge = [&](float other, float others) {
    const float peak = fmaxf(top, other);
    sum = sum * __expf(top - peak) + others * __expf(other - peak);
    top = peak;
  };
  for (int i = threadIdx.x; i < pieces; i += 256) {
    const uint4 x = mine[i];
    const float2 a = unpack(x.x), b = unpack(x.y), c = unpack(x.z), d = unpack(x.w);
    const float peak = fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(b.x, b.y)), fmaxf(fmaxf(c.x, c.y), fmaxf(d.x, d.y)));
    const float now = fmaxf(top, peak);
    float add = __expf(a.x - now) + __expf(a.y - now) + __expf(b.x - now) + __expf(b.y - now);
    add += __expf(c.x - now) + __expf(c.y - now) + __expf(d.x - now) + __expf(d.y - now);
    sum = sum * __expf(top - now) + add;
    top = now;
  }
  __shared__ float tops[8], sums[8];
  for (int apart = 16; apart; apart /= 2) merge(__shfl_xor_sync(~0u, top, apart), __shfl_xor_sync(~0u, sum, apart));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top, sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < 8; w++) merge(tops[w], sums[w]);
  const long long at = next[blockIdx.x];
  const float2 two = unpack(((const u32*)mine)[at / 2]);
  nats[blockIdx.x] = top + logf(sum) - (at % 2 ? two.y : two.x);
}
