// SPDX-License-Identifier: MIT
// mma.sync with 16-bit elements (m16n8k16, m16n8k8) or tf32 and fp32 sums (sm_80 and newer). No logic.
//
// Lane 4g + t of a warp holds (g: row of a quarter, t: column pair)
//   a[0..3]  A[g][2t, +1], A[g + 8][2t, +1], A[g][2t + 8, +9], A[g + 8][2t + 8, +9]      (16 x 16)
//   b0, b1   B[2t, +1][g], B[2t + 8, +9][g]                                              (16 x 8)
//   d[0..3]  D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]                      (16 x 8)
#pragma once
#include <cstdint>

#include "core/element.h"

namespace natten::ptx {

/// d = a * b + c
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                          const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_16816<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_16816<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                               const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

/// d += a * b
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_16816<T>(d, a, b0, b1, d);
}

/// d = a * b + c with a depth of 8: a0 of row g, a1 of row g + 8, b of columns 2t and 2t + 1.
template <class T>
__device__ __forceinline__ void mma_1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const float (&c)[4]);
template <>
__device__ __forceinline__ void mma_1688<bf16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b,
                                               const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
template <>
__device__ __forceinline__ void mma_1688<f16>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b,
                                              const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

/// d += a * b of floats in tf32, that is without the last 13 bits of their mantissas, with a depth of 8:
///   a[0..3]  A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]
///   b0, b1   B[t][g], B[t + 4][g]
__device__ __forceinline__ void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two floats to two elements, `low` in the low half; to nearest.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
__device__ __forceinline__ uint32_t pack<f16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

/// A float to an element; to nearest.
template <class T>
__device__ __forceinline__ uint16_t round_to(float x);
template <>
__device__ __forceinline__ uint16_t round_to<bf16>(float x) {
  uint16_t r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
template <>
__device__ __forceinline__ uint16_t round_to<f16>(float x) {
  uint16_t r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}

/// 2^x to 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// x, if `zero` is 0, without the compiler knowing it.
/// NOTE: otherwise ptxas gathers fragments that came from 16-byte loads anew before each mma (a quarter of all
/// instructions), and volatile keeps the next load from being scheduled before the old value is taken.
__device__ __forceinline__ uint32_t opaque(uint32_t x, uint32_t zero) {
  uint32_t y;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(zero));
  return y;
}

/// x, if `mask` has all bits, or 0, if it has none; the compiler knows as little as of `opaque`.
__device__ __forceinline__ uint32_t masked(uint32_t x, uint32_t mask) {
  uint32_t y;
  asm volatile("and.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(mask));
  return y;
}

/// p, without the compiler knowing how it was made: else it adds up base and offsets anew at every use.
template <class T>
__device__ __forceinline__ T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

/// p + n * bytes in one instruction.
__device__ __forceinline__ const char* offset(const char* p, uint32_t n, uint32_t bytes) {
  const char* r;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(r) : "r"(n), "r"(bytes), "l"(p));
  return r;
}

}  // namespace natten::ptx
