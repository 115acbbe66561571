// SPDX-License-Identifier: MIT
// Products of a warp's rows with a block of columns, operands in swizzled shared memory (columns.cuh).
#pragma once
#include <type_traits>

#include "cuda/portable/fragments_f32.cuh"

namespace natten::cuda_portable {

/// acc[16 x kBlockN] of each of the warp's kWarpTiles times 16 rows = rows * columns[kBlockN x kHeadDim]^T; `rows` is
/// the address of the whole tile. A fragment of columns is read once for all rows of the warp.
template <class T, int kHeadDim, int kBlockN, int kWarpTiles>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kWarpTiles][kBlockN / 8][4], uint32_t rows,
                                                    uint32_t columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int a_row = warp * kWarpTiles * 16 + lane % 16, a_chunk = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) clear(acc[m]);
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kWarpTiles][4];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
      ptx::ldmatrix_x4(a[m], rows + swizzled<T, kHeadDim>(16 * m + a_row, 2 * k + a_chunk));
#pragma unroll
    for (int n = 0; n < kBlockN / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, columns + swizzled<T, kHeadDim>(16 * n + b_row, 2 * k + b_chunk));
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        ptx::mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// acc[16 x kOut] += p[16 x kBlockN] * columns[kBlockN x kHeadDim] for each of the kWarpTiles times 16 rows, of the
/// columns kOut channels from `first_chunk` on.
template <class T, int kHeadDim, int kBlockN, int kOut, int kWarpTiles>
__device__ __forceinline__ void multiply_add(float (&acc)[kWarpTiles][kOut / 8][4],
                                             const float (&p)[kWarpTiles][kBlockN / 8][4], uint32_t columns,
                                             int first_chunk) {
  const int lane = threadIdx.x % 32, row = lane % 16, chunk = first_chunk + lane / 16;
#pragma unroll
  for (int k = 0; k < kBlockN / 16; ++k) {
    uint32_t a[kWarpTiles][4];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[m][i] = ptx::pack<T>(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kOut / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, columns + swizzled<T, kHeadDim>(16 * k + row, chunk + 2 * n));
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        ptx::mma_16816<T>(acc[m][2 * n], a[m], b[0], b[1]);
        ptx::mma_16816<T>(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

/// The same for every element type. Only floats ask how many channels there are, and whether tf32 is exact enough;
/// their warps have 16 rows.
template <class T, int kHeadDim, int kBlockN, int kWarpTiles>
__device__ __forceinline__ void multiply_transposed(float (&acc)[kWarpTiles][kBlockN / 8][4], uint32_t rows,
                                                    uint32_t columns, int dim, bool tf32) {
  if constexpr (!std::is_same_v<T, float>)
    multiply_transposed<T, kHeadDim, kBlockN, kWarpTiles>(acc, rows, columns);
  else if (tf32)
    f32::multiply_transposed<false, kHeadDim, kBlockN>(acc[0], rows, columns, dim);
  else
    f32::multiply_transposed<true, kHeadDim, kBlockN>(acc[0], rows, columns, dim);
}
template <class T, int kHeadDim, int kBlockN, int kOut, int kWarpTiles>
__device__ __forceinline__ void multiply_add(float (&acc)[kWarpTiles][kOut / 8][4],
                                             const float (&p)[kWarpTiles][kBlockN / 8][4], uint32_t columns,
                                             int first_chunk, int dim, bool tf32) {
  if constexpr (!std::is_same_v<T, float>)
    multiply_add<T, kHeadDim, kBlockN, kOut, kWarpTiles>(acc, p, columns, first_chunk);
  else if (tf32)
    f32::multiply_add<false, kHeadDim, kBlockN>(acc[0], p[0], columns, dim);
  else
    f32::multiply_add<true, kHeadDim, kBlockN>(acc[0], p[0], columns, dim);
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

template <int kWarpTiles, int kCount>
__device__ __forceinline__ bool all_finite(const float (&acc)[kWarpTiles][kCount][4]) {
  float witness = 0;  // one addition each
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) witness = fmaf(acc[m][n][e], 0.0f, witness);
  return witness == 0;
}

// ---- containment: a NaN or infinity reaches only the rows that see it ----
// A product with a masked, hence zero, probability would spread it: 0 * NaN is NaN. So a tile whose result is not
// finite is computed once more, and then these two stand around the second product.

/// Of a row in shared memory, the elements of the channels that multiply_add leaves in elements 0 and 1 (for the other
/// row: 2 and 3) of accumulator n.
template <class T, int kHeadDim>
__device__ __forceinline__ float2 channels_of(uint32_t rows, int row, int first_chunk, int n) {
  const int t = threadIdx.x % 4;
  if constexpr (std::is_same_v<T, float>) {
    const int chunk = first_chunk + n / 4 * 8 + 2 * t;
    return {__uint_as_float(ptx::load_shared_32(rows + swizzled<T, kHeadDim>(row, chunk) + n % 4 * 4)),
            __uint_as_float(ptx::load_shared_32(rows + swizzled<T, kHeadDim>(row, chunk + 1) + n % 4 * 4))};
  } else {
    const uint32_t word = ptx::load_shared_32(rows + swizzled<T, kHeadDim>(row, first_chunk + n) + t * 4);
    return {to_real(T{uint16_t(word)}), to_real(T{uint16_t(word >> 16)})};
  }
}

/// Adds the non-finite elements themselves to the sums of the rows that see them.
template <class T, int kHeadDim, int kBlockN, int kOut, int kWarpTiles>
__device__ __forceinline__ void add_nonfinite(float (&acc)[kWarpTiles][kOut / 8][4], uint32_t columns, int first_chunk,
                                              const RowMasks<kWarpTiles, kBlockN>& masks) {
#pragma unroll 1
  for (int column = 0; column < kBlockN; ++column) {
    // This thread's masks are of its own columns, so it asks the thread of the quad that has this one.
    const int lane = (threadIdx.x % 32 & ~3) + column % 8 / 2, bit = column / 8 * 2 + column % 2;
    bool sees[2 * kWarpTiles];
#pragma unroll
    for (int r = 0; r < 2 * kWarpTiles; ++r) sees[r] = __shfl_sync(~0u, masks.bits[r / 2][r % 2], lane) >> bit & 1;
#pragma unroll
    for (int n = 0; n < kOut / 8; ++n) {
      const float2 x = channels_of<T, kHeadDim>(columns, column, first_chunk, n);
      if (isfinite(x.x) && isfinite(x.y)) continue;
#pragma unroll
      for (int r = 0; r < 2 * kWarpTiles; ++r) {
        if (sees[r] && !isfinite(x.x)) acc[r / 2][n][r % 2 * 2] += x.x;
        if (sees[r] && !isfinite(x.y)) acc[r / 2][n][r % 2 * 2 + 1] += x.y;
      }
    }
  }
}

/// The word with zeros in place of elements that are not finite.
template <class T>
__device__ __forceinline__ uint32_t finite_part(uint32_t word) {
  constexpr uint32_t kExponent = std::is_same_v<T, float> ? 0x7f800000 : std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
  constexpr uint32_t kLow = sizeof(T) == 4 ? 0xffffffff : 0xffff;
  if ((word & kExponent) == kExponent) word &= ~kLow;
  if (sizeof(T) == 2 && (word >> 16 & kExponent) == kExponent) word &= kLow;
  return word;
}

/// Non-finite elements become 0.
template <class T, int kHeadDim, int kBlockN>
__device__ __forceinline__ void clear_nonfinite(uint32_t columns) {
  for (int i = threadIdx.x; i < kBlockN * kHeadDim * int(sizeof(T)) / 4; i += kThreads) {
    const uint32_t word = ptx::load_shared_32(columns + i * 4), finite = finite_part<T>(word);
    if (finite != word) ptx::store_shared_32(columns + i * 4, finite);
  }
}

// ---- results ----

/// acc * factor of rows g and g + 8 of 16 to shared memory, where they begin at row `first_row`.
template <class T, int kHeadDim, int kOut>
__device__ __forceinline__ void stage_rows(const float (&acc)[kOut / 8][4], const float (&factor)[2], uint32_t tile,
                                           int first_row) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  constexpr int kTogether = std::is_same_v<T, float> ? 4 : 1;  // accumulators that hold neighbouring channels
#pragma unroll
  for (int n = 0; n < kOut / 8; n += kTogether)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + lane / 4 + 8 * i;
      if constexpr (std::is_same_v<T, float>) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto word = [&](int m) { return __float_as_uint(acc[n + m][2 * i + e] * factor[i]); };
          ptx::store_shared_128(tile + swizzled<T, kHeadDim>(row, 2 * n + 2 * t + e),
                                {word(0), word(1), word(2), word(3)});
        }
      } else {
        ptx::store_shared_32(tile + swizzled<T, kHeadDim>(row, n) + t * 4,
                             ptx::pack<T>(acc[n][2 * i] * factor[i], acc[n][2 * i + 1] * factor[i]));
      }
    }
}

/// acc * factor of the warp's rows to the tensor, through the warp's own rows of the tile's shared memory.
template <class T, int kHeadDim, int kOut, int kWarpTiles>
__device__ __forceinline__ void store_rows(const float (&acc)[kWarpTiles][kOut / 8][4],
                                           const float (&factor)[kWarpTiles][2], uint32_t tile, const BoxesParams& p,
                                           const Item& item, const Gather<T>& to, int first_chunk) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * kWarpTiles * 16;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) stage_rows<T, kHeadDim, kOut>(acc[m], factor[m], tile, first_row + 16 * m);
  __syncwarp();
  constexpr int kChunks = kOut / kPerChunk<T>;
  for (int i = lane; i < kWarpTiles * 16 * kChunks; i += 32) {
    const int row = first_row + i / kChunks, chunk = i % kChunks, first = (first_chunk + chunk) * kPerChunk<T>;
    if (first >= to.dim || !is_row(p, item, row)) continue;
    const uint4 v = ptx::load_shared_128(tile + swizzled<T, kHeadDim>(row, chunk));
    T* at = to.at(tile_row(p, item, row)) + first;
    if (to.vector) {
      ptx::store_global_128(at, v);
      continue;
    }
    T elements[kPerChunk<T>];
    memcpy(elements, &v, sizeof elements);
#pragma unroll
    for (int e = 0; e < kPerChunk<T>; ++e)
      if (first + e < to.dim) at[e] = elements[e];
  }
  __syncwarp();
}

}  // namespace natten::cuda_portable
