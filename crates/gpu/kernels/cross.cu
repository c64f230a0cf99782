// Cross-attention over the proxy heads of a position with queries and read-outs folded into the projections.
//
// A position has P tokens of DEPTH numbers. Row r of `logit` and of `reading`, R = HEADS x outputs of them, attention head
// first, makes of each token a logit and a reading; the score of an output is the sum over attention heads of the
// softmax-weighted readings. Nothing of size P x R leaves the registers of `cross_forward`.
//
// Compiled with DEPTH (a multiple of 16, at most 64), WARPS (positions of a block of the forward), TILES (of 16 tokens that
// a warp of `cross_tokens` holds), and FULL for f32 tokens, whose products are TF32; otherwise with BF16 (1 for bf16, 0 for
// f16).

#if FULL
typedef float token_t;
constexpr int STEP = 8;          // depth of a product
constexpr int PITCH = DEPTH + 4; // of a token in shared memory: eight rows' pieces lie in different banks
#else
typedef half_t token_t;
constexpr int STEP = 16;
constexpr int PITCH = DEPTH + 8;
#endif
constexpr int STEPS = DEPTH / STEP;
constexpr int PER_PIECE = 16 / sizeof(token_t); // numbers in 16 bytes

extern __shared__ __align__(16) token_t tokens_shared[];

#if FULL
__device__ __forceinline__ u32 rounded(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// c[16 x 8] += a[16 x 8] . b[8 x 8]
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rows row0..row0 + 16, columns of a step, of a matrix in shared memory.
__device__ __forceinline__ void load_rows(u32 (&a)[4], const token_t* matrix, int row0, int step) {
  const int lane = threadIdx.x % 32;
  const float* from = matrix + (row0 + lane / 4) * PITCH + step * STEP + lane % 4;
  a[0] = rounded(from[0]);
  a[1] = rounded(from[8 * PITCH]);
  a[2] = rounded(from[4]);
  a[3] = rounded(from[8 * PITCH + 4]);
}

// The rows `first`..`first + 8` of a weight, of which `left` exist, as the right side of a product.
__device__ __forceinline__ void load_weight(u32 (&b)[STEPS][2], const token_t* weight, int first, int left) {
  const int lane = threadIdx.x % 32, row = lane / 4;
  const float* from = weight + (long long)(first + row) * DEPTH + lane % 4;
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    b[s][0] = row < left ? rounded(from[s * STEP]) : 0u;
    b[s][1] = row < left ? rounded(from[s * STEP + 4]) : 0u;
  }
}

// The numbers of a piece of 16 bytes, and back.
__device__ __forceinline__ void unpack(float (&x)[4], const uint4& piece) {
  x[0] = __uint_as_float(piece.x), x[1] = __uint_as_float(piece.y);
  x[2] = __uint_as_float(piece.z), x[3] = __uint_as_float(piece.w);
}

__device__ __forceinline__ uint4 pack(const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}
#else
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { multiply(c, a, b[0], b[1]); }

// Rows row0..row0 + 16, columns of a step, of a matrix in shared memory.
__device__ __forceinline__ void load_rows(u32 (&a)[4], const token_t* matrix, int row0, int step) {
  const int lane = threadIdx.x % 32;
  load4<false>(a, matrix + (row0 + lane % 16) * PITCH + step * STEP + (lane / 16) * 8);
}

// The rows `first`..`first + 8` of a weight, of which `left` exist, as the right side of a product.
__device__ __forceinline__ void load_weight(u32 (&b)[STEPS][2], const token_t* weight, int first, int left) {
  const int lane = threadIdx.x % 32, row = lane / 4;
  const token_t* from = weight + (long long)(first + row) * DEPTH + (lane % 4) * 2;
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    b[s][0] = row < left ? *(const u32*)(from + s * STEP) : 0u;
    b[s][1] = row < left ? *(const u32*)(from + s * STEP + 8) : 0u;
  }
}
#endif

// scores[b][t][o] = sum over attention heads of sum over p of softmax_p(logits) x readings.
//
// tokens: [b, P, T, DEPTH] contiguous; logit, reading: [heads x outputs, DEPTH]
// sums, lse2: [b, T, heads x outputs], the softmax-weighted readings and the log2 of the softmax's sum; null if not wanted
// grid: blocks of WARPS positions, batch; a warp per position
extern "C" __global__ void __launch_bounds__(32 * WARPS)
cross_forward(const token_t* tokens, const token_t* logit, const token_t* reading, float* scores, float* sums, float* lse2, int P,
              int T, int heads, int outputs) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int t0 = blockIdx.x * WARPS, tiles = (P + 15) / 16, rows = tiles * 16;
  // [position][token][PITCH]: a token of neighbouring positions lies side by side in memory.
  constexpr int PIECES = DEPTH / PER_PIECE;
  const token_t* from = tokens + (long long)blockIdx.y * P * T * DEPTH;
  for (int i = threadIdx.x; i < rows * WARPS * PIECES; i += 32 * WARPS) {
    const int piece = i % PIECES, w = i / PIECES % WARPS, p = i / PIECES / WARPS;
    const bool there = p < P && t0 + w < T;
    const uint4 x = there ? *(const uint4*)(from + ((long long)p * T + t0 + w) * DEPTH + piece * PER_PIECE) : make_uint4(0, 0, 0, 0);
    *(uint4*)(tokens_shared + ((w * rows) + p) * PITCH + piece * PER_PIECE) = x;
  }
  __syncthreads();
  const int t = t0 + warp;
  if (t >= T) return;
  const token_t* mine = tokens_shared + warp * rows * PITCH;
  const long long at = (long long)blockIdx.y * T + t;

  for (int o0 = 0; o0 < outputs; o0 += 8) {
    const int left = outputs - o0;
    float score[2] = {0.f, 0.f};
    for (int n = 0; n < heads; n++) {
      const int r0 = n * outputs + o0;
      u32 to_logit[STEPS][2], to_reading[STEPS][2];
      load_weight(to_logit, logit, r0, left);
      load_weight(to_reading, reading, r0, left);
      // Of the two columns that a thread holds, over the rows that it holds.
      float top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f}, read[2] = {0.f, 0.f};
      for (int tile = 0; tile < tiles; tile++) {
        float l[4] = {0.f, 0.f, 0.f, 0.f}, v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          u32 a[4];
          load_rows(a, mine, tile * 16, s);
          multiply(l, a, to_logit[s]);
          multiply(v, a, to_reading[s]);
        }
        const int p = tile * 16 + lane / 4;
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float x = p < P ? l[c] * LOG2E : LOWEST, y = p + 8 < P ? l[2 + c] * LOG2E : LOWEST;
          const float now = fmaxf(top[c], fmaxf(x, y));
          const float keep = exp2_fast(top[c] - now), e = exp2_fast(x - now), f = exp2_fast(y - now);
          sum[c] = fmaf(sum[c], keep, e + f);
          read[c] = fmaf(read[c], keep, fmaf(e, v[c], f * v[2 + c]));
          top[c] = now;
        }
      }
      // Over the eight threads that share the columns. A thread without any row has LOWEST, whose share is none.
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float all = top[c];
#pragma unroll
        for (int x = 4; x < 32; x *= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, x));
        const float keep = exp2_fast(top[c] - all);
        float total = sum[c] * keep, weighted = read[c] * keep;
#pragma unroll
        for (int x = 4; x < 32; x *= 2) {
          total += __shfl_xor_sync(~0u, total, x);
          weighted += __shfl_xor_sync(~0u, weighted, x);
        }
        const float s = weighted / total;
        score[c] += s;
        const int o = lane * 2 + c;
        if (sums && lane < 4 && o < left) {
          const long long place = at * heads * outputs + r0 + o;
          sums[place] = s;
          lse2[place] = all + log2f(total);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int o = lane * 2 + c;
      if (lane < 4 && o < left) scores[at * outputs + o0 + o] = score[c];
    }
  }
}

// The backward. With w the softmax weight, s the weighted sum and g the gradient of the output, of a token's reading v the
// gradient is dv = w g, of its logit dl = w g (v - s): both are made again in registers, where they are wanted.
// sums, lse2 and g: [b, T, R], g repeated for every attention head.
#if !FULL
// Row r of a [.., DEPTH] matrix, and the row eight below, as the left side of products; zeros from row `rows` on.
__device__ __forceinline__ void load_left(u32 (&a)[STEPS][4], const token_t* matrix, long long pitch, int r, int rows) {
  const token_t* from = matrix + r * pitch + (threadIdx.x % 4) * 2;
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    a[s][0] = r < rows ? *(const u32*)(from + s * STEP) : 0u;
    a[s][1] = r + 8 < rows ? *(const u32*)(from + 8 * pitch + s * STEP) : 0u;
    a[s][2] = r < rows ? *(const u32*)(from + s * STEP + 8) : 0u;
    a[s][3] = r + 8 < rows ? *(const u32*)(from + 8 * pitch + s * STEP + 8) : 0u;
  }
}

// From a logit and a reading to their gradients, in place.
__device__ __forceinline__ void differentiate(float& l, float& v, float sum, float lse, float g) {
  const float dv = exp2_fast(fmaf(l, LOG2E, -lse)) * g;
  l = dv * (v - sum);
  v = dv;
}

// dtokens = dl . logit + dv . reading, of the tokens of a position: [b, P, T, DEPTH].
//
// logit_t, reading_t: the weights once more, [DEPTH, R]
// grid: warps of a (position, TILES x 16 tokens), four to a block; batch
extern "C" __global__ void __launch_bounds__(128)
cross_tokens(const token_t* tokens, const token_t* logit, const token_t* reading, const token_t* logit_t,
             const token_t* reading_t, const float* sums, const float* lse2, const float* g, token_t* dtokens, int P, int T,
             int R) {
  const int lane = threadIdx.x % 32, quad = (lane % 4) * 2;
  const int groups = (P + 16 * TILES - 1) / (16 * TILES);
  const int id = blockIdx.x * 4 + threadIdx.x / 32, t = id / groups, p0 = id % groups * 16 * TILES + lane / 4;
  if (t >= T) return;
  const long long at = (long long)blockIdx.y * T + t, pitch = (long long)T * DEPTH;
  const long long base = (long long)blockIdx.y * P * pitch + (long long)t * DEPTH;
  u32 a[TILES][STEPS][4];
  float d[TILES][DEPTH / 8][4];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    load_left(a[m], tokens + base, pitch, p0 + 16 * m, P);
#pragma unroll
    for (int n = 0; n < DEPTH / 8; n++) d[m][n][0] = d[m][n][1] = d[m][n][2] = d[m][n][3] = 0.f;
  }
  for (int r0 = 0; r0 < R; r0 += 16) {
    const int left = R - r0; // a multiple of 8
    u32 to_logit[2][STEPS][2], to_reading[2][STEPS][2], of_logit[DEPTH / 8][2], of_reading[DEPTH / 8][2];
    float2 sum[2], lse[2], grad[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      load_weight(to_logit[h], logit, r0 + 8 * h, left - 8 * h);
      load_weight(to_reading[h], reading, r0 + 8 * h, left - 8 * h);
      const long long place = at * R + r0 + 8 * h + quad;
      const bool there = 8 * h < left;
      sum[h] = there ? *(const float2*)(sums + place) : make_float2(0.f, 0.f);
      lse[h] = there ? *(const float2*)(lse2 + place) : make_float2(0.f, 0.f);
      grad[h] = there ? *(const float2*)(g + place) : make_float2(0.f, 0.f);
#pragma unroll
      for (int n = 0; n < DEPTH / 8; n++) {
        const long long column = (long long)(8 * n + lane / 4) * R + r0 + 8 * h + quad;
        of_logit[n][h] = there ? *(const u32*)(logit_t + column) : 0u;
        of_reading[n][h] = there ? *(const u32*)(reading_t + column) : 0u;
      }
    }
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      u32 dl[4], dv[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float l[4] = {0.f, 0.f, 0.f, 0.f}, v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          multiply(l, a[m][s], to_logit[h][s]);
          multiply(v, a[m][s], to_reading[h][s]);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          differentiate(l[i], v[i], sum[h].x, lse[h].x, grad[h].x);
          differentiate(l[i + 1], v[i + 1], sum[h].y, lse[h].y, grad[h].y);
          dl[2 * h + i / 2] = pack(l[i], l[i + 1]);
          dv[2 * h + i / 2] = pack(v[i], v[i + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < DEPTH / 8; n++) {
        multiply(d[m][n], dl, of_logit[n]);
        multiply(d[m][n], dv, of_reading[n]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int n = 0; n < DEPTH / 8; n++) {
      const int p = p0 + 16 * m;
      token_t* to = dtokens + base + p * pitch + 8 * n + quad;
      if (p < P) *(u32*)to = pack(d[m][n][0], d[m][n][1]);
      if (p + 8 < P) *(u32*)(to + 8 * pitch) = pack(d[m][n][2], d[m][n][3]);
    }
}

// dlogit = sum over positions and tokens of dl^T . tokens, dreading likewise with dv: the sums of `per_block` positions of all
// `positions` of the batch, in parts[block][logit, reading][R][DEPTH].
//
// grid: 128 rows of the weights, a warp per 16; blocks of positions
extern "C" __global__ void __launch_bounds__(256)
cross_weights(const token_t* tokens, const token_t* logit, const token_t* reading, const float* sums, const float* lse2,
              const float* g, float* parts, int P, int T, int R, int positions, int per_block) {
  constexpr int PIECES = DEPTH / PER_PIECE;
  const int lane = threadIdx.x % 32, quad = (lane % 4) * 2, rows = (P + 15) / 16 * 16;
  const int r = blockIdx.x * 128 + threadIdx.x / 32 * 16 + lane / 4;
  const int first = blockIdx.y * per_block, end = min(first + per_block, positions);
  const bool there[2] = {r < R, r + 8 < R};
  u32 of_logit[STEPS][4], of_reading[STEPS][4];
  load_left(of_logit, logit, DEPTH, r, R);
  load_left(of_reading, reading, DEPTH, r, R);
  float dlogit[DEPTH / 8][4], dreading[DEPTH / 8][4];
#pragma unroll
  for (int n = 0; n < DEPTH / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) dlogit[n][i] = dreading[n][i] = 0.f;

  auto fetch = [&](int at) {
    const token_t* from = tokens + ((long long)(at / T) * P * T + at % T) * DEPTH;
    token_t* to = tokens_shared + (at - first) % 2 * rows * PITCH;
    for (int i = threadIdx.x; i < rows * PIECES; i += 256) {
      const int p = i / PIECES, piece = i % PIECES;
      const token_t* source = from + (p < P ? (long long)p * T * DEPTH : 0) + piece * PER_PIECE;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(
                       (u32)__cvta_generic_to_shared(to + p * PITCH + piece * PER_PIECE)),
                   "l"(source), "r"(p < P ? 16 : 0)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (first < end) fetch(first);
  for (int at = first; at < end; at++) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads(); // this position is here, and nobody reads the one before any more
    if (at + 1 < end) fetch(at + 1);
    const token_t* mine = tokens_shared + (at - first) % 2 * rows * PITCH;
    float sum[2], lse[2], grad[2];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const long long place = (long long)at * R + r + 8 * j;
      sum[j] = there[j] ? sums[place] : 0.f;
      lse[j] = there[j] ? lse2[place] : 0.f;
      grad[j] = there[j] ? g[place] : 0.f;
    }
    for (int p0 = 0; p0 < rows; p0 += 16) {
      u32 b[STEPS][4], turned[DEPTH / 16][4];
#pragma unroll
      for (int s = 0; s < STEPS; s++)
        load4<false>(b[s], mine + (p0 + lane / 16 * 8 + lane % 8) * PITCH + s * STEP + lane / 8 % 2 * 8);
#pragma unroll
      for (int n = 0; n < DEPTH / 16; n++)
        load4<true>(turned[n], mine + (p0 + lane % 16) * PITCH + n * 16 + lane / 16 * 8);
      u32 dl[4], dv[4];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float l[4] = {0.f, 0.f, 0.f, 0.f}, v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
          const u32 right[2] = {b[s][2 * h], b[s][2 * h + 1]};
          multiply(l, of_logit[s], right);
          multiply(v, of_reading[s], right);
        }
        const int p = p0 + 8 * h + quad;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          differentiate(l[i], v[i], sum[i / 2], lse[i / 2], grad[i / 2]);
          if (p + i % 2 >= P) l[i] = v[i] = 0.f;
        }
        dl[2 * h] = pack(l[0], l[1]), dl[2 * h + 1] = pack(l[2], l[3]);
        dv[2 * h] = pack(v[0], v[1]), dv[2 * h + 1] = pack(v[2], v[3]);
      }
#pragma unroll
      for (int n = 0; n < DEPTH / 8; n++) {
        const u32 right[2] = {turned[n / 2][n % 2 * 2], turned[n / 2][n % 2 * 2 + 1]};
        multiply(dlogit[n], dl, right);
        multiply(dreading[n], dv, right);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < DEPTH / 8; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      if (!there[j]) continue;
      float* to = parts + ((long long)blockIdx.y * 2 * R + r + 8 * j) * DEPTH + 8 * n + quad;
      *(float2*)to = make_float2(dlogit[n][2 * j], dlogit[n][2 * j + 1]);
      *(float2*)(to + (long long)R * DEPTH) = make_float2(dreading[n][2 * j], dreading[n][2 * j + 1]);
    }
}
#endif

#if FULL
// In place: logits become the gradient of the logits, readings that of the readings; libtorch makes the products around it.
//
// logits, readings: [b, P, t, R] contiguous, R a multiple of PER_PIECE, of positions from `start` on
// grid: 16-byte pieces of [t, R], batch
extern "C" __global__ void cross_gradients(uint4* logits, uint4* readings, const float* sums, const float* lse2,
                                          const float* g, int P, int t, int T, int start, int R) {
  const int pieces = R / PER_PIECE;
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long long)t * pieces) return;
  const int position = i / pieces, r0 = (i % pieces) * PER_PIECE;
  const long long at = (long long)blockIdx.y * T + start + position;
  float sum[PER_PIECE], lse[PER_PIECE], grad[PER_PIECE];
#pragma unroll
  for (int j = 0; j < PER_PIECE; j++) {
    sum[j] = sums[at * R + r0 + j];
    lse[j] = lse2[at * R + r0 + j];
    grad[j] = g[at * R + r0 + j];
  }
  const long long stride = (long long)t * pieces;
  long long place = (long long)blockIdx.y * P * stride + i;
  for (int p = 0; p < P; p++, place += stride) {
    float l[PER_PIECE], v[PER_PIECE];
    unpack(l, logits[place]);
    unpack(v, readings[place]);
#pragma unroll
    for (int j = 0; j < PER_PIECE; j++) {
      const float dv = exp2_fast(fmaf(l[j], LOG2E, -lse[j])) * grad[j];
      l[j] = dv * (v[j] - sum[j]);
      v[j] = dv;
    }
    logits[place] = pack(l);
    readings[place] = pack(v);
  }
}
#endif
