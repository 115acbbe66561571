// SPDX-License-Identifier: MIT
// Geometry of a work item on the device: its tile, the box on the other side, and addresses of tokens in both.
#pragma once
#include "core/element.h"
#include "cuda/portable/boxes.h"

namespace natten::cuda_portable {

/// Positions (in a dilation group) `begin` .. `begin + size`, walked in flat order, x fastest.
struct Box {
  Int3 begin, size;
  int volume;
  FastDiv by_x, by_y;

  Box() = default;
  __device__ Box(Int3 from, Int3 extent)
      : begin(from), size(extent), volume(extent.z * extent.y * extent.x), by_x(extent.x), by_y(extent.y) {}
  /// Relative to `begin`. A `flat` of `volume` or more has a z outside of the box.
  __device__ __forceinline__ Int3 split(int flat) const {
    const int rows = by_x.split(flat);
    int y = rows;
    const int z = by_y.split(y);
    return {z, y, flat};
  }
};

/// Rows of a tensor that belong to one sample, head and dilation group, by position.
template <class T>
struct Gather {
  T* base;  // of position {0, 0, 0} of the box or tile
  int64_t z, y, x;
  int dim;
  bool vector;

  __device__ __forceinline__ T* at(Int3 p) const { return base + (p.z * z + p.y * y + p.x * x); }
};

/// A tile and the dilation group it lies in.
struct Item {
  int sample;
  int64_t batch;
  int head;                      // of the tile's side: of queries, or of keys
  Int3 residue, origin, extent;  // `extent` of the group, in positions
  Axis group[3];
  bool empty;  // shorter groups have fewer tiles
};

__device__ __forceinline__ Int3 sum(Int3 a, Int3 b) { return {a.z + b.z, a.y + b.y, a.x + b.x}; }
__device__ __forceinline__ int component(Int3 v, int axis) { return axis == 0 ? v.z : axis == 1 ? v.y : v.x; }

/// The sample in which an item lies.
__device__ __forceinline__ int sample_of(const BoxesParams& p, int index) {
  int sample = 0;
#pragma unroll
  for (int step = kMostSamples / 2; step > 0; step /= 2)
    if (sample + step < p.num_samples && p.samples[sample + step].first_item <= index) sample += step;
  return sample;
}

/// `group_axis` without its division where there is one group.
__device__ __forceinline__ Axis group_of(const Axis& a, int residue) {
  return a.dilation == 1 ? group_axis({a.extent, a.window, a.stride, 1, a.causal}, 0) : group_axis(a, residue);
}

__device__ __forceinline__ Item decode_item(const BoxesParams& p, int index) {
  Item item;
  const bool packed = p.num_samples > 1;
  item.sample = packed ? sample_of(p, index) : 0;
  const BoxesSample& sample = p.samples[item.sample];
  index -= sample.first_item;
  const auto digit = [&](int base, const FastDiv& by_base) {  // `by_base` is of an only sample
    const int q = packed ? int(uint32_t(index) / uint32_t(base)) : by_base.quotient(index), r = index - q * base;
    index = q;
    return r;
  };
  Int3 tile;
  tile.x = digit(sample.num_tiles.x, p.by_tiles[2]);
  tile.y = digit(sample.num_tiles.y, p.by_tiles[1]);
  tile.z = digit(sample.num_tiles.z, p.by_tiles[0]);
  Axis axes[3] = {p.problem.axes[0], p.problem.axes[1], p.problem.axes[2]};
  axes[0].extent = sample.extent.z, axes[1].extent = sample.extent.y, axes[2].extent = sample.extent.x;
  const bool grouped = p.side != Side::extra_keys;
  item.residue.x = digit(grouped ? num_groups(axes[2]) : 1, p.by_groups[2]);
  item.residue.y = digit(grouped ? num_groups(axes[1]) : 1, p.by_groups[1]);
  item.residue.z = digit(grouped ? num_groups(axes[0]) : 1, p.by_groups[0]);
  item.head = digit(p.side == Side::queries ? p.problem.heads : p.problem.heads_kv, p.by_heads);
  item.batch = index;
  item.origin = {tile.z * p.tile.z, tile.y * p.tile.y, tile.x * p.tile.x};
  item.group[0] = group_of(axes[0], item.residue.z);
  item.group[1] = group_of(axes[1], item.residue.y);
  item.group[2] = group_of(axes[2], item.residue.x);
  item.extent = {item.group[0].extent, item.group[1].extent, item.group[2].extent};
  if (!grouped) item.extent = {1, 1, sample.extra_keys};
  item.empty = item.origin.z >= item.extent.z || item.origin.y >= item.extent.y || item.origin.x >= item.extent.x;
  return item;
}

/// Position of a row of the tile relative to its origin. Rows past the tile or the group repeat the last ones: their
/// results are not stored.
__device__ __forceinline__ Int3 tile_row(const BoxesParams& p, const Item& item, int row) {
  row = detail::min(row, p.tile.z * p.tile.y * p.tile.x - 1);
  Int3 at;
  at.y = p.tile_x.split(row), at.x = row;
  at.z = p.tile_y.split(at.y);
  return {detail::min(at.z, item.extent.z - 1 - item.origin.z), detail::min(at.y, item.extent.y - 1 - item.origin.y),
          detail::min(at.x, item.extent.x - 1 - item.origin.x)};
}

/// Does this row of the tile exist?
__device__ __forceinline__ bool is_row(const BoxesParams& p, const Item& item, int row) {
  if (row >= p.tile.z * p.tile.y * p.tile.x) return false;
  Int3 at;
  at.y = p.tile_x.split(row), at.x = row;
  at.z = p.tile_y.split(at.y);
  return item.origin.z + at.z < item.extent.z && item.origin.y + at.y < item.extent.y &&
         item.origin.x + at.x < item.extent.x;
}

/// Rows by flat index along x: additional keys, or with the tokens' strides the whole grid.
template <class T>
__device__ __forceinline__ Gather<T> gather_plain(const BoxesParams& p, const Rows& rows, const Item& item, int head,
                                                  Int3 begin) {
  const BoxesSample& sample = p.samples[item.sample];
  const int64_t* s = rows.view.strides;
  const int64_t x = s[3], y = s[2] + sample.pitch_y * x, z = s[1] + sample.pitch_z * x;
  T* base = pointer<T>(rows.view) + item.batch * s[0] + head * s[4] + begin.z * z + begin.y * y +
            (begin.x + (rows.of_keys ? sample.first_key : sample.first_query)) * x;
  return {base, z, y, x, rows.dim, rows.vector};
}

template <class T>
__device__ __forceinline__ Gather<T> gather_group(const BoxesParams& p, const Rows& rows, const Item& item, int head,
                                                  Int3 begin) {
  Gather<T> gather = gather_plain<T>(p, rows, item, head, item.residue);
  const Axis* a = p.problem.axes;
  gather.z *= a[0].dilation, gather.y *= a[1].dilation, gather.x *= a[2].dilation;
  gather.base = gather.at(begin);
  return gather;
}

template <class T>
__device__ __forceinline__ Gather<T> gather_tile(const BoxesParams& p, const Rows& rows, const Item& item) {
  return p.side == Side::extra_keys ? gather_plain<T>(p, rows, item, item.head, item.origin)
                                    : gather_group<T>(p, rows, item, item.head, item.origin);
}

/// What the position `at` of an axis of the tile's side sees on the other side.
__device__ __forceinline__ Span span_of(Side side, const Axis& group, int at) {
  return side == Side::queries ? key_span(group, at) : query_span(group, at);
}

/// The positions that any row of the tile sees. Begins and ends of spans never decrease along an axis.
__device__ __forceinline__ Box box_of(const BoxesParams& p, const Item& item) {
  if (p.side == Side::extra_keys) return Box({0, 0, 0}, p.samples[item.sample].extent);
  const auto seen = [&](int a) {
    const Axis& g = item.group[a];
    const int first = component(item.origin, a), last = detail::min(first + component(p.tile, a), g.extent) - 1;
    return Span{span_of(p.side, g, first).begin, span_of(p.side, g, last).end};
  };
  const Span z = seen(0), y = seen(1), x = seen(2);
  return Box({z.begin, y.begin, x.begin}, {z.size(), y.size(), x.size()});
}

}  // namespace natten::cuda_portable
