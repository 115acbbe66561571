// SPDX-License-Identifier: MIT
// Statistics of a query for the kernel of the keys, where they are per *column*: -lse / scale and -delta enter the
// products Q K^T and dO V^T as one more product, of a row of weights with three elements each that sum to the number.
// So the accumulator's input stays free for the mask, and a lane reads 4 bytes instead of broadcasting 16.
#pragma once
#include "cuda/portable/window.cuh"

namespace natten::cuda_portable {

/// Exact to a float for bfloat16 (3 * 8 bits). A half has 11 bits but little range: the first is a multiple of 256.
template <class T>
struct SplitWeights {
  static constexpr float kFirst = std::is_same_v<T, f16> ? 256.0f : 1.0f;
  static constexpr float kLast = std::is_same_v<T, f16> ? 1.0f / 4096 : 1.0f;

  /// A fragment of depth 8: every row holds the weights of elements 0, 1, 2.
  __device__ static __forceinline__ uint32_t fragment(int t) {
    return t == 0 ? ptx::pack<T>(kFirst, 1.0f) : t == 1 ? ptx::pack<T>(kLast, 0.0f) : 0;
  }
  __device__ static __forceinline__ uint2 split(float x) {
    const float first = round(x / kFirst), rest = x - first * kFirst, second = round(rest);
    return {ptx::pack<T>(first, second), ptx::pack<T>((rest - second) / kLast, 0.0f)};
  }
  __device__ static __forceinline__ float round(float x) {
    return to_real(T{uint16_t(ptx::pack<T>(x, 0.0f) & 0xffff)});
  }
};

/// The halves of a word.
template <class T>
__device__ __forceinline__ float to_float_low(uint32_t word) {
  return to_real(T{uint16_t(word & 0xffff)});
}
template <class T>
__device__ __forceinline__ float to_float_high(uint32_t word) {
  return to_real(T{uint16_t(word >> 16)});
}

/// Sum of products of eight elements each.
template <class T>
__device__ __forceinline__ float dot_words(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(to_float_low<T>(x[i]), to_float_low<T>(y[i]), sum);
    sum = fmaf(to_float_high<T>(x[i]), to_float_high<T>(y[i]), sum);
  }
  return sum;
}

}  // namespace natten::cuda_portable
