// SPDX-License-Identifier: MIT
// Backward, any problem, the part of the queries: dq, and the sums for the gradient of the bias.
//
// Per block of keys: S = Q K^T, P = exp2(S - lse), dP = dO V^T, dS = P * (dP - delta), dQ += dS K. The same walk over
// the key box and the additional keys as in boxes_forward.cu, which explains the pipeline.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/fragments.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim>
struct DQ {
  static constexpr int kBlockN = block_columns(sizeof(T), kHeadDim);
  using Map = SharedMap<T, kHeadDim, kBlockN, 2>;
  static constexpr uint32_t kStagingBytes = kBlockM * kBlockN * 4;  // of dS, where there is a bias

  const BoxesParams& p;
  const Item& item;
  const ThreadRows rows;
  const BiasTable<T> bias;
  const Box box, extra;
  const int box_blocks, num_blocks;
  unsigned char* smem;
  uint32_t shared;
  float* bias_sums;      // of this warp
  bool contain = false;  // see fragments.cuh

  float acc_dq[kHeadDim / 8][4];
  float lse_log2[2], delta[2];

  __device__ DQ(const BoxesParams& params, const Item& work, unsigned char* memory, float* sums)
      : p(params),
        item(work),
        rows(params, work),
        bias(params, work.head),
        box(box_of(params, work)),
        extra({0, 0, 0}, {1, 1, params.samples[work.sample].extra_keys}),
        box_blocks(detail::ceil_div(box.volume, kBlockN)),
        num_blocks(box_blocks + detail::ceil_div(extra.volume, kBlockN)),
        smem(memory),
        shared(ptx::shared_address(memory)),
        bias_sums(sums) {
    const Gather<RowStats> stats = gather_tile<RowStats>(p, Rows{p.stats, 1, false}, item);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowStats s = *stats.at(rows.at[i]);
      lse_log2[i] = s.lse_log2, delta[i] = s.delta;
    }
  }

  __device__ uint32_t* bits(int stage) const {
    return reinterpret_cast<uint32_t*>(smem + Map::kBits) + stage * kMaxCoords * Map::kWords;
  }
  __device__ int* terms(int stage) const { return reinterpret_cast<int*>(smem + Map::kTerms) + stage * kBlockN; }

  __device__ __forceinline__ void prefetch(int block) {
    if (block < num_blocks) {
      const int stage = block % 2, head_kv = item.head / p.problem.heads_per_kv();
      const bool in_box = block < box_blocks;
      const Box from = in_box ? box : extra;
      const int first = (in_box ? block : block - box_blocks) * kBlockN;
      const Gather<T> k = in_box ? gather_group<T>(p, p.k, item, head_kv, box.begin)
                                 : gather_plain<T>(p, p.extra_k, item, head_kv, {0, 0, 0});
      const Gather<T> v = in_box ? gather_group<T>(p, p.v, item, head_kv, box.begin)
                                 : gather_plain<T>(p, p.extra_v, item, head_kv, {0, 0, 0});
      load_columns<T, kHeadDim, kBlockN>(shared + Map::columns(stage, 0), shared + Map::columns(stage, 1), k, v, from,
                                         first);
      fill_bits<kBlockN>(bits(stage), reinterpret_cast<Span*>(smem + Map::kSpans), p.tile, from, first, !in_box);
      if (bias.table) fill_terms<kBlockN>(terms(stage), bias, from, first);
    }
    ptx::cp_async_commit();
  }

  /// acc_s: base-2 logits, becomes dS.
  __device__ __forceinline__ void score_gradients(float (&acc_s)[kBlockN / 8][4], const float (&acc_dp)[kBlockN / 8][4],
                                                  const RowMasks<kBlockN>& masks) {
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float probability = ptx::exp2_approx(acc_s[n][e] - lse_log2[e / 2]);
        const float gradient = probability * (acc_dp[n][e] - delta[e / 2]);
        acc_s[n][e] = masks.all || masks.sees(n, e) ? gradient : 0;
      }
  }

  /// Adds dS to the table of this warp. Columns of one row meet different entries, so rows go one after the other:
  /// no atomics, and always the same order.
  __device__ __forceinline__ void add_to_bias(const float (&acc_ds)[kBlockN / 8][4], int first) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* staging = reinterpret_cast<float*>(smem + Map::kBytes) + warp * 16 * kBlockN;
    const Axis* a = p.problem.axes;
    const int64_t x = 1, y = 2 * a[2].window - 1, z = y * (2 * a[1].window - 1);
    const int origin = bias_index(a[0], 0, 0) * z + bias_index(a[1], 0, 0) * y + bias_index(a[2], 0, 0) * x;
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staging[(lane / 4 + e / 2 * 8) * kBlockN + 8 * n + lane % 4 * 2 + e % 2] = acc_ds[n][e];
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
    const int stage = block % 2;
    const RowMasks<kBlockN> masks(bits(stage), rows);
    if (!masks.any && !contain) return;
    const uint32_t k = shared + Map::columns(stage, 0), v = shared + Map::columns(stage, 1);
    float acc_s[kBlockN / 8][4], acc_dp[kBlockN / 8][4];
    multiply_transposed<T, kHeadDim, kBlockN>(acc_s, shared + Map::tile(0), k, p.q.dim, p.tf32);
    multiply_transposed<T, kHeadDim, kBlockN>(acc_dp, shared + Map::tile(1), v, p.v.dim, p.tf32);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_s[n][e] *= p.scale_log2;
    const bool in_box = block < box_blocks;
    if (bias.table && in_box) {
      const int row_terms[2] = {bias.term(sum(item.origin, rows.at[0])), bias.term(sum(item.origin, rows.at[1]))};
      add_bias<T, kBlockN>(acc_s, bias, terms(stage), row_terms, masks);
    }
    score_gradients(acc_s, acc_dp, masks);
    if (bias_sums && in_box && !contain) add_to_bias(acc_s, block * kBlockN);
    if (contain) {
      __syncthreads();
      clear_nonfinite<T, kHeadDim, kBlockN>(k);
      __syncthreads();
    }
    multiply_add<T, kHeadDim, kBlockN, kHeadDim>(acc_dq, acc_s, k, 0, p.q.dim, p.tf32);
  }

  /// All blocks. Returns whether every sum of this block of threads is finite.
  __device__ __forceinline__ bool run() {
    clear(acc_dq);
    prefetch(0);
    for (int block = 0; block < num_blocks; ++block) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      prefetch(block + 1);
      run_block(block);
    }
    ptx::cp_async_wait<0>();
    return !__syncthreads_or(!all_finite(acc_dq));
  }

  __device__ __forceinline__ void store() {
    if (!p.dq.view.ptr) return;
    const float factor[2] = {float(p.problem.scale), float(p.problem.scale)};
    store_rows<T, kHeadDim, kHeadDim>(acc_dq, factor, shared, p, item, gather_tile<T>(p, p.dq, item), 0);
  }
};

template <class T, int kHeadDim>
__device__ void run_item(const BoxesParams& p, int index, unsigned char* smem, float* bias_sums) {
  using Map = typename DQ<T, kHeadDim>::Map;
  const Item item = decode_item(p, index);
  if (item.empty) return;
  __syncthreads();  // the item before may still use shared memory
  fill_spans(reinterpret_cast<Span*>(smem + Map::kSpans), p, item);
  const uint32_t shared = ptx::shared_address(smem);
  load_tile<T, kHeadDim>(shared + Map::tile(0), p, item, gather_tile<T>(p, p.q, item));
  load_tile<T, kHeadDim>(shared + Map::tile(1), p, item, gather_tile<T>(p, p.dout, item));
  __syncthreads();
  DQ<T, kHeadDim> dq(p, item, smem, bias_sums);
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
