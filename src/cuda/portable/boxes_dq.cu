// SPDX-License-Identifier: MIT
// Backward, any problem, the part of the queries: dq, and the sums for the gradient of the bias.
//
// Per block of keys (walk.cuh): S = Q K^T, P = exp2(S - lse), dP = dO V^T, dS = P * (dP - delta), dQ += dS K.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/fragments.cuh"
#include "cuda/portable/walk.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim>
struct DQ {
  static constexpr int kBlockN = block_columns(sizeof(T), kHeadDim);
  using Map = SharedMap<T, kHeadDim, kBlockN, 2>;
  using Walk = KeyWalk<T, kHeadDim, Map>;
  using Masks = RowMasks<1, kBlockN>;
  using Scores = float[1][kBlockN / 8][4];
  static constexpr uint32_t kStagingBytes = kBlockM * kBlockN * 4;  // of dS, where there is a bias

  const BoxesParams& p;
  const Walk& walk;
  const ThreadRows<1> rows;
  uint32_t shared;
  float* bias_sums;      // of this warp
  bool contain = false;  // see fragments.cuh

  float acc_dq[1][kHeadDim / 8][4];
  float lse_log2[2], delta[2];

  __device__ DQ(const Walk& keys, const Item& item, float* sums)
      : p(keys.p), walk(keys), rows(p, item), shared(ptx::shared_address(keys.smem)), bias_sums(sums) {
    const Gather<RowStats> stats = gather_tile<RowStats>(p, Rows{p.stats, 1, false}, item);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowStats s = *stats.at(tile_row(p, item, thread_row<1>(0, i)));
      lse_log2[i] = s.lse_log2, delta[i] = s.delta;
    }
  }

  /// acc_s: base-2 logits, becomes dS.
  __device__ __forceinline__ void score_gradients(Scores& acc_s, const Scores& acc_dp, const Masks& masks) {
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float probability = ptx::exp2_approx(acc_s[0][n][e] - lse_log2[e / 2]);
        acc_s[0][n][e] = probability * (acc_dp[0][n][e] - delta[e / 2]);
      }
    masks.apply(acc_s, 0);
  }

  /// Adds dS to the table of this warp. Columns of one row meet different entries, so rows go one after the other:
  /// no atomics, and always the same order.
  __device__ __forceinline__ void add_to_bias(const Scores& acc_ds, int first) {
    const Item& item = walk.item();
    const Box& box = walk.box(0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* staging = reinterpret_cast<float*>(walk.smem + Map::kBytes) + warp * 16 * kBlockN;
    const Axis* a = p.problem.axes;
    const int64_t x = 1, y = 2 * a[2].window - 1, z = y * (2 * a[1].window - 1);
    const int origin = bias_index(a[0], 0, 0) * z + bias_index(a[1], 0, 0) * y + bias_index(a[2], 0, 0) * x;
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staging[(lane / 4 + e / 2 * 8) * kBlockN + 8 * n + lane % 4 * 2 + e % 2] = acc_ds[0][n][e];
    int term[kBlockN / 32];
#pragma unroll
    for (int w = 0; w < kBlockN / 32; ++w)
      term[w] = origin + bias_term(sum(box.begin, box.split(first + 32 * w + lane)), z, y, x);
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      __syncwarp();
      if (!is_row(p, item, warp * 16 + row)) continue;
      const int row_term = bias_term(sum(item.origin, tile_row(p, item, warp * 16 + row)), z, y, x);
#pragma unroll
      for (int w = 0; w < kBlockN / 32; ++w) {
        const float gradient = staging[row * kBlockN + 32 * w + lane];
        if (gradient != 0) bias_sums[int(uint32_t(term[w]) - uint32_t(row_term))] += gradient;
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run_block(int block) {
    const Masks masks(Map::bits(walk.smem, block), rows);
    if (!masks.any && !contain) return;
    const uint32_t k = shared + Map::columns(block % 2, 0), v = shared + Map::columns(block % 2, 1);
    Scores acc_s, acc_dp;
    multiply_transposed<T, kHeadDim, kBlockN, 1>(acc_s, shared + Map::tile(0), k, p.q.dim, p.tf32);
    multiply_transposed<T, kHeadDim, kBlockN, 1>(acc_dp, shared + Map::tile(1), v, p.v.dim, p.tf32);
    scale(acc_s, p.scale_log2);
    const bool in_box = walk.in_box(block);
    if (p.problem.has_bias && in_box)
      add_bias<T, 1, kBlockN>(acc_s, p, walk.item(), walk.item().head, Map::terms(walk.smem, block), masks);
    score_gradients(acc_s, acc_dp, masks);
    if (bias_sums && in_box && !contain) add_to_bias(acc_s, block * kBlockN);
    if (contain) {
      __syncthreads();
      clear_nonfinite<T, kHeadDim, kBlockN>(k);
      __syncthreads();
    }
    multiply_add<T, kHeadDim, kBlockN, kHeadDim, 1>(acc_dq, acc_s, k, 0, p.q.dim, p.tf32);
  }

  /// All blocks. Returns whether every sum of this block of threads is finite.
  __device__ __forceinline__ bool run() {
    clear(acc_dq[0]);
    walk.start();
    for (int block = 0; block < walk.num_blocks; ++block) {
      walk.proceed_to(block);
      run_block(block);
    }
    ptx::cp_async_wait<0>();
    return !__syncthreads_or(!all_finite(acc_dq));
  }

  __device__ __forceinline__ void store() {
    if (!p.dq.view.ptr) return;
    const float factor[1][2] = {{float(p.problem.scale), float(p.problem.scale)}};
    const Item& item = walk.item();
    store_rows<T, kHeadDim, kHeadDim, 1>(acc_dq, factor, shared, p, item, gather_tile<T>(p, p.dq, item), 0);
  }
};

template <class T, int kHeadDim>
__device__ void run_item(const BoxesParams& p, int index, unsigned char* smem, float* bias_sums) {
  using Map = typename DQ<T, kHeadDim>::Map;
  const Item item = decode_item(p, index);
  if (item.empty) return;
  __syncthreads();  // the item before may still use shared memory
  const typename DQ<T, kHeadDim>::Walk walk(p, item, smem);
  const uint32_t shared = ptx::shared_address(smem);
  load_tile<T, kHeadDim, Map::kRows>(shared + Map::tile(0), p, item, gather_tile<T>(p, p.q, item));
  load_tile<T, kHeadDim, Map::kRows>(shared + Map::tile(1), p, item, gather_tile<T>(p, p.dout, item));
  __syncthreads();
  DQ<T, kHeadDim> dq(walk, item, bias_sums);
  while (!dq.run() && !dq.contain) dq.contain = true;
  dq.store();
}

/// One item per block of threads; or, where sums for the bias are wanted, one piece of one head's items, so that each
/// warp adds to a table of its own.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 32    ? 3
                                            : kHeadDim <= 128 ? 2
                                                              : 1) dq_kernel(const __grid_constant__ BoxesParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int heads = p.problem.heads, of_head = p.num_items / heads, of_sample = int(of_head / p.problem.batch);
  float* sums = nullptr;
  int head = 0, first = blockIdx.x, last = first + 1;
  if (p.bias_sums) {
    sums = p.bias_sums + (int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32) * p.bias_entries;
    for (int i = threadIdx.x % 32; i < p.bias_entries; i += 32) sums[i] = 0;
    __syncwarp();
    head = blockIdx.x / p.bias_pieces;
    const int piece = blockIdx.x % p.bias_pieces;
    first = int(int64_t{of_head} * piece / p.bias_pieces), last = int(int64_t{of_head} * (piece + 1) / p.bias_pieces);
  }
  for (int i = first; i < last; ++i) {
    const int item = sums ? (i / of_sample * heads + head) * of_sample + i % of_sample : i;
    run_item<T, kHeadDim>(p, item, smem, sums);
  }
}

void launch_dq(const BoxesParams& params, void* stream) {
  dispatch_kernel(params, [&](auto element, auto head_dim) {
    using T = decltype(element);
    using Kernel = DQ<T, head_dim>;
    const bool bias = params.bias_sums;
    const int blocks = bias ? params.problem.heads * params.bias_pieces : params.num_items;
    const uint32_t shared_bytes = Kernel::Map::kBytes + (bias ? Kernel::kStagingBytes : 0);
    cuda::launch(dq_kernel<T, head_dim>, blocks, kThreads, shared_bytes, stream, params);
  });
}

}  // namespace natten::cuda_portable
