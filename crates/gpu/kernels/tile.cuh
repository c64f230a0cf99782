// A block of 128 stationary rows times tiles of streamed rows, on Hopper's warpgroup matrix units.
//
// Owns the product and the data movement: A[128 rows] . B[TILE rows]^T, both [rows, HEAD_DIM], A held in registers for
// the life of the block, B streamed through shared memory. What is done with a product's 128 x TILE numbers, which exist
// in registers only, is the kernels' subject (scores.cu).
//
// Compiled by NVRTC for sm_90a with HEAD_DIM (a multiple of 8, at most 256) and BF16 (1 for bf16, 0 for f16) defined.

typedef unsigned long long u64;

// Rows in shared memory are made of 128-byte pieces, the unit of the swizzle; a narrower head is padded with zeros.
constexpr int WIDTH = HEAD_DIM <= 64 ? 64 : HEAD_DIM <= 128 ? 128 : 256;
constexpr int STEPS = WIDTH / 16; // products of depth 16
#ifndef GROUPS
#define GROUPS 4 // warpgroups of a block, 64 stationary rows each
#endif
constexpr int THREADS = 128 * GROUPS;
constexpr int STATIONARY = 64 * GROUPS;
#ifndef PARTS
#define PARTS 4
#endif
constexpr int PART = 64;           // streamed rows of one product
constexpr int TILE = PARTS * PART; // streamed rows that are copied together; PARTS is even
#ifndef BLOCKS
#define BLOCKS 1 // per multiprocessor
#endif
#ifndef STAGES
#define STAGES 2
#endif
constexpr int TILE_BYTES = TILE * WIDTH * 2;
#define INFINITE __int_as_float(0x7f800000)

// Shared memory of one block: tiles, then one number per streamed row.
struct Shared {
  u32 tiles;     // STAGES x TILE_BYTES, 1024-byte aligned
  float* column; // STAGES x TILE

  __device__ __forceinline__ explicit Shared(char* raw) {
    char* base = raw + ((1024 - (shared_address(raw) & 1023)) & 1023);
    tiles = shared_address(base);
    column = (float*)(base + STAGES * TILE_BYTES);
  }
};

// Start copying a tile: its row r is row index(r) of `base`, whose rows are `stride` elements apart; a negative index means
// a row of zeros.
template <class Index>
__device__ __forceinline__ void stream_tile(u32 to, const half_t* base, int stride, Index index) {
  constexpr int PIECES = WIDTH / 8; // of 16 bytes
#pragma unroll
  for (int i = 0; i < (TILE * PIECES + THREADS - 1) / THREADS; i++) {
    const int piece = threadIdx.x + i * THREADS;
    if (TILE * PIECES % THREADS != 0 && piece >= TILE * PIECES) break;
    const int row = piece / PIECES, at = piece % PIECES;
    const int from = index(row);
    const bool valid = from >= 0 && at * 8 < HEAD_DIM;
    // [WIDTH / 64][TILE][64], 16-byte pieces of a 128-byte line permuted by the row: the 128-byte swizzle.
    const u32 place = to + (at / 8) * (TILE * 128) + row * 128 + (((at % 8) ^ (row & 7)) * 16);
    copy16(place, base + (valid ? (long long)from * stride + at * 8 : 0), valid);
  }
}

// Copy one number per row of a tile, those of its first `rows` rows, `apart` from each other and times `scale`; infinity for the
// others, which takes them out of every maximum and sum of exp2(x - number).
__device__ __forceinline__ void stream_column(float* to, const float* from, int rows, int apart = 1, float scale = 1.f) {
#pragma unroll
  for (int i = 0; i < (TILE + THREADS - 1) / THREADS; i++) {
    const int row = threadIdx.x + i * THREADS;
    if (TILE % THREADS == 0 || row < TILE) to[row] = row < rows ? from[(long long)row * apart] * scale : INFINITE;
  }
}

// The stationary rows in the registers of the warpgroup that owns them.
struct Stationary {
  u32 part[STEPS][4];

  // Row m of the block's 128 lies at base + m * stride; rows from `rows` on are zeros.
  __device__ __forceinline__ void load(const half_t* base, long long stride, int rows) {
    const int lane = threadIdx.x % 32;
    const int m = (threadIdx.x / 32) * 16 + lane / 4;
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const int row = m + (p % 2) * 8, at = k * 16 + (p / 2) * 8 + (lane % 4) * 2;
        part[k][p] = row < rows && at < HEAD_DIM ? *(const u32*)(base + row * stride + at) : 0u;
      }
  }
};

// The stationary row that a thread's values of half h (0, 1) belong to.
__device__ __forceinline__ int row_of(int h) { return (threadIdx.x / 32) * 16 + (threadIdx.x % 32) / 4 + h * 8; }

// The streamed row of value v (0, 1) in group j of eight.
__device__ __forceinline__ int column_of(int j, int v) { return j * 8 + (threadIdx.x % 4) * 2 + v; }

// Products of a warpgroup's 64 rows with a part of a tile; value [4 j + 2 h + v] is of row_of(h), column_of(j, v).
struct Products {
  float value[PART / 2];
};

#if BF16
#define KIND "f32.bf16.bf16"
#else
#define KIND "f32.f16.f16"
#endif

#define ACC8(o) "+f"(c[o]), "+f"(c[o + 1]), "+f"(c[o + 2]), "+f"(c[o + 3]), "+f"(c[o + 4]), "+f"(c[o + 5]), "+f"(c[o + 6]), "+f"(c[o + 7])

__device__ __forceinline__ void multiply_step(float (&c)[32], const u32 (&a)[4], u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16." KIND " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
               "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}\n"
               : ACC8(0), ACC8(8), ACC8(16), ACC8(24)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ __forceinline__ void multiply_step(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16." KIND " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, "
               "%14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
               "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
               "%58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;}\n"
               : ACC8(0), ACC8(8), ACC8(16), ACC8(24), ACC8(32), ACC8(40), ACC8(48), ACC8(56)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// Where a step's 16 columns of a tile lie, in the form that the matrix unit reads: 128-byte swizzle (bits 62-63), groups of
// eight rows 1024 bytes apart (bits 32-45).
__device__ __forceinline__ u64 descriptor(u32 tile, int step) {
  const u32 at = tile + (step / 4) * (TILE * 128) + (step % 4) * 32;
  return (u64)((at & 0x3ffff) >> 4) | (1ull << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}

// The compiler may not move what it does with these numbers across this line: it does not know that the matrix unit writes
// them later than the instruction that asks for it.
__device__ __forceinline__ void settle(Products& c) {
#pragma unroll
  for (int i = 0; i < PART / 2; i++) asm volatile("" : "+f"(c.value[i])::"memory");
}

// Start the products of a part of a tile, whose lines begin at `tile`; they are there after products_wait().
__device__ __forceinline__ void multiply(Products& c, const Stationary& a, u32 tile) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < STEPS; k++) multiply_step(c.value, a.part[k], descriptor(tile, k), k > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int IN_FLIGHT>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

// Stream tiles 0..tiles past the stationary rows: `load(i, stage)` starts the copies of tile i, `use(i, part, stage,
// products)` gets the products of each part of it, while the matrix unit is at work on the next part's.
template <class Load, class Use>
__device__ __forceinline__ void stream(int tiles, const Shared& shared, const Stationary& a, Load load, Use use) {
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < tiles) load(i, i);
    copies_commit();
  }
  int stage = 0;
  Products even, odd;
  for (int i = 0; i < tiles; i++) {
    copies_wait<STAGES - 2>();
    // The matrix unit reads shared memory through another proxy than the copies write it.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads(); // tile i is here, and nobody reads tile i - 1 any more
    const int ahead = i + STAGES - 1;
    if (ahead < tiles) load(ahead, stage == 0 ? STAGES - 1 : stage - 1);
    copies_commit();
    const u32 tile = shared.tiles + stage * TILE_BYTES;
    settle(even);
    multiply(even, a, tile);
    // Nothing is in flight from one tile to the next: the compiler overlaps products in straight-line code only.
#pragma unroll
    for (int part = 0; part < PARTS; part += 2) {
      settle(odd);
      multiply(odd, a, tile + (part + 1) * PART * 128);
      products_wait<1>();
      settle(even);
      use(i, part, stage, even);
      if (part + 2 < PARTS) {
        settle(even);
        multiply(even, a, tile + (part + 2) * PART * 128);
        products_wait<1>();
      } else {
        products_wait<0>();
      }
      settle(odd);
      use(i, part + 1, stage, odd);
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
}

// Over the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
