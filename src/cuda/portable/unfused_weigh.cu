// SPDX-License-Identifier: MIT
// Unfused: sums over the other side, weighted by the attention tensor. X = scale * W Y where the tile holds queries;
// Y = scale * W^T X where it holds keys and its box the queries that see them (inverse windows, so no atomics).
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/unfused.cuh"

namespace natten::cuda_portable {

/// What a tile sums over, one after the other: the grid's keys and the additional ones; or the heads of queries.
struct Sources {
  int first, last;

  __device__ __forceinline__ explicit Sources(const UnfusedParams& p) : first(0), last(p.boxes.problem.heads_per_kv()) {
    if (p.boxes.side != Side::queries) return;
    first = p.window_slots > 0 ? 0 : 1, last = p.boxes.problem.extra_keys > 0 ? 2 : 1;
  }
};

/// One of them. An address of a weight is a sum of what the tile's row adds and what each axis of the other side adds,
/// although windows shift: of the side that holds queries both the token and where its window begins.
template <class T>
struct Source {
  const UnfusedParams& p;
  const Block<T>& block;
  const bool extra, of_keys;  // the other side: additional keys; or keys, not queries
  Field field;
  Sight sight;
  Tokens<T> from;
  const T* of_row[2];

  __device__ __forceinline__ Source(const UnfusedParams& params, const Block<T>& shared, const Octets<T>& rows,
                                    const Span* spans, int number)
      : p(params),
        block(shared),
        extra(params.boxes.side == Side::queries && number == 1),
        of_keys(params.boxes.side == Side::queries),
        field(shared.field),
        sight(Int3{0, 0, 0}),
        from(of_keys ? (extra ? shared.extra : shared.keys) : shared.queries) {
    const Side side = p.boxes.side;
    const bool plain = extra || side == Side::extra_keys;
    if (plain) field = Field({0, 0, 0}, extra ? Int3{1, 1, p.boxes.problem.extra_keys} : p.boxes.problem.grid());
    sight = plain ? Sight(field.size) : Sight(rows, spans, field.begin.x);
    const T* weights = block.weights.base;
    if (!of_keys) from.base += number * p.boxes.q.view.strides[4], weights += number * p.weights.strides[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Int3 at = rows.at(i);
      const int slot = at.z * p.slot_strides[0] + at.y * p.slot_strides[1] + at.x;
      of_row[i] =
          weights + (side == Side::queries ? block.weights.at(at) - block.weights.base +
                                                 (extra ? p.window_slots : -Slots<T>::before_window(p, sight, i))
                     : side == Side::keys ? int64_t{slot}
                                          : int64_t{p.window_slots} + at.x);
    }
  }
  /// `at` is relative to the field.
  __device__ __forceinline__ int64_t of_axis(int axis, int at) const {
    if (of_keys) return int64_t{at} * p.slot_strides[axis];
    const int position = component(field.begin, axis) + at;
    const Tokens<T>& w = block.weights;
    const int64_t token = int64_t{position} * (axis == 0 ? w.z : axis == 1 ? w.y : w.x);
    if (p.boxes.side == Side::extra_keys) return token;
    return token - int64_t{seen_from<false>(block.item.group[axis], position).begin} * p.slot_strides[axis];
  }
};

template <class T, int kHeadDim, bool kStaged>
struct Weigh {
  static constexpr int kKeyBytes = kHeadDim * 2, kRows = kStaged ? 2 : 1;
  static constexpr bool kClearBehind = true;

  const UnfusedParams& p;
  const Octets<T>& rows_of;
  const Sight& sight;
  float (&acc)[kHeadDim / 8][4];
  const Source<T>* source = nullptr;  // where weights are read in place
  uint32_t staged[2] = {0, 0};        // otherwise, of the lane's rows: the slot of the field's first position

  uint32_t sees[2] = {0, 0};  // see column_bits
  int first_column = 0;
  int64_t column[4] = {};   // what the lane's columns add to an address
  uint32_t at[2] = {0, 0};  // of the row at hand: `staged`, moved to this lane's first column
  int64_t of_plane = 0;     // what its plane adds to an address
  int y = 0;

  __device__ __forceinline__ uint32_t columns(int first, int end, int in_chunk) {
    const int lane = threadIdx.x % 32, key = in_chunk + lane % 16;
    first_column = first + lane % 4 * 2;
    column_bits(sees, p, rows_of, sight.x, first, end);
    if constexpr (!kStaged) {
#pragma unroll
      for (int c = 0; c < 4; ++c)  // columns that nobody sees need no address, but one that exists
        column[c] = source->of_axis(2, detail::min(first_column + c / 2 * 8 + c % 2, source->field.size.x - 1));
    }
    return key * kKeyBytes + ((lane / 16 ^ chunk_swizzle<kHeadDim>(key)) << 4);
  }

  __device__ __forceinline__ void start(int first_z, int first_y) {
    y = first_y;
    if (!kStaged) of_plane = source->of_axis(0, first_z);
    const int slot = first_z * p.slot_strides[0] + y * p.slot_strides[1] + first_column;
    at[0] = staged[0] + slot * 2, at[1] = staged[1] + slot * 2;
  }

  __device__ __forceinline__ void rows(const uint32_t (&address)[kRows], const bool (&sees_row)[kRows][2]) {
    uint32_t weight[kRows][4], value[kRows][kHeadDim / 16][4];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      load_transposed<kHeadDim>(value[r], address[r]), load_weights(weight[r], sees_row[r]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) multiply_values<T, kHeadDim>(acc, weight[r], value[r]);
  }

 private:
  /// Of the next row.
  __device__ __forceinline__ void load_weights(uint32_t (&weight)[4], const bool (&sees_row)[2]) {
    const int64_t of_row = kStaged ? 0 : of_plane + source->of_axis(1, y);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t seen = sees_row[i] ? sees[i] : 0;
      uint32_t bits[4] = {0, 0, 0, 0};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (has_column(seen, c))
          bits[c] = kStaged ? ptx::load_shared_16(at[i] + (c / 2 * 8 + c % 2) * 2)
                            : uint32_t{source->of_row[i][of_row + column[c]].bits};
      weight[i] = bits[0] + (bits[1] << 16), weight[2 + i] = bits[2] + (bits[3] << 16);  // one instruction each
      at[i] += p.slot_strides[1] * 2;
    }
    ++y;
  }
};

/// Channel `c` of the sum for this lane's row of octet i, over exactly what it sees.
template <class T>
__device__ float sum_exactly(const Source<T>& source, int i, int c) {
  const Sight& s = source.sight;
  const Int3 begin = source.field.begin;
  float sum = 0;
  for (int z = s.z[i].begin; z < s.z[i].end; ++z)
    for (int y = s.y[i].begin; y < s.y[i].end; ++y)
      for (int x = s.x[i].begin; x < s.x[i].end; ++x) {
        const T weight = source.of_row[i][source.of_axis(0, z) + source.of_axis(1, y) + source.of_axis(2, x)];
        const T* row = source.from.at({begin.z + z, begin.y + y, begin.x + x});
        sum = fmaf(to_real(weight), to_real(row[c]), sum);
      }
  return sum;
}

/// A pair's rows, by plain sums: where a NaN or infinity would reach rows that do not see it, as 0 * NaN.
/// NOTE: a function of its own, so that it costs the other tiles no registers.
template <class T>
__device__ __noinline__ void weigh_exactly(const UnfusedParams& p, const Block<T>& block, const Span* spans, int pair,
                                           Span channels) {
  const Octets<T> rows(block, pair);
  const Tokens<T>& to = block.side(p.boxes.side);
  const Sources sources(p);
  const int end = detail::min(channels.end, to.dim);
  for (int next = channels.begin; next < end; next += 4) {
    const int c = detail::min(next + int(threadIdx.x % 4), end - 1);
    float sum[2] = {0, 0};
    for (int number = sources.first; number < sources.last; ++number) {
      const Source<T> source(p, block, rows, spans, number);
      for (int i = 0; i < 2; ++i) sum[i] += sum_exactly(source, i, c);
    }
    for (int i = 0; i < 2; ++i)
      if (rows.exists[i]) from_real(sum[i] * p.scale, rows.row(i, to.x)[c]);
  }
}

template <class T, int kHeadDim>
__device__ __forceinline__ void store_sums(const UnfusedParams& p, const Tokens<T> to, const Octets<T>& rows,
                                           const float (&acc)[kHeadDim / 8][4], int first) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T* row = rows.row(i, to.x) + first + stored_channel(t);
    const int left = to.dim - first - stored_channel(t);  // channels from there on
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t a = ptx::pack<T>(acc[n][2 * i] * p.scale, acc[n][2 * i + 1] * p.scale);
      uint32_t b = ptx::pack<T>(acc[n + 1][2 * i] * p.scale, acc[n + 1][2 * i + 1] * p.scale);
      pairs_to_fours(a, b, t);
      if (!rows.exists[i] || n * 8 >= left) continue;
      if (to.vector) {
        ptx::store_global_64(row + n * 8, a, b);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (n * 8 + e < left) row[n * 8 + e].bits = uint16_t((e < 2 ? a : b) >> (e % 2 * 16));
    }
  }
}

/// A pair's sums to memory, unless they have to be computed again.
template <class T, int kHeadDim>
__device__ __forceinline__ void finish(const UnfusedParams& p, const Block<T>& block, const Octets<T>& rows,
                                       const Span* spans, int pair, const float (&acc)[kHeadDim / 8][4]) {
  const int first = blockIdx.y * kHeadDim;
  if (!__all_sync(~0u, finite_witness(acc, 0) == 0 && finite_witness(acc, 1) == 0))
    weigh_exactly<T>(p, block, spans, pair, {first, first + kHeadDim});
  else
    store_sums<T, kHeadDim>(p, block.side(p.boxes.side), rows, acc, first);
}

/// The tile's pairs of this warp, where field and slots pass through shared memory.
template <class T, int kHeadDim>
__device__ __forceinline__ void weigh_staged(const UnfusedParams& p, Block<T>& block, const Field& field,
                                             unsigned char* smem) {
  using Layout = Map<T, kHeadDim>;
  const Span* spans = reinterpret_cast<const Span*>(smem + Layout::kSpans);
  const uint32_t shared = ptx::shared_address(smem), keys = shared + Layout::kKeys;
  const int warp = threadIdx.x / 32;
  load_field<T, kHeadDim>(keys, block.keys, field, blockIdx.y * (kHeadDim / 8));
  clear_behind<kHeadDim * 2>(keys, whole(field));
  const uint32_t staged = shared + Layout::slots(p, warp);
  const auto load_slots = [&](int pair) {
    if (pair < p.num_pairs) Slots<T>(p, block, Octets<T>(block, pair), staged).load();
    ptx::cp_async_commit();
  };
  load_slots(warp);
#pragma unroll 1
  for (int pair = warp; pair < p.num_pairs; pair += kWarps) {
    ptx::cp_async_wait<0>();
    if (pair == warp) __syncthreads();  // the field is there
    __syncwarp();
    const Octets<T> rows(block, pair);
    float acc[kHeadDim / 8][4];
    set_zero(acc);
    if (rows.count[0] > 0) {
      const Sight sight(rows, spans, field.begin.x);
      const Slots<T> slots(p, block, rows, staged);
      Weigh<T, kHeadDim, true> body{p, rows, sight, acc};
#pragma unroll
      for (int i = 0; i < 2; ++i) body.staged[i] = slots.of_field(p, sight, i);
      walk_chunk<kHeadDim>(sight, field, whole(field), keys, body);
    }
    __syncwarp();
    load_slots(pair + kWarps);
    if (rows.count[0] > 0) finish<T, kHeadDim>(p, block, rows, spans, pair, acc);
  }
}

/// The same for one pair, slots being read where they are, over everything that the tile sees.
template <class T, int kHeadDim>
__device__ __forceinline__ void weigh_in_place(const UnfusedParams& p, const Block<T>& block, int pair,
                                               unsigned char* smem) {
  using Layout = Map<T, kHeadDim>;
  const Span* spans = reinterpret_cast<const Span*>(smem + Layout::kSpans);
  const uint32_t keys = ptx::shared_address(smem) + Layout::kKeys;
  const Octets<T> rows(block, pair);
  float acc[kHeadDim / 8][4];
  set_zero(acc);
  const Sources sources(p);
#pragma unroll 1
  for (int number = sources.first; number < sources.last; ++number) {
    const Source<T> source(p, block, rows, spans, number);
    Weigh<T, kHeadDim, false> body{p, rows, source.sight, acc, &source};
    walk<T, kHeadDim>(p.chunk_keys, source.field, source.sight, source.from, keys, blockIdx.y * (kHeadDim / 8),
                      rows.count[0] > 0, body);
  }
  finish<T, kHeadDim>(p, block, rows, spans, pair, acc);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 32 ? 5 : 4)
    weigh_kernel(const __grid_constant__ UnfusedParams p) {
  extern __shared__ __align__(256) unsigned char smem[];
  Block<T>& block = *reinterpret_cast<Block<T>*>(smem);
  const Field field = begin_block(p, block, reinterpret_cast<Span*>(smem + Map<T, kHeadDim>::kSpans));
  if (block.item.empty) return;
  if (p.staged) return weigh_staged<T, kHeadDim>(p, block, field, smem);
#pragma unroll 1
  for (int pair = threadIdx.x / 32; pair < p.num_pairs; pair += kWarps)
    weigh_in_place<T, kHeadDim>(p, block, pair, smem);
}

void launch_weigh(const UnfusedParams& params, void* stream) {
  const int dim = params.boxes.q.dim;
  dispatch_unfused<64>(params.boxes.problem.dtype, dim, [&](auto element, auto head_dim) {
    cuda::launch(weigh_kernel<decltype(element), head_dim>,
                 dim3(params.boxes.num_items, detail::ceil_div(dim, head_dim)), kThreads,
                 Map<decltype(element), head_dim>::bytes(params), stream, params);
  });
}

}  // namespace natten::cuda_portable
