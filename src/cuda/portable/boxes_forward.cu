// SPDX-License-Identifier: MIT
// Forward, any problem: online softmax over the blocks of a tile's keys (walk.cuh).
//
// Per block: S = Q K^T, mask, softmax, O += P V. Warps have 16 rows, or 32 where there are many: then each fragment of
// keys and values that they read from shared memory serves twice.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/fragments.cuh"
#include "cuda/portable/walk.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim, int kWarpTiles>
struct Forward {
  static constexpr int kBlockN = block_columns(sizeof(T), kHeadDim);
  using Map = SharedMap<T, kHeadDim, kBlockN, 1, kWarpTiles>;
  using Masks = RowMasks<kWarpTiles, kBlockN>;
  using Scores = float[kWarpTiles][kBlockN / 8][4];

  const BoxesParams& p;
  const KeyWalk<T, kHeadDim, Map>& walk;
  const ThreadRows<kWarpTiles> rows;
  uint32_t shared;
  bool contain = false;  // see fragments.cuh

  float acc_o[kWarpTiles][kHeadDim / 8][4];
  float row_max[kWarpTiles][2], row_sum[kWarpTiles][2];  // of base-2 logits; row_sum: this thread's columns

  __device__ Forward(const KeyWalk<T, kHeadDim, Map>& keys, const Item& item)
      : p(keys.p), walk(keys), rows(keys.p, item), shared(ptx::shared_address(keys.smem)) {}

  /// Takes larger maxima over, and scales the sums so far to them.
  __device__ __forceinline__ void update_maxima(const Scores& acc_s) {
    float maximum[kWarpTiles][2];
    bool larger = false;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = -INFINITY;
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) x = fmaxf(x, fmaxf(acc_s[m][n][2 * i], acc_s[m][n][2 * i + 1]));
        maximum[m][i] = x;
        larger = larger || x > row_max[m][i];
      }
    if (!__any_sync(~0u, larger)) return;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float now = quad_max(fmaxf(row_max[m][i], maximum[m][i]));
        const float rescale = ptx::exp2_approx(row_max[m][i] - reference(now));
        row_max[m][i] = now;
        row_sum[m][i] *= rescale;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) acc_o[m][n][2 * i] *= rescale, acc_o[m][n][2 * i + 1] *= rescale;
      }
  }
  /// So that a row without keys stays 0.
  __device__ static float reference(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

  /// Masked logits to probabilities.
  __device__ __forceinline__ void softmax(Scores& acc_s) {
    update_maxima(acc_s);
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float maximum = reference(row_max[m][i]);
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
          for (int e = 2 * i; e < 2 * i + 2; ++e) {
            acc_s[m][n][e] = ptx::exp2_approx(acc_s[m][n][e] - maximum);
            row_sum[m][i] += acc_s[m][n][e];
          }
      }
  }

  __device__ __forceinline__ void run_block(int block) {
    const Masks masks(Map::bits(walk.smem, block), rows);
    if (!masks.any && !contain) return;
    Scores acc_s;
    multiply_transposed<T, kHeadDim, kBlockN, kWarpTiles>(acc_s, shared, shared + Map::columns(block % 2, 0), p.q.dim,
                                                          p.tf32);
    scale(acc_s, p.scale_log2);
    if (p.problem.has_bias && walk.in_box(block))
      add_bias<T, kWarpTiles, kBlockN>(acc_s, p, walk.item(), walk.item().head, Map::terms(walk.smem, block), masks);
    masks.apply(acc_s, -INFINITY);
    softmax(acc_s);
    const uint32_t v = shared + Map::columns(block % 2, 1);
    if (contain) {
      add_nonfinite<T, kHeadDim, kBlockN, kHeadDim>(acc_o, v, 0, masks);
      __syncthreads();
      clear_nonfinite<T, kHeadDim, kBlockN>(v);
      __syncthreads();
    }
    multiply_add<T, kHeadDim, kBlockN, kHeadDim, kWarpTiles>(acc_o, acc_s, v, 0, p.v.dim, p.tf32);
  }

  /// All blocks. Returns whether every sum of this block of threads is finite.
  __device__ __forceinline__ bool run() {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m) {
      clear(acc_o[m]);
      row_max[m][0] = row_max[m][1] = -INFINITY, row_sum[m][0] = row_sum[m][1] = 0;
    }
    walk.start();
    for (int block = 0; block < walk.num_blocks; ++block) {
      walk.proceed_to(block);
      run_block(block);
    }
    ptx::cp_async_wait<0>();  // of the tile, where there was no block
    return !__syncthreads_or(!all_finite(acc_o));
  }

  __device__ __forceinline__ void store() {
    const Item& item = walk.item();
    float factor[kWarpTiles][2];
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_sum[m][i] = quad_sum(row_sum[m][i]);
        factor[m][i] = row_sum[m][i] == 0 ? 0.0f : 1.0f / row_sum[m][i];
      }
    store_rows<T, kHeadDim, kHeadDim, kWarpTiles>(acc_o, factor, shared, p, item, gather_tile<T>(p, p.out, item), 0);
    if (!p.lse.ptr || threadIdx.x % 4 != 0) return;
    const Gather<float> lse = gather_tile<float>(p, Rows{p.lse, 1, false}, item);
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = thread_row<kWarpTiles>(m, i);
        if (is_row(p, item, row))
          *lse.at(tile_row(p, item, row)) =
              row_sum[m][i] == 0 ? -INFINITY : 0.693147180559945f * (row_max[m][i] + log2f(row_sum[m][i]));
      }
  }
};

template <class T, int kHeadDim, int kWarpTiles>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 32    ? 4
                                            : kHeadDim <= 64  ? 3
                                            : kHeadDim <= 128 ? 2
                                                              : 1)
    forward_kernel(const __grid_constant__ BoxesParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  using Map = typename Forward<T, kHeadDim, kWarpTiles>::Map;
  const Item item = decode_item(p, blockIdx.x);
  if (item.empty) return;
  const KeyWalk<T, kHeadDim, Map> walk(p, item, smem);
  load_tile<T, kHeadDim, Map::kRows>(ptx::shared_address(smem), p, item, gather_tile<T>(p, p.q, item));
  __syncthreads();
  Forward<T, kHeadDim, kWarpTiles> forward(walk, item);
  while (!forward.run() && !forward.contain) forward.contain = true;
  forward.store();
}

void launch_forward(const BoxesParams& params, void* stream) {
  dispatch_kernel(params, [&](auto element, auto head_dim) {
    using T = decltype(element);
    const auto launch = [&](auto warp_tiles) {
      using Map = typename Forward<T, head_dim, warp_tiles>::Map;
      cuda::launch(forward_kernel<T, head_dim, warp_tiles>, params.num_items, kThreads, Map::kBytes, stream, params);
    };
    if constexpr (most_warp_tiles(sizeof(T), head_dim) == 2)
      if (params.warp_tiles == 2) return launch(std::integral_constant<int, 2>{});
    launch(std::integral_constant<int, 1>{});
  });
}

}  // namespace natten::cuda_portable
