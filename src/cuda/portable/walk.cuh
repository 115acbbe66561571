// SPDX-License-Identifier: MIT
// The walk of a tile of queries over its keys, kBlockN at a time: those of its box, then the additional ones.
//
// While a block of keys is worked on, the rows of the next one are on their way, and the rows of the one after that are
// listed: their places need a few dozen instructions each, which a thread does for one row and not for all chunks of
// it. One barrier per block: it says that the block has arrived, that a list is complete, and that everybody has left
// the stage that is loaded next.
#pragma once
#include "cuda/portable/columns.cuh"

namespace natten::cuda_portable {

template <class T, int kHeadDim, class Map>
struct KeyWalk {
  const BoxesParams& p;
  unsigned char* smem;
  int box_blocks, num_blocks;

  /// Fills the tables of the item, which threads may read after the next barrier.
  __device__ __forceinline__ KeyWalk(const BoxesParams& params, const Item& item, unsigned char* memory)
      : p(params), smem(memory) {
    const int head = item.head / p.problem.heads_per_kv();
    const Box box = box_of(p, item), extra({0, 0, 0}, {1, 1, p.samples[item.sample].extra_keys});
    box_blocks = detail::ceil_div(box.volume, Map::kBlockN);
    num_blocks = box_blocks + detail::ceil_div(extra.volume, Map::kBlockN);
    const Gather<T> k = gather_group<T>(p, p.k, item, head, box.begin),
                    v = gather_group<T>(p, p.v, item, head, box.begin);
    const Gather<T> extra_k = gather_plain<T>(p, p.extra_k, item, head, extra.begin);
    const Gather<T> extra_v = gather_plain<T>(p, p.extra_v, item, head, extra.begin);
    fill_tables<Map>(smem, p, Work<T>{item, box, extra, {k, v}, {extra_k, extra_v}, {}});
  }

  __device__ bool in_box(int block) const { return block < box_blocks; }
  __device__ const Item& item() const { return Map::work(smem).item; }
  __device__ const Box& box(int block) const { return in_box(block) ? Map::work(smem).box : Map::work(smem).extra; }
  /// Of the block's columns in its box.
  __device__ int first(int block) const { return (in_box(block) ? block : block - box_blocks) * Map::kBlockN; }
  __device__ const Gather<T>* gathers(int block) const {
    return in_box(block) ? Map::work(smem).in_box : Map::work(smem).among_extra;
  }

  __device__ __forceinline__ void start() const {
    list(0);
    __syncthreads();
    load(0);
    list(1);
  }
  /// Waits for a block, which may then be used until the next call.
  __device__ __forceinline__ void proceed_to(int block) const {
    ptx::cp_async_wait<0>();
    __syncthreads();
    load(block + 1);
    list(block + 2);
  }

 private:
  __device__ __forceinline__ void list(int block) const {
    if (block >= num_blocks) return;
    list_columns<Map::kBlockN>(Map::list(smem, block), gathers(block), box(block), first(block));
  }
  __device__ __forceinline__ void load(int block) const {
    if (block < num_blocks) {
      const Gather<T>* from = gathers(block);
      const uint32_t shared = ptx::shared_address(smem);
      load_columns<T, kHeadDim, Map::kBlockN>(shared + Map::columns(block % 2, 0), shared + Map::columns(block % 2, 1),
                                              Map::list(smem, block), p.q.dim, p.v.dim,
                                              from[0].vector && from[1].vector);
      fill_bits<Map::kBlockN>(Map::bits(smem, block), Map::spans(smem), p.tile, box(block), first(block),
                              !in_box(block));
      if (p.problem.has_bias && in_box(block))
        fill_terms<Map::kBlockN>(Map::terms(smem, block), BiasTable<T>(p, item().head), box(block), first(block));
    }
    ptx::cp_async_commit();
  }
};

}  // namespace natten::cuda_portable
