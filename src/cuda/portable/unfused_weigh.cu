// SPDX-License-Identifier: MIT
// Unfused: sums over the other side, weighted by the attention tensor. X = scale * W Y where the tile holds queries;
// Y = scale * W^T X where it holds keys and its box the queries that see them (inverse windows, so no atomics).
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/unfused.cuh"

namespace natten::cuda_portable {

/// Where the weights of a tile's rows stand: an address is a sum of what the row adds and what each axis of the other
/// side adds, although windows shift: of the queries' side both the token and where its window begins.
template <class T>
struct WeightMap {
  const UnfusedParams& p;
  const Item& item;
  Int3 begin;  // of the box
  const T* of_row[2];

  __device__ WeightMap(const UnfusedParams& params, const Item& work, const Octets& rows, const Sight& sight, int head,
                       bool extra)
      : p(params), item(work), begin(sight.begin) {
    const Side side = p.boxes.side;
    const T* base = weights_of<T>(p, item, head);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Int3 at = rows.at[i];
      const int64_t token = at.z * p.token_strides[0] + at.y * p.token_strides[1] + at.x * p.token_strides[2];
      const int window = Slots<T>::before_window(p, sight, i);
      const int slot = at.z * p.slot_strides[0] + at.y * p.slot_strides[1] + at.x;
      of_row[i] = base + (side == Side::queries ? token + (extra ? p.window_slots : -window)
                          : side == Side::keys  ? int64_t{slot}
                                                : int64_t{p.window_slots} + at.x);
    }
  }
  /// `at` is relative to the box.
  __device__ __forceinline__ int64_t of_axis(int axis, int at) const {
    if (p.boxes.side == Side::queries) return int64_t{at} * p.slot_strides[axis];
    const int position = component(begin, axis) + at;
    const int64_t token = position * p.token_strides[axis];
    if (p.boxes.side == Side::extra_keys) return token;
    return token - int64_t{seen_from<false>(item.group[axis], position).begin} * p.slot_strides[axis];
  }
};

/// What a tile sums over, one after the other: the grid's keys and the additional ones; or the heads of queries.
struct Passes {
  int first, last;

  __device__ explicit Passes(const UnfusedParams& p) : first(0), last(p.boxes.problem.heads_per_kv()) {
    if (p.boxes.side == Side::queries) first = p.window_slots > 0 ? 0 : 1, last = p.boxes.problem.extra_keys > 0 ? 2 : 1;
  }
};

template <class T>
struct Pass {
  bool extra;
  int head, head_other;
  Sight sight;
  Gather<T> from;

  __device__ Pass(const UnfusedParams& p, const Item& item, const Octets& rows, const Span* spans, int number)
      : extra(p.boxes.side == Side::queries && number == 1), sight(Int3{0, 0, 0}) {
    const BoxesParams& b = p.boxes;
    const bool queries = b.side == Side::queries;
    head = queries ? item.head : item.head * b.problem.heads_per_kv() + number;
    head_other = queries ? item.head / b.problem.heads_per_kv() : head;
    if (extra || b.side == Side::extra_keys) {
      sight = Sight(extra ? Int3{1, 1, b.problem.extra_keys} : b.problem.grid());
      from = gather_plain<T>(extra ? b.extra_k : b.q, item.batch, head_other, {0, 0, 0});
    } else {
      sight = Sight(p, item, rows, spans);
      from = gather_group<T>(b, queries ? b.k : b.q, item, head_other, sight.begin);
    }
  }
};

template <class T, int kHeadDim, bool kStaged>
struct Weigh {
  static constexpr int kKeyBytes = kHeadDim * 2;
  static constexpr bool kClearBehind = true;

  const UnfusedParams& p;
  const Octets& rows;
  const Sight& sight;
  const WeightMap<T>& map;
  uint32_t staged[2];  // of the lane's rows, the slot of the box's first position; as in WeightMap::of_row
  float (&acc)[kHeadDim / 8][4];

  uint32_t lane_key;  // offset of this lane's key of the step
  uint32_t sees[2];   // see column_bits
  int first_column;
  int64_t column[4];  // what the lane's columns add to an address
  uint32_t at[2];     // of the row at hand: `staged`, moved to this lane's first column
  int z, y;           // of the row at hand

  __device__ __forceinline__ void columns(int first, int end, int in_chunk) {
    const int lane = threadIdx.x % 32, key = in_chunk + lane % 16;
    lane_key = key * kKeyBytes + ((lane / 16 ^ chunk_swizzle<kHeadDim>(key)) << 4);
    first_column = first + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) sees[i] = rows.exists[i] ? column_bits(sight.x[i], first, end) : 0;
    if (kStaged) return;
#pragma unroll
    for (int c = 0; c < 4; ++c) {  // columns that nobody sees need no address, but one that exists
      const int at = detail::min(first_column + c / 2 * 8 + c % 2, sight.size.x - 1);
      column[c] = map.of_axis(2, at);
    }
  }

  __device__ __forceinline__ void start(int first_z, int first_y) {
    z = first_z, y = first_y;
    const int slot = z * p.slot_strides[0] + y * p.slot_strides[1] + first_column;
    at[0] = staged[0] + slot * 2, at[1] = staged[1] + slot * 2;
  }

  __device__ __forceinline__ void row(uint32_t address, const bool (&sees_row)[2]) {
    uint32_t weight[4], value[kHeadDim / 16][4];
    load_transposed<kHeadDim>(value, address + lane_key);
    const int64_t of_row = kStaged ? 0 : map.of_axis(0, z) + map.of_axis(1, y);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t seen = sees_row[i] ? sees[i] : 0;
      uint32_t bits[4] = {0, 0, 0, 0};
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (seen >> c & 1)
          bits[c] = kStaged ? ptx::load_shared_16(at[i] + (c / 2 * 8 + c % 2) * 2)
                            : uint32_t{map.of_row[i][of_row + column[c]].bits};
      weight[i] = bits[0] | bits[1] << 16, weight[2 + i] = bits[2] | bits[3] << 16;
      at[i] += p.slot_strides[1] * 2;
    }
    ++y;
    multiply_values<T, kHeadDim>(acc, weight, value);
  }
};

/// The rows of the tile that are written.
template <class T>
__device__ __forceinline__ Gather<T> results_of(const UnfusedParams& p, const Item& item) {
  const BoxesParams& b = p.boxes;
  if (b.side == Side::extra_keys) return gather_plain<T>(b.extra_k, item.batch, item.head, {0, 0, 0});
  return gather_group<T>(b, b.side == Side::queries ? b.q : b.k, item, item.head, {0, 0, 0});
}

/// A warp's rows, channels from `first` on, by plain sums over exactly what is seen: where a NaN or infinity would
/// reach rows that do not see it, as 0 * NaN.
/// NOTE: a function of its own, so that it costs the other tiles no registers.
template <class T>
__device__ __noinline__ void weigh_exactly(const UnfusedParams& p, const Item& item, const Span* spans, int first,
                                           int channels) {
  const Octets rows(p, item, threadIdx.x / 32);
  const Gather<T> to = results_of<T>(p, item);
  const Passes passes(p);
  const int end = detail::min(first + channels, to.dim);
  for (int next = first; next < end; next += 4) {
    const int c = detail::min(next + int(threadIdx.x % 4), end - 1);
    float sum[2] = {0, 0};
    for (int number = passes.first; number < passes.last; ++number) {
      const Pass<T> pass(p, item, rows, spans, number);
      const WeightMap<T> map(p, item, rows, pass.sight, pass.head, pass.extra);
      const Sight& s = pass.sight;
      for (int i = 0; i < 2; ++i)
        for (int z = s.z[i].begin; z < s.z[i].end; ++z)
          for (int y = s.y[i].begin; y < s.y[i].end; ++y)
            for (int x = s.x[i].begin; x < s.x[i].end; ++x) {
              const T weight = map.of_row[i][map.of_axis(0, z) + map.of_axis(1, y) + map.of_axis(2, x)];
              sum[i] = fmaf(to_real(weight), to_real(pass.from.at({z, y, x})[c]), sum[i]);
            }
    }
    for (int i = 0; i < 2; ++i)
      if (rows.exists[i]) from_real(sum[i] * p.scale, to.at(rows.at[i])[c]);
  }
}

template <class T, int kHeadDim>
__device__ __forceinline__ void store_sums(const UnfusedParams& p, const Gather<T>& to, const Octets& rows,
                                           const float (&acc)[kHeadDim / 8][4], int first) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T* row = to.at(rows.at[i]);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; n += 2) {
      uint32_t a = ptx::pack<T>(acc[n][2 * i] * p.scale, acc[n][2 * i + 1] * p.scale);
      uint32_t b = ptx::pack<T>(acc[n + 1][2 * i] * p.scale, acc[n + 1][2 * i + 1] * p.scale);
      pairs_to_fours(a, b, t);
      const int channel = first + n * 8 + t % 2 * 8 + t / 2 * 4;
      if (!rows.exists[i] || channel >= to.dim) continue;
      if (to.vector) {
        ptx::store_global_64(row + channel, a, b);
        continue;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (channel + e < to.dim) row[channel + e].bits = uint16_t((e < 2 ? a : b) >> (e % 2 * 16));
    }
  }
}

template <class T, int kHeadDim, bool kStaged>
__device__ __forceinline__ void weigh(const UnfusedParams& p, const Item& item, unsigned char* smem) {
  using Map = ChunkMap<kHeadDim>;
  const int warp = threadIdx.x / 32, slice = blockIdx.y * (kHeadDim / 8);
  const uint32_t shared = ptx::shared_address(smem);
  const Span* spans = reinterpret_cast<Span*>(smem + Map::kSpans);
  const Octets rows(p, item, warp);
  const Slots<T> slots(p, item.origin, rows, weights_of<T>(p, item, item.head),
                       shared + Map::kStaging + warp * p.staged_bytes());
  if (kStaged) slots.load();
  float acc[kHeadDim / 8][4];
  set_zero(acc);
  const Passes passes(p);
#pragma unroll 1
  for (int number = passes.first; number < passes.last; ++number) {
    const Pass<T> pass(p, item, rows, spans, number);
    const Sight& s = pass.sight;
    const WeightMap<T> map(p, item, rows, s, pass.head, pass.extra);
    Weigh<T, kHeadDim, kStaged> body{p, rows, s, map, {0, 0}, acc, 0, {0, 0}, 0, {}, {0, 0}, 0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) body.staged[i] = slots.of_box(p, s, i, pass.extra ? p.window_slots : 0);
    walk<T, kHeadDim>(s, pass.from, shared, slice, rows.count[0] > 0, body);
  }
  if (!__all_sync(~0u, finite_witness(acc, 0) == 0 && finite_witness(acc, 1) == 0))
    weigh_exactly<T>(p, item, spans, slice * 8, kHeadDim);
  else
    store_sums<T, kHeadDim>(p, results_of<T>(p, item), rows, acc, slice * 8);
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 32 ? 5 : 4) weigh_kernel(const __grid_constant__ UnfusedParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Item* item = begin_item<kHeadDim>(p, smem);
  if (!item) return;
  if (p.staged)
    weigh<T, kHeadDim, true>(p, *item, smem);
  else
    weigh<T, kHeadDim, false>(p, *item, smem);
}

void launch_weigh(const UnfusedParams& params, void* stream) {
  const int dim = params.boxes.q.dim;
  dispatch_unfused<64>(params.boxes.problem.dtype, dim, [&](auto element, auto head_dim) {
    launch(weigh_kernel<decltype(element), head_dim>, dim3(params.boxes.num_items, detail::ceil_div(dim, head_dim)),
           ChunkMap<head_dim>::kStaging + kThreads / 32 * params.staged_bytes(), stream, params);
  });
}

}  // namespace natten::cuda_portable
