// SPDX-License-Identifier: MIT
// Windows as lists: the keys of a query and the queries of a key, numbered, so that the lanes of a warp can share them.
// Spans come from neighborhood.h; all counts are 64-bit.
#pragma once
#include "core/pairs.h"

namespace natten::cuda_reference {

/// A box of tokens that are `step` apart.
struct Box {
  Int3 first, step, size;

  __device__ int64_t volume() const { return size.volume(); }
  /// Token number i, the last axis running fastest.
  __device__ Int3 at(int64_t i) const {
    int64_t row;
    Int3 t;
    if (volume() < INT32_MAX) {  // NOTE: a 64-bit division takes as long as a dot product of 32 channels
      const uint32_t n = uint32_t(i), r = n / uint32_t(size.x);
      row = r, t.x = int(n - r * uint32_t(size.x));
    } else {
      row = i / size.x, t.x = int(i - row * size.x);
    }
    t.z = int(row / size.y), t.y = int(row - int64_t{t.z} * size.y);
    return {first.z + step.z * t.z, first.y + step.y * t.y, first.x + step.x * t.x};
  }
};

inline __device__ Box whole_grid(const Problem& p) { return {{0, 0, 0}, {1, 1, 1}, p.grid()}; }

namespace detail {
struct AxisRange {
  int first, step, size;
  __device__ AxisRange(const Axis& a, int residue, Span span)
      : first(residue + a.dilation * span.begin), step(a.dilation), size(span.size()) {}
};
inline __device__ Box box(const AxisRange& z, const AxisRange& y, const AxisRange& x) {
  return {{z.first, y.first, x.first}, {z.step, y.step, x.step}, {z.size, y.size, x.size}};
}
inline __device__ AxisRange keys_of(const Axis& a, int token) {
  const AxisKeys axis = axis_keys(a, token);
  return {a, axis.residue, axis.keys};
}
inline __device__ AxisRange queries_of(const Axis& a, int token) {
  const int residue = token % a.dilation;
  return {a, residue, query_span(group_axis(a, residue), token / a.dilation)};
}
}  // namespace detail

/// The keys of the grid that a query sees; empty for a problem without windows.
inline __device__ Box key_box(const Problem& p, Int3 query) {
  if (!p.has_window()) return {{0, 0, 0}, {1, 1, 1}, {0, 0, 0}};
  return detail::box(detail::keys_of(p.axes[0], query.z), detail::keys_of(p.axes[1], query.y),
                     detail::keys_of(p.axes[2], query.x));
}

/// The queries that see a key of the grid.
inline __device__ Box query_box(const Problem& p, Int3 key) {
  return detail::box(detail::queries_of(p.axes[0], key.z), detail::queries_of(p.axes[1], key.y),
                     detail::queries_of(p.axes[2], key.x));
}

/// Where the bias of a pair stands in the table of its head.
inline __device__ Int3 bias_entry(const Problem& p, Int3 query, Int3 key) {
  const Axis &z = p.axes[0], &y = p.axes[1], &x = p.axes[2];
  return {bias_index(z, query.z / z.dilation, key.z / z.dilation),
          bias_index(y, query.y / y.dilation, key.y / y.dilation),
          bias_index(x, query.x / x.dilation, key.x / x.dilation)};
}

namespace detail {
inline __device__ int key_at(const Axis& a, int query, int entry) {
  const AxisKeys axis = axis_keys(a, query);
  const int position = axis.position + entry - bias_index(a, 0, 0);
  return axis.keys.contains(position) ? axis.residue + a.dilation * position : -1;
}
}  // namespace detail

/// The key that a query meets at an entry of the bias table; z is -1 if its window does not hold that key.
inline __device__ Int3 key_at(const Problem& p, Int3 query, Int3 entry) {
  const Int3 key{detail::key_at(p.axes[0], query.z, entry.z), detail::key_at(p.axes[1], query.y, entry.y),
                 detail::key_at(p.axes[2], query.x, entry.x)};
  return key.z < 0 || key.y < 0 || key.x < 0 ? Int3{-1, -1, -1} : key;
}

}  // namespace natten::cuda_reference
