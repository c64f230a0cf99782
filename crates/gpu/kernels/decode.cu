// Attention of one new token per sequence over KV heads of different lengths, read once from memory.
//
// A segment is one KV head of one sequence: `lengths[x]` rows of `keys` and `values` from row `starts[x]` on, read by the
// `group` query heads that share it. All segments' rows together are cut into units of 16, and every block gets as many
// units as the others, wherever segments end: however different lengths are, all blocks end together. Of a block's units
// each warp takes every WARPSth. A segment of several blocks is merged by the one that comes last.
//
// The query heads of a group are the 16 rows of a matrix product (8 of them empty where the group is not WIDE), so that
// arithmetic stays far below the memory's time for every group.
//
// Compiled with HEAD_DIM (a multiple of 16), BF16 (1 for bf16, 0 for f16), WARPS (of a block), STAGES (units in shared
// memory per warp), WIDE (groups of more than 8).

constexpr int THREADS = 32 * WARPS;
constexpr int KEYS = 16;              // of a unit
constexpr int PITCH = HEAD_DIM + 8;   // of a row in shared memory: eight rows' pieces lie in different banks
constexpr int TILE = KEYS * PITCH;    // keys or values of a unit
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes in a row
constexpr int STEPS = HEAD_DIM / 16;  // products along a row
constexpr int SEGMENTS = 1024;        // at most

extern __shared__ __align__(16) unsigned char memory[];

// What other blocks wrote: past this multiprocessor's own cache.
__device__ __forceinline__ float4 fresh(const float4* p) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
  return x;
}

__device__ __forceinline__ float2 fresh(const float2* p) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p) : "memory");
  return x;
}

// Begin to copy a unit's keys and values; rows from `length` on become zeros.
__device__ __forceinline__ void fetch(half_t* stage, const half_t* keys, const half_t* values, int key, int length) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < KEYS * PIECES / 32; i++) {
    const int row = (lane + 32 * i) / PIECES, piece = (lane + 32 * i) % PIECES;
    const bool there = key + row < length;
    const long long at = (long long)(there ? key + row : 0) * HEAD_DIM + piece * 8;
    half_t* to = stage + row * PITCH + piece * 8;
    copy16(to, keys + at, there);
    copy16(to + TILE, values + at, there);
  }
}

// A running softmax over keys: rows g and, where WIDE, g + 8 of the products, g = lane / 4.
struct Attended {
  float out[2 * STEPS][4]; // of tile n: columns 8 n + 2 (lane % 4), and the next
  float top[2], sum[2];    // exponents are of two; sums are of this lane's keys only

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < 2 * STEPS; n++)
      for (int i = 0; i < 4; i++) out[n][i] = 0.f;
    top[0] = top[1] = LOWEST;
    sum[0] = sum[1] = 0.f;
  }

  // One unit, of which the first `left` keys exist; at least one does.
  __device__ __forceinline__ void add(const half_t* stage, const u32 (&q)[STEPS][WIDE ? 4 : 2], int left, float scale) {
    const int lane = threadIdx.x % 32;
    float s[2][4] = {};
    const half_t* k_row = stage + (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 k[4];
      load4<false>(k, k_row + step * 16);
#if WIDE
      const u32 a[4] = {q[step][0], q[step][2], q[step][1], q[step][3]};
#else
      const u32 a[4] = {q[step][0], 0u, q[step][1], 0u};
#endif
      multiply(s[0], a, k[0], k[1]);
      multiply(s[1], a, k[2], k[3]);
    }
    u32 p[4] = {};
#pragma unroll
    for (int half = 0; half < (WIDE ? 2 : 1); half++) {
      float x[4] = {s[0][2 * half], s[0][2 * half + 1], s[1][2 * half], s[1][2 * half + 1]};
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = i / 2 * 8 + lane % 4 * 2 + i % 2 < left ? x[i] * scale : LOWEST;
      float peak = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
      if (__any_sync(~0u, peak > top[half])) {
        const float now = fmaxf(top[half], peak), less = exp2_fast(top[half] - now);
        top[half] = now;
        sum[half] *= less;
#pragma unroll
        for (int n = 0; n < 2 * STEPS; n++) out[n][2 * half] *= less, out[n][2 * half + 1] *= less;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = exp2_fast(x[i] - top[half]);
      sum[half] += (x[0] + x[1]) + (x[2] + x[3]);
      p[half] = pack(x[0], x[1]);
      p[half + 2] = pack(x[2], x[3]);
    }
    const half_t* v_row = stage + TILE + lane % 16 * PITCH + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 v[4];
      load4<true>(v, v_row + step * 16);
      multiply(out[2 * step], p, v[0], v[1]);
      multiply(out[2 * step + 1], p, v[2], v[3]);
    }
  }

  // Into a matrix [group][HEAD_DIM] of the warp's own, and tops and sums beside it.
  __device__ __forceinline__ void leave(float* rows, float2* tops, int group) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < (WIDE ? 2 : 1); half++) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      const int row = lane / 4 + 8 * half;
      if (row >= group) continue;
      float* to = rows + row * HEAD_DIM + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2 * STEPS; n++) *(float2*)(to + 8 * n) = make_float2(out[n][2 * half], out[n][2 * half + 1]);
      if (lane % 4 == 0) tops[row] = make_float2(top[half], sum[half]);
    }
  }
};

__device__ __forceinline__ void add_scaled(float4& sum, const float4& x, float by) {
  sum.x += x.x * by, sum.y += x.y * by, sum.z += x.z * by, sum.w += x.w * by;
}

__device__ __forceinline__ void put(half_t* out, int at, const float4& x, float by) {
  ((uint2*)out)[at] = make_uint2(pack(x.x * by, x.y * by), pack(x.z * by, x.w * by));
}

// A segment's output, from what `n` blocks left of it: `parts` [n][group][HEAD_DIM], `tops` [n][group]. `weights` is shared
// memory for two floats per block and row. What is read comes from far, so the first parts are asked for before their weights
// are known, and as many at a time as registers hold.
__device__ void merge(const float4* parts, const float2* tops, half_t* out, int n, int group, float* weights) {
  constexpr int QUADS = HEAD_DIM / 4, AHEAD = 16;
  const int lane = threadIdx.x % 32, pieces = group * QUADS;
  float4 early[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i < n && threadIdx.x < pieces) early[i] = fresh(parts + (long long)i * pieces + threadIdx.x);
  float* sums = weights + group * n;
  for (int row = threadIdx.x / 32; row < group; row += WARPS) {
    float top = LOWEST, sum = 0.f;
    for (int i = lane; i < n; i += 32) {
      const float2 x = fresh(tops + i * group + row);
      weights[row * n + i] = x.x;
      sums[row * n + i] = x.y;
      top = fmaxf(top, x.x);
    }
    for (int apart = 16; apart; apart /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
    for (int i = lane; i < n; i += 32) {
      const float weight = exp2_fast(weights[row * n + i] - top);
      weights[row * n + i] = weight;
      sum += weight * sums[row * n + i];
    }
    for (int apart = 16; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    for (int i = lane; i < n; i += 32) weights[row * n + i] *= sum > 0.f ? 1.f / sum : 0.f;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < pieces; at += THREADS) {
    const float* weight = weights + at / QUADS * n;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    int i = 0;
    if (at < THREADS) {
#pragma unroll
      for (; i < AHEAD; i++)
        if (i < n) add_scaled(sum, early[i], weight[i]);
    }
#pragma unroll 16
    for (; i < n; i++) add_scaled(sum, fresh(parts + (long long)i * pieces + at), weight[i]);
    put(out, at, sum, 1.f);
  }
}

// q: [sequences][kv_heads * group][HEAD_DIM], sequences `q_sequence` apart; out: the same, contiguous. starts, lengths:
// [segments], sequence-major; an empty segment's output is zero. parts, tops: [blocks + segments][group][HEAD_DIM] and
// [..][group]. arrived: [segments], zeros, and zeros again afterwards.
// Any number of blocks, THREADS threads, shared memory of SEGMENTS + 4 ints and WARPS * STAGES units.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    decode(const half_t* q, const half_t* keys, const half_t* values, const int* starts, const int* lengths, half_t* out,
           float4* parts, float2* tops, int* arrived, int segments, int kv_heads, int group, long long q_sequence, float scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int* ends = (int*)memory; // units of all segments up to this one
  int* flag = ends + SEGMENTS;
  half_t* rings = (half_t*)(ends + SEGMENTS + 4);
  half_t* ring = rings + warp * STAGES * 2 * TILE;
  wait_for_earlier();
  let_next_begin();

  for (int x = threadIdx.x; x < segments; x += THREADS) ends[x] = max(1, (lengths[x] + KEYS - 1) / KEYS);
  __syncthreads();
  if (warp == 0) {
    int before = 0;
    for (int first = 0; first < segments; first += 32) {
      const int x = first + lane;
      int n = x < segments ? ends[x] : 0;
      for (int apart = 1; apart < 32; apart *= 2) {
        const int other = __shfl_up_sync(~0u, n, apart);
        if (lane >= apart) n += other;
      }
      if (x < segments) ends[x] = before + n;
      before += __shfl_sync(~0u, n, 31);
    }
  }
  __syncthreads();
  const long long units = ends[segments - 1], blocks = min((long long)gridDim.x, units);
  if (blockIdx.x >= blocks) return;
  int unit = blockIdx.x * units / blocks;
  const int stop = (blockIdx.x + 1) * units / blocks;
  int x = 0;
  for (int above = segments - 1; x < above;) {
    const int middle = (x + above) / 2;
    if (ends[middle] > unit) above = middle;
    else x = middle + 1;
  }

  for (; unit < stop; x++) {
    const int first = x ? ends[x - 1] : 0, end = ends[x], length = lengths[x];
    const half_t *my_keys = keys + (long long)starts[x] * HEAD_DIM, *my_values = values + (long long)starts[x] * HEAD_DIM;
    // This warp's units of the segment: none if it is empty.
    const int mine = unit - first + warp, last = min(min(stop, end) - first, (length + KEYS - 1) / KEYS);
    const int n = mine < last ? (last - mine + WARPS - 1) / WARPS : 0;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
      if (i < n) fetch(ring + i * 2 * TILE, my_keys, my_values, (mine + i * WARPS) * KEYS, length);
      copies_commit();
    }
    u32 rows[STEPS][WIDE ? 4 : 2];
    const half_t* my_q = q + x / kv_heads * q_sequence + (long long)(x % kv_heads) * group * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < (WIDE ? 4 : 2); i++) {
      const int row = lane / 4 + i / 2 * 8;
      const half_t* from = my_q + row * HEAD_DIM + lane % 4 * 2 + i % 2 * 8;
#pragma unroll
      for (int step = 0; step < STEPS; step++) rows[step][i] = row < group ? *(const u32*)(from + step * 16) : 0u;
    }
    Attended mean;
    mean.clear();
    for (int i = 0; i < n; i++) {
      copies_wait<STAGES - 2>();
      __syncwarp(); // all lanes' copies are here, and all lanes are done with the unit that the next one replaces
      const int next = i + STAGES - 1;
      if (next < n) fetch(ring + next % STAGES * 2 * TILE, my_keys, my_values, (mine + next * WARPS) * KEYS, length);
      copies_commit();
      mean.add(ring + i % STAGES * 2 * TILE, rows, length - (mine + i * WARPS) * KEYS, scale);
    }
    copies_wait<0>();
    __syncthreads();
    float* sums = (float*)rings; // [WARPS][group][HEAD_DIM]
    float2* warp_tops = (float2*)(sums + WARPS * 16 * HEAD_DIM);
    mean.leave(sums + warp * group * HEAD_DIM, warp_tops + warp * 16, group);
    __syncthreads();

    // The blocks that hold the segment's first and last unit.
    const int from_block = ((first + 1) * blocks - 1) / units, to_block = (end * blocks - 1) / units;
    const bool alone = from_block == to_block;
    constexpr int QUADS = HEAD_DIM / 4;
    half_t* my_out = out + (long long)x * group * HEAD_DIM;
    const long long slot = (blockIdx.x + x) * (long long)group; // blocks and segments only grow together
    for (int at = threadIdx.x; at < group * QUADS; at += THREADS) {
      const int row = at / QUADS;
      float top = LOWEST, sum = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = fmaxf(top, warp_tops[w * 16 + row].x);
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float2 of_warp = warp_tops[w * 16 + row];
        const float weight = exp2_fast(of_warp.x - top);
        sum += of_warp.y * weight;
        add_scaled(total, ((const float4*)sums)[w * group * QUADS + at], weight);
      }
      if (alone) {
        put(my_out, at, total, sum > 0.f ? 1.f / sum : 0.f);
      } else {
        parts[slot * QUADS + at] = total;
        if (at % QUADS == 0) tops[slot + row] = make_float2(top, sum);
      }
    }
    if (!alone) {
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) *flag = atomicAdd(arrived + x, 1) == to_block - from_block;
      __syncthreads();
      if (*flag) {
        __threadfence();
        const long long first_slot = (from_block + x) * (long long)group;
        merge(parts + first_slot * QUADS, tops + first_slot, my_out, to_block - from_block + 1, group, sums);
        if (threadIdx.x == 0) arrived[x] = 0;
      }
    }
    unit = min(stop, end);
    __syncthreads();
  }
}
