// SPDX-License-Identifier: MIT
// Forward, any problem: online softmax over the blocks of a tile's key box, then over the additional keys.
//
// Per block: wait for its rows, start loading the next block's, S = Q K^T, mask, softmax, O += P V.
// One barrier per block: it says that the block has arrived and that everybody has left the stage loaded next.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/fragments.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim>
struct Forward {
  static constexpr int kBlockN = block_columns(sizeof(T), kHeadDim);
  using Map = SharedMap<T, kHeadDim, kBlockN, 1>;

  const BoxesParams& p;
  const Item& item;
  const ThreadRows rows;
  const BiasTable<T> bias;
  const Box box, extra;
  const int box_blocks, num_blocks;
  unsigned char* smem;
  uint32_t shared;
  bool contain = false;  // see fragments.cuh

  float acc_o[kHeadDim / 8][4];
  float row_max[2], row_sum[2];  // of base-2 logits; row_sum: this thread's columns

  __device__ Forward(const BoxesParams& params, const Item& work, unsigned char* memory)
      : p(params),
        item(work),
        rows(params, work),
        bias(params, work.head),
        box(box_of(params, work)),
        extra({0, 0, 0}, {1, 1, params.samples[work.sample].extra_keys}),
        box_blocks(detail::ceil_div(box.volume, kBlockN)),
        num_blocks(box_blocks + detail::ceil_div(extra.volume, kBlockN)),
        smem(memory),
        shared(ptx::shared_address(memory)) {}

  __device__ uint32_t* bits(int stage) const {
    return reinterpret_cast<uint32_t*>(smem + Map::kBits) + stage * kMaxCoords * Map::kWords;
  }
  __device__ int* terms(int stage) const { return reinterpret_cast<int*>(smem + Map::kTerms) + stage * kBlockN; }

  /// Starts the loads of a block and fills its tables.
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

  /// Masked logits to probabilities; the sums so far are scaled to the new maximum.
  __device__ __forceinline__ void softmax(float (&acc_s)[kBlockN / 8][4], const RowMasks<kBlockN>& masks) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = row_max[i];
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          if (!masks.all && !masks.sees(n, e)) acc_s[n][e] = -INFINITY;
          maximum = fmaxf(maximum, acc_s[n][e]);
        }
      maximum = quad_max(maximum);
      const float reference = maximum == -INFINITY ? 0.0f : maximum;  // so that a row without keys stays 0
      const float rescale = ptx::exp2_approx(row_max[i] - reference);
      row_max[i] = maximum;
      row_sum[i] *= rescale;
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) {
          acc_s[n][e] = ptx::exp2_approx(acc_s[n][e] - reference);
          row_sum[i] += acc_s[n][e];
        }
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
        for (int e = 2 * i; e < 2 * i + 2; ++e) acc_o[n][e] *= rescale;
    }
  }

  __device__ __forceinline__ void run_block(int block) {
    const int stage = block % 2;
    const RowMasks<kBlockN> masks(bits(stage), rows);
    if (!masks.any && !contain) return;
    float acc_s[kBlockN / 8][4];
    multiply_transposed<T, kHeadDim, kBlockN>(acc_s, shared, shared + Map::columns(stage, 0), p.q.dim, p.tf32);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_s[n][e] *= p.scale_log2;
    if (bias.table && block < box_blocks) {
      const int row_terms[2] = {bias.term(sum(item.origin, rows.at[0])), bias.term(sum(item.origin, rows.at[1]))};
      add_bias<T, kBlockN>(acc_s, bias, terms(stage), row_terms, masks);
    }
    softmax(acc_s, masks);
    const uint32_t v = shared + Map::columns(stage, 1);
    if (contain) {
      add_nonfinite<T, kHeadDim, kBlockN, kHeadDim>(acc_o, v, 0, masks);
      __syncthreads();
      clear_nonfinite<T, kHeadDim, kBlockN>(v);
      __syncthreads();
    }
    multiply_add<T, kHeadDim, kBlockN, kHeadDim>(acc_o, acc_s, v, 0, p.v.dim, p.tf32);
  }

  /// All blocks. Returns whether every sum of this block of threads is finite.
  __device__ __forceinline__ bool run() {
    clear(acc_o);
    row_max[0] = row_max[1] = -INFINITY, row_sum[0] = row_sum[1] = 0;
    prefetch(0);
    for (int block = 0; block < num_blocks; ++block) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      prefetch(block + 1);
      run_block(block);
    }
    ptx::cp_async_wait<0>();  // of the tile, where there was no block
    row_sum[0] = quad_sum(row_sum[0]), row_sum[1] = quad_sum(row_sum[1]);
    return !__syncthreads_or(!all_finite(acc_o));
  }

  __device__ __forceinline__ void store() {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = row_sum[i] == 0 ? 0.0f : 1.0f / row_sum[i];
    store_rows<T, kHeadDim, kHeadDim>(acc_o, factor, shared, p, item, gather_tile<T>(p, p.out, item), 0);
    if (!p.lse.ptr || threadIdx.x % 4 != 0) return;
    const Gather<float> lse = gather_tile<float>(p, Rows{p.lse, 1, false}, item);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (is_row(p, item, rows.row[i]))
        *lse.at(rows.at[i]) = row_sum[i] == 0 ? -INFINITY : 0.693147180559945f * (row_max[i] + log2f(row_sum[i]));
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 32    ? 4
                                            : kHeadDim <= 64  ? 3
                                            : kHeadDim <= 128 ? 2
                                                              : 1)
    forward_kernel(const __grid_constant__ BoxesParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  using Map = typename Forward<T, kHeadDim>::Map;
  const Item item = decode_item(p, blockIdx.x);
  if (item.empty) return;
  fill_spans(reinterpret_cast<Span*>(smem + Map::kSpans), p, item);
  load_tile<T, kHeadDim>(ptx::shared_address(smem), p, item, gather_tile<T>(p, p.q, item));
  __syncthreads();
  Forward<T, kHeadDim> forward(p, item, smem);
  while (!forward.run() && !forward.contain) forward.contain = true;
  forward.store();
}

void launch_forward(const BoxesParams& params, void* stream) {
  dispatch_kernel(params, [&](auto element, auto head_dim) {
    using T = decltype(element);
    using Map = typename Forward<T, head_dim>::Map;
    cuda::launch(forward_kernel<T, head_dim>, params.num_items, kThreads, Map::kBytes, stream, params);
  });
}

}  // namespace natten::cuda_portable
