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

  using Masks = RowMasks<1, kBlockN>;
  using Scores = float[1][kBlockN / 8][4];

  const BoxesParams& p;
  unsigned char* smem;
  const ThreadRows<1> rows;
  int blocks_per_head, num_blocks;
  const int first_chunk;  // of the slice
  uint32_t shared;
  bool contain = false;  // see fragments.cuh

  float acc_dk[1][kSlice / 8][4], acc_dv[1][kSlice / 8][4];

  /// Fills the tables of the item, which threads may read after the next barrier.
  __device__ DKDV(const BoxesParams& params, const Item& item, unsigned char* memory, int slice)
      : p(params),
        smem(memory),
        rows(params, item),
        first_chunk(slice * kSlice / kPerChunk<T>),
        shared(ptx::shared_address(memory)) {
    const Box box = box_of(p, item);
    blocks_per_head = detail::ceil_div(box.volume, kBlockN);
    num_blocks = blocks_per_head * p.problem.heads_per_kv();
    const int head = item.head * p.problem.heads_per_kv();
    const Gather<T> q = queries<T>(p.q, item, head, box.begin), dout = queries<T>(p.dout, item, head, box.begin);
    const Gather<RowStats> stats = queries<RowStats>(Rows{p.stats, 1, false}, item, head, box.begin);
    fill_tables<Map>(smem, p, Work<T>{item, box, {}, {q, dout}, {}, stats});
  }

  __device__ const Item& item() const { return Map::work(smem).item; }
  __device__ const Box& box() const { return Map::work(smem).box; }
  /// Among the heads that share the tile's; seldom more than one.
  __device__ int head(int block) const { return num_blocks == blocks_per_head ? 0 : block / blocks_per_head; }
  __device__ int first(int block) const { return (block - head(block) * blocks_per_head) * kBlockN; }
  __device__ bool has_bias() const { return p.problem.has_bias && p.side != Side::extra_keys; }
  template <class E>
  __device__ Gather<E> queries(const Rows& tensor, const Item& item, int head, Int3 begin) const {
    return p.side == Side::extra_keys ? gather_plain<E>(p, tensor, item, head, begin)
                                      : gather_group<E>(p, tensor, item, head, begin);
  }

  /// As in walk.cuh: lists a block's rows, and then loads them.
  __device__ __forceinline__ void list(int block) const {
    if (block >= num_blocks) return;
    list_columns<kBlockN>(Map::list(smem, block), Map::work(smem).in_box, box(), first(block),
                          head(block) * p.q.view.strides[4], head(block) * p.dout.view.strides[4]);
  }
  __device__ __forceinline__ void load(int block) const {
    if (block < num_blocks) {
      const Gather<T>* from = Map::work(smem).in_box;
      load_columns<T, kHeadDim, kBlockN>(shared + Map::columns(block % 2, 0), shared + Map::columns(block % 2, 1),
                                         Map::list(smem, block), p.q.dim, p.dout.dim, from[0].vector && from[1].vector);
      fill_bits<kBlockN>(Map::bits(smem, block), Map::spans(smem), p.tile, box(), first(block),
                         p.side == Side::extra_keys);
      if (has_bias()) fill_terms<kBlockN>(Map::terms(smem, block), BiasTable<T>(p, item().head), box(), first(block));
      load_stats(block);
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_stats(int block) const {
    if (threadIdx.x >= kBlockN) return;
    const int flat = first(block) + threadIdx.x;
    const bool exists = flat < box().volume;
    const RowStats* from = Map::work(smem).stats.at(box().split(exists ? flat : 0)) + head(block) * p.stats.strides[4];
    ptx::cp_async_8(ptx::shared_address(Map::stats(smem, block) + threadIdx.x), from, exists);
  }

  /// acc_s: base-2 logits, become probabilities; acc_dp becomes dS.
  __device__ __forceinline__ void score_gradients(Scores& acc_s, Scores& acc_dp, const Masks& masks,
                                                  const RowStats* columns) const {
    masks.apply(acc_s, -INFINITY);
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowStats column = columns[8 * n + threadIdx.x % 4 * 2 + e % 2];
        acc_s[0][n][e] = ptx::exp2_approx(acc_s[0][n][e] - column.lse_log2);
        acc_dp[0][n][e] = acc_s[0][n][e] * (acc_dp[0][n][e] - column.delta);
      }
    if (contain) masks.apply(acc_s, 0), masks.apply(acc_dp, 0);  // else what is not finite shows in the sums
  }

  __device__ __forceinline__ void run_block(int block) {
    const Masks masks(Map::bits(smem, block), rows);
    if (!masks.any && !contain) return;
    const uint32_t q = shared + Map::columns(block % 2, 0), dout = shared + Map::columns(block % 2, 1);
    Scores acc_s, acc_dp;
    multiply_transposed<T, kHeadDim, kBlockN, 1>(acc_s, shared + Map::tile(0), q, p.q.dim, p.tf32);
    multiply_transposed<T, kHeadDim, kBlockN, 1>(acc_dp, shared + Map::tile(1), dout, p.v.dim, p.tf32);
    scale(acc_s, p.scale_log2);
    if (has_bias()) {
      const int query_head = item().head * p.problem.heads_per_kv() + head(block);
      add_bias<T, 1, kBlockN>(acc_s, p, item(), query_head, Map::terms(smem, block), masks);
    }
    score_gradients(acc_s, acc_dp, masks, Map::stats(smem, block));
    if (contain) {
      add_nonfinite<T, kHeadDim, kBlockN, kSlice>(acc_dv, dout, first_chunk, masks);
      __syncthreads();
      clear_nonfinite<T, kHeadDim, kBlockN>(q);
      clear_nonfinite<T, kHeadDim, kBlockN>(dout);
      __syncthreads();
    }
    multiply_add<T, kHeadDim, kBlockN, kSlice, 1>(acc_dv, acc_s, dout, first_chunk, p.v.dim, p.tf32);
    multiply_add<T, kHeadDim, kBlockN, kSlice, 1>(acc_dk, acc_dp, q, first_chunk, p.q.dim, p.tf32);
  }

  /// All blocks. Returns whether every sum of this block of threads is finite.
  __device__ __forceinline__ bool run() {
    clear(acc_dk[0]), clear(acc_dv[0]);
    list(0);
    __syncthreads();
    load(0);
    list(1);
    for (int block = 0; block < num_blocks; ++block) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      load(block + 1);
      list(block + 2);
      run_block(block);
    }
    ptx::cp_async_wait<0>();
    return !__syncthreads_or(!all_finite(acc_dk) || !all_finite(acc_dv));
  }

  __device__ __forceinline__ void store() {
    const float scale[1][2] = {{float(p.problem.scale), float(p.problem.scale)}}, one[1][2] = {{1, 1}};
    const auto store = [&](const auto& acc, const auto& factor, int tile, const Rows& to) {
      if (to.view.ptr)
        store_rows<T, kHeadDim, kSlice, 1>(acc, factor, shared + Map::tile(tile), p, item(),
                                           gather_tile<T>(p, to, item()), first_chunk);
    };
    store(acc_dk, scale, 0, p.dk);
    store(acc_dv, one, 1, p.dv);
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
  const uint32_t shared = ptx::shared_address(smem);
  const bool extra = p.side == Side::extra_keys;
  load_tile<T, kHeadDim, Map::kRows>(shared + Map::tile(0), p, item, gather_tile<T>(p, extra ? p.extra_k : p.k, item));
  load_tile<T, kHeadDim, Map::kRows>(shared + Map::tile(1), p, item, gather_tile<T>(p, extra ? p.extra_v : p.v, item));
  DKDV<T, kHeadDim> dkdv(p, item, smem, blockIdx.y);
  __syncthreads();
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
