// SPDX-License-Identifier: MIT
// Backward, any problem, the part of the keys: dk and dv, of the grid or of the additional keys.
//
// The tile holds keys; its box holds the queries that see them (the inverse windows are boxes too). Every query head of
// the tile's key head walks over the box: S = K Q^T, P = exp2(S - lse of the column), dV += P dO,
// dS = P * (V dO^T - delta of the column), dK += dS Q. Nobody else writes these rows: no atomics, always the same bits.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/fragments.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim>
struct DKDV {
  static constexpr int kBlockN = block_columns(sizeof(T), kHeadDim);
  static constexpr int kSlice = kHeadDim <= 128 ? kHeadDim : 128;  // channels of dk and dv that fit in registers
  using Map = SharedMap<T, kHeadDim, kBlockN, 2>;

  const BoxesParams& p;
  const Item& item;
  const ThreadRows rows;
  const Box box;
  const int blocks_per_head, num_blocks;
  const int first_chunk;  // of the slice
  unsigned char* smem;
  uint32_t shared;
  bool contain = false;  // see fragments.cuh

  float acc_dk[kSlice / 8][4], acc_dv[kSlice / 8][4];

  __device__ DKDV(const BoxesParams& params, const Item& work, unsigned char* memory, int slice)
      : p(params),
        item(work),
        rows(params, work),
        box(box_of(params, work)),
        blocks_per_head(detail::ceil_div(box.volume, kBlockN)),
        num_blocks(blocks_per_head * params.problem.heads_per_kv()),
        first_chunk(slice * kSlice / kPerChunk<T>),
        smem(memory),
        shared(ptx::shared_address(memory)) {}

  __device__ uint32_t* bits(int stage) const {
    return reinterpret_cast<uint32_t*>(smem + Map::kBits) + stage * kMaxCoords * Map::kWords;
  }
  __device__ int* terms(int stage) const { return reinterpret_cast<int*>(smem + Map::kTerms) + stage * kBlockN; }
  __device__ RowStats* stats(int stage) const {
    return reinterpret_cast<RowStats*>(smem + Map::kStats) + stage * kBlockN;
  }
  __device__ int head(int block) const { return item.head * p.problem.heads_per_kv() + block / blocks_per_head; }
  __device__ BiasTable<T> bias(int block) const {
    BiasTable<T> table(p, head(block));
    if (p.side == Side::extra_keys) table.table = nullptr;
    return table;
  }
  template <class E>
  __device__ Gather<E> queries(const Rows& tensor, int block) const {
    return p.side == Side::extra_keys ? gather_plain<E>(p, tensor, item, head(block), box.begin)
                                      : gather_group<E>(p, tensor, item, head(block), box.begin);
  }

  __device__ __forceinline__ void prefetch(int block) {
    if (block < num_blocks) {
      const int stage = block % 2, first = block % blocks_per_head * kBlockN;
      load_columns<T, kHeadDim, kBlockN>(shared + Map::columns(stage, 0), shared + Map::columns(stage, 1),
                                         queries<T>(p.q, block), queries<T>(p.dout, block), box, first);
      fill_bits<kBlockN>(bits(stage), reinterpret_cast<Span*>(smem + Map::kSpans), p.tile, box, first,
                         p.side == Side::extra_keys);
      const BiasTable<T> table = bias(block);
      if (table.table) fill_terms<kBlockN>(terms(stage), table, box, first);
      if (threadIdx.x < kBlockN) {
        const int flat = first + threadIdx.x;
        const bool exists = flat < box.volume;
        const Gather<RowStats> from = queries<RowStats>(Rows{p.stats, 1, false}, block);
        ptx::cp_async_8(ptx::shared_address(stats(stage) + threadIdx.x), exists ? from.at(box.split(flat)) : from.base,
                        exists);
      }
    }
    ptx::cp_async_commit();
  }

  /// acc_s: base-2 logits, become probabilities; acc_dp becomes dS.
  __device__ __forceinline__ void score_gradients(float (&acc_s)[kBlockN / 8][4], float (&acc_dp)[kBlockN / 8][4],
                                                  const RowMasks<kBlockN>& masks, const RowStats* columns) {
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowStats column = columns[8 * n + threadIdx.x % 4 * 2 + e % 2];
        const bool sees = masks.all || masks.sees(n, e);
        const float probability = ptx::exp2_approx(acc_s[n][e] - column.lse_log2);
        acc_s[n][e] = sees ? probability : 0;
        acc_dp[n][e] = sees ? probability * (acc_dp[n][e] - column.delta) : 0;
      }
  }

  __device__ __forceinline__ void run_block(int block) {
    const int stage = block % 2;
    const RowMasks<kBlockN> masks(bits(stage), rows);
    if (!masks.any && !contain) return;
    const uint32_t q = shared + Map::columns(stage, 0), dout = shared + Map::columns(stage, 1);
    float acc_s[kBlockN / 8][4], acc_dp[kBlockN / 8][4];
    multiply_transposed<T, kHeadDim, kBlockN>(acc_s, shared + Map::tile(0), q, p.q.dim, p.tf32);
    multiply_transposed<T, kHeadDim, kBlockN>(acc_dp, shared + Map::tile(1), dout, p.v.dim, p.tf32);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_s[n][e] *= p.scale_log2;
    const BiasTable<T> table = bias(block);
    if (table.table) {
      const int row_terms[2] = {table.term(sum(item.origin, rows.at[0])), table.term(sum(item.origin, rows.at[1]))};
      add_bias<T, kBlockN>(acc_s, table, terms(stage), row_terms, masks);
    }
    score_gradients(acc_s, acc_dp, masks, stats(stage));
    if (contain) {
      add_nonfinite<T, kHeadDim, kBlockN, kSlice>(acc_dv, dout, first_chunk, masks);
      __syncthreads();
      clear_nonfinite<T, kHeadDim, kBlockN>(q);
      clear_nonfinite<T, kHeadDim, kBlockN>(dout);
      __syncthreads();
    }
    multiply_add<T, kHeadDim, kBlockN, kSlice>(acc_dv, acc_s, dout, first_chunk, p.v.dim, p.tf32);
    multiply_add<T, kHeadDim, kBlockN, kSlice>(acc_dk, acc_dp, q, first_chunk, p.q.dim, p.tf32);
  }

  /// All blocks. Returns whether every sum of this block of threads is finite.
  __device__ __forceinline__ bool run() {
    clear(acc_dk), clear(acc_dv);
    prefetch(0);
    for (int block = 0; block < num_blocks; ++block) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      prefetch(block + 1);
      run_block(block);
    }
    ptx::cp_async_wait<0>();
    return !__syncthreads_or(!all_finite(acc_dk) || !all_finite(acc_dv));
  }

  __device__ __forceinline__ void store() {
    const float scale[2] = {float(p.problem.scale), float(p.problem.scale)}, one[2] = {1, 1};
    if (p.dk.view.ptr)
      store_rows<T, kHeadDim, kSlice>(acc_dk, scale, shared + Map::tile(0), p, item, gather_tile<T>(p, p.dk, item),
                                      first_chunk);
    if (p.dv.view.ptr)
      store_rows<T, kHeadDim, kSlice>(acc_dv, one, shared + Map::tile(1), p, item, gather_tile<T>(p, p.dv, item),
                                      first_chunk);
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim <= 32    ? 3
                                            : kHeadDim <= 128 ? 2
                                                              : 1) dkdv_kernel(const __grid_constant__ BoxesParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  using Map = typename DKDV<T, kHeadDim>::Map;
  const Item item = decode_item(p, blockIdx.x);
  if (item.empty) return;
  fill_spans(reinterpret_cast<Span*>(smem + Map::kSpans), p, item);
  const uint32_t shared = ptx::shared_address(smem);
  const bool extra = p.side == Side::extra_keys;
  load_tile<T, kHeadDim>(shared + Map::tile(0), p, item, gather_tile<T>(p, extra ? p.extra_k : p.k, item));
  load_tile<T, kHeadDim>(shared + Map::tile(1), p, item, gather_tile<T>(p, extra ? p.extra_v : p.v, item));
  __syncthreads();
  DKDV<T, kHeadDim> dkdv(p, item, smem, blockIdx.y);
  while (!dkdv.run() && !dkdv.contain) dkdv.contain = true;
  dkdv.store();
}

void launch_dkdv(const BoxesParams& params, void* stream) {
  dispatch_kernel(params, [&](auto element, auto head_dim) {
    using T = decltype(element);
    using Kernel = DKDV<T, head_dim>;
    const dim3 grid(params.num_items, head_dim / Kernel::kSlice);
    cuda::launch(dkdv_kernel<T, head_dim>, grid, kThreads, Kernel::Map::kBytes, stream, params);
  });
}

}  // namespace natten::cuda_portable
