// Numbers as all kernels have them: 16-bit kinds and their f32, logarithms to the base of 2, exponentials.
//
// Stands in front of every file of kernels. BF16 is 1 for bf16, 0 for f16. No header is included.

typedef unsigned short half_t; // 16 raw bits, bf16 or f16
typedef unsigned int u32;

constexpr float LOG2E = 1.4426950408889634f;
// Below every logit, and finite, so that differences of two of it are no NaN.
constexpr float LOWEST = -1e30f;

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float2 unpack(u32 x) {
  float2 y;
#if BF16
  y.x = __uint_as_float(x << 16);
  y.y = __uint_as_float(x & 0xffff0000u);
#else
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(y.x), "=f"(y.y) : "r"(x));
#endif
  return y;
}

__device__ __forceinline__ u32 pack(float x, float y) {
  u32 z;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
#endif
  return z;
}
