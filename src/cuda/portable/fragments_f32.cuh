// SPDX-License-Identifier: MIT
// Products of floats on tensor cores, which multiply tf32: what fragments.cuh does for 16-bit elements.
//
// Exact: each operand is the sum of two numbers in tf32, big + small, and small * small is left out, which is 2^-22 of
// the product. Otherwise big * big alone. A sum leaves the tensor cores after kTermsInside terms.
// NOTE: they cut sums off where fp32 adders round them, so a sum of n steps would drift by up to n * 2^-23, which is
// more than 1e-5 for some hundred keys (Ootomo and Yokota, arXiv 2203.03341, section 3).
#pragma once
#include "cuda/portable/columns.cuh"
#include "cuda/ptx/mma.cuh"

namespace natten::cuda_portable::f32 {

constexpr int kTermsInside = 32, kTilesInside = kTermsInside / 8;

/// Words of an operand of an mma, which ignores the last 13 bits of a float.
template <bool kExact, int kWords>
struct Operand {
  uint32_t big[kWords], small[kExact ? kWords : 1];

  __device__ __forceinline__ explicit Operand(const uint32_t (&words)[kWords]) {
    // Makes of cutting off a rounding: adds 0.7 to 1.4 halves of the last bit that stays. NOTE: cvt.rna.tf32 becomes
    // four instructions, and adding 0x1000 makes a zero of a NaN.
    constexpr float kRound = 1 + 0.7f / 2048;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float x = __uint_as_float(words[i]);
      big[i] = __float_as_uint(x * kRound);
      if constexpr (kExact) {
        big[i] &= 0xffffe000;
        small[i] = __float_as_uint(x - __uint_as_float(big[i]));
      }
    }
  }
};

/// acc += a * b, of which b is words `i` and `j` of a larger operand.
template <bool kExact, int kWords>
__device__ __forceinline__ void multiply(float (&acc)[4], const Operand<kExact, 4>& a, const Operand<kExact, kWords>& b,
                                         int i, int j) {
  if constexpr (kExact) {
    ptx::mma_1688_tf32(acc, a.small, b.big[i], b.big[j]);
    ptx::mma_1688_tf32(acc, a.big, b.small[i], b.small[j]);
  }
  ptx::mma_1688_tf32(acc, a.big, b.big[i], b.big[j]);
}

template <int kCount>
__device__ __forceinline__ void add(float (&acc)[kCount][4], int first, const float (&sum)[kTilesInside][4]) {
#pragma unroll
  for (int n = 0; n < kTilesInside; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[first + n][e] += sum[n][e];
}

/// As its namesake in fragments.cuh; a chunk has four floats, and ldmatrix moves words as it moves pairs of halves.
/// Channels are taken 32 at a time while there are any, `dim` in all: so buckets of 64 and 128 suffice.
template <bool kExact, int kHeadDim, int kBlockN>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kBlockN / 8][4], uint32_t rows, uint32_t columns,
                                                    int dim) {
  static_assert(kBlockN / 8 == kTilesInside);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int a_row = warp * 16 + lane % 16, a_chunk = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
  clear(acc);
#pragma unroll
  for (int first = 0; first < kHeadDim; first += kTermsInside) {
    if (first >= dim) break;
    float sum[kTilesInside][4];
    clear(sum);
#pragma unroll
    for (int k = first / 8; k < (first + kTermsInside) / 8; ++k) {
      uint32_t words[4];
      ptx::ldmatrix_x4(words, rows + swizzled<float, kHeadDim>(a_row, 2 * k + a_chunk));
      const Operand<kExact, 4> a(words);
#pragma unroll
      for (int n = 0; n < kBlockN / 16; ++n) {
        ptx::ldmatrix_x4(words, columns + swizzled<float, kHeadDim>(16 * n + b_row, 2 * k + b_chunk));
        const Operand<kExact, 4> b(words);
        multiply(sum[2 * n], a, b, 0, 1);
        multiply(sum[2 * n + 1], a, b, 2, 3);
      }
    }
    add(acc, 0, sum);
  }
}

/// As its namesake in fragments.cuh, but for the order of keys and channels, neither of which matters to an mma:
/// - Keys 2t and 2t + 1 of eight stand at depths t and t + 4, so that accumulators are operands as they are.
/// - Column g of four accumulators is channels 4g .. 4g + 3 of 32, so a thread reads 16 bytes of a key at once, and
///   the eight threads that do so together meet every bank once.
template <bool kExact, int kHeadDim, int kBlockN>
__device__ __forceinline__ void multiply_add(float (&acc)[kHeadDim / 8][4], const float (&p)[kBlockN / 8][4],
                                             uint32_t columns, int dim) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int first = 0; first < kHeadDim; first += 8 * kTilesInside) {
    if (first >= dim) break;
    float sum[kTilesInside][4];
    clear(sum);
#pragma unroll
    for (int k = 0; k < kBlockN / 8; ++k) {
      const Operand<kExact, 4> a(
          {__float_as_uint(p[k][0]), __float_as_uint(p[k][2]), __float_as_uint(p[k][1]), __float_as_uint(p[k][3])});
      const uint4 x = ptx::load_shared_128(columns + swizzled<float, kHeadDim>(8 * k + 2 * t, first / 4 + g));
      const uint4 y = ptx::load_shared_128(columns + swizzled<float, kHeadDim>(8 * k + 2 * t + 1, first / 4 + g));
      const Operand<kExact, 8> b({x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w});
#pragma unroll
      for (int n = 0; n < kTilesInside; ++n) multiply(sum[n], a, b, n, 4 + n);
    }
    add(acc, first / 8, sum);
  }
}

}  // namespace natten::cuda_portable::f32
