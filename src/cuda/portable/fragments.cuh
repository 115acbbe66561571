// SPDX-License-Identifier: MIT
// Products of a warp's 16 rows with a block of columns, operands in swizzled shared memory (columns.cuh).
#pragma once
#include <type_traits>

#include "cuda/portable/columns.cuh"
#include "cuda/ptx/mma.cuh"

namespace natten::cuda_portable {

template <int kCount>
__device__ __forceinline__ void clear(float (&acc)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
}

/// acc[16 x kBlockN] = rows[16 x kHeadDim] * columns[kBlockN x kHeadDim]^T; `rows` is the address of the whole tile.
template <class T, int kHeadDim, int kBlockN>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kBlockN / 8][4], uint32_t rows, uint32_t columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int a_row = warp * 16 + lane % 16, a_chunk = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
  clear(acc);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, rows + swizzled<kHeadDim>(a_row, 2 * k + a_chunk));
#pragma unroll
    for (int n = 0; n < kBlockN / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, columns + swizzled<kHeadDim>(16 * n + b_row, 2 * k + b_chunk));
      ptx::mma_16816<T>(acc[2 * n], a, b[0], b[1]);
      ptx::mma_16816<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/// acc[16 x kOut] += p[16 x kBlockN] * columns[kBlockN x kHeadDim], of the latter kOut channels from `first_chunk` on.
template <class T, int kHeadDim, int kBlockN, int kOut>
__device__ __forceinline__ void multiply_add(float (&acc)[kOut / 8][4], const float (&p)[kBlockN / 8][4],
                                             uint32_t columns, int first_chunk) {
  const int lane = threadIdx.x % 32, row = lane % 16, chunk = first_chunk + lane / 16;
#pragma unroll
  for (int k = 0; k < kBlockN / 16; ++k) {
    const uint32_t a[4] = {ptx::pack<T>(p[2 * k][0], p[2 * k][1]), ptx::pack<T>(p[2 * k][2], p[2 * k][3]),
                           ptx::pack<T>(p[2 * k + 1][0], p[2 * k + 1][1]),
                           ptx::pack<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kOut / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, columns + swizzled<kHeadDim>(16 * k + row, chunk + 2 * n));
      ptx::mma_16816<T>(acc[2 * n], a, b[0], b[1]);
      ptx::mma_16816<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/// Sum and maximum over the four threads that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <int kCount>
__device__ __forceinline__ bool all_finite(const float (&acc)[kCount][4]) {
  bool finite = true;
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) finite = finite && fabsf(acc[n][e]) <= 3.402823466e38f;
  return finite;
}

/// Is either half of the word infinite or NaN?
template <class T>
__device__ __forceinline__ bool has_nonfinite(uint32_t word) {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
  return (word & kExponent) == kExponent || (word >> 16 & kExponent) == kExponent;
}

// ---- containment: a NaN or infinity reaches only the rows that see it ----
// A product with a masked, hence zero, probability would spread it: 0 * NaN is NaN. So a tile whose result is not
// finite is computed once more, and then these two stand around the second product.

/// Adds the non-finite elements themselves to the sums of the rows that see them.
template <class T, int kHeadDim, int kBlockN, int kOut>
__device__ __forceinline__ void add_nonfinite(float (&acc)[kOut / 8][4], uint32_t columns, int first_chunk,
                                              const RowMasks<kBlockN>& masks) {
  const int t = threadIdx.x % 4;
#pragma unroll 1
  for (int column = 0; column < kBlockN; ++column) {
    // The masks of this thread are shifted for its own columns, so it asks the quad's first thread.
    uint32_t sees[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t word = masks.word[i][0];
      if (kBlockN == 64 && column >= 32) word = masks.word[i][kBlockN / 32 - 1];
      sees[i] = __shfl_sync(~0u, word, threadIdx.x % 32 & ~3) >> (column % 32) & 1;
    }
#pragma unroll
    for (int n = 0; n < kOut / 8; ++n) {
      const uint32_t word = ptx::load_shared_32(columns + swizzled<kHeadDim>(column, first_chunk + n) + t * 4);
      if (!has_nonfinite<T>(word)) continue;
      const float low = to_real(T{uint16_t(word)}), high = to_real(T{uint16_t(word >> 16)});
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (sees[i] && !isfinite(low)) acc[n][2 * i] += low;
        if (sees[i] && !isfinite(high)) acc[n][2 * i + 1] += high;
      }
    }
  }
}

/// Non-finite elements become 0.
template <class T, int kHeadDim, int kBlockN>
__device__ __forceinline__ void clear_nonfinite(uint32_t columns) {
  for (int i = threadIdx.x; i < kBlockN * kHeadDim / 2; i += kThreads) {
    uint32_t word = ptx::load_shared_32(columns + i * 4);
    if (!has_nonfinite<T>(word)) continue;
    if (has_nonfinite<T>(word & 0xffff)) word &= 0xffff0000;
    if (has_nonfinite<T>(word & 0xffff0000)) word &= 0xffff;
    ptx::store_shared_32(columns + i * 4, word);
  }
}

// ---- results ----

/// acc * factor of the warp's 16 rows to the tensor, through the warp's own rows of the tile's shared memory.
template <class T, int kHeadDim, int kOut>
__device__ __forceinline__ void store_rows(const float (&acc)[kOut / 8][4], const float (&factor)[2], uint32_t tile,
                                           const BoxesParams& p, const Item& item, const Gather<T>& to,
                                           int first_chunk) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kOut / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ptx::store_shared_32(tile + swizzled<kHeadDim>(warp * 16 + g + 8 * i, n) + t * 4,
                           ptx::pack<T>(acc[n][2 * i] * factor[i], acc[n][2 * i + 1] * factor[i]));
  __syncwarp();
  constexpr int kChunks = kOut / 8;
  for (int i = lane; i < 16 * kChunks; i += 32) {
    const int row = warp * 16 + i / kChunks, chunk = i % kChunks, first = (first_chunk + chunk) * 8;
    if (first >= to.dim || !is_row(p, item, row)) continue;
    const uint4 v = ptx::load_shared_128(tile + swizzled<kHeadDim>(row, chunk));
    T* at = to.at(tile_row(p, item, row)) + first;
    if (to.vector) {
      ptx::store_global_128(at, v);
      continue;
    }
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (first + e < to.dim) at[e].bits = uint16_t(words[e / 2] >> (e % 2 * 16));
  }
  __syncwarp();
}

}  // namespace natten::cuda_portable
