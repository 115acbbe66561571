// SPDX-License-Identifier: MIT
// The operator. Everything in this project that asks "which keys does a query see?" calls this file: the oracle,
// the engines, the pair counter and, through the torch binding, Python. The formula stands nowhere else.
//
// Along one axis a query sees the `window` keys nearest to it. Dilation d first splits the axis into d groups of tokens
// that are d apart; tokens of different groups never meet. Inside a group the axis is dense again (`group_axis`):
//
//   axis, dilation 2      0 1 2 3 4 5 6        group 0: 0 2 4 6        group 1: 1 3 5
//   window 3, query 6                          position 3 sees [1, 4): the window shifted inwards at the border
//
// so spans are half-open ranges of *positions in a group*, and position p of group r is token r + d * p. An axis of
// a grid of several axes is independent of the others: the keys of a query are the product of its spans.
#pragma once
#include <cstdint>

// Always inlined: the CPU engine compiles this file for several instruction sets, and the linker keeps only one copy of
// an inline function that was not inlined.
#if defined(__CUDACC__)
#define NATTEN_HD __host__ __device__ __forceinline__
#else
#define NATTEN_HD __attribute__((always_inline)) inline
#endif

namespace natten {

/// Three sizes or coordinates, slowest axis first. Grids of rank 1 and 2 have leading ones.
struct Int3 {
  int z = 1, y = 1, x = 1;
  NATTEN_HD constexpr int64_t volume() const { return int64_t{z} * y * x; }
  NATTEN_HD constexpr bool operator==(const Int3&) const = default;
};

/// Half-open range [begin, end) of positions in a dilation group.
struct Span {
  int begin = 0, end = 0;
  NATTEN_HD constexpr int size() const { return end - begin; }
  NATTEN_HD constexpr bool contains(int p) const { return begin <= p && p < end; }
  NATTEN_HD constexpr bool operator==(const Span&) const = default;
};

/// One axis of the grid. `window` 0 means that no query sees any key of the grid (only additional keys).
struct Axis {
  int extent = 1;       ///< tokens, >= 0
  int window = 1;       ///< keys per query; larger than a group means the whole group
  int stride = 1;       ///< `stride` neighbouring queries share one window; at most `window`
  int dilation = 1;     ///< distance of neighbouring keys, in tokens
  bool causal = false;  ///< a query sees no key behind itself
};

namespace detail {
NATTEN_HD constexpr int min(int a, int b) { return a < b ? a : b; }
NATTEN_HD constexpr int max(int a, int b) { return a > b ? a : b; }
NATTEN_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }  // a >= 0
struct Division {
  int divisor;
  NATTEN_HD constexpr int quotient(int n) const { return n / divisor; }
};
}  // namespace detail

/// The dilation groups that hold at least one token.
NATTEN_HD constexpr int num_groups(const Axis& a) { return detail::min(a.dilation, a.extent); }

/// Group r of an axis as an axis of its own: dilation 1, and window and stride cut to what the group can fill.
/// `by_dilation.quotient(n)` is n / a.dilation: kernels have faster ways than to divide.
template <class Division>
NATTEN_HD constexpr Axis group_axis(const Axis& a, int r, const Division& by_dilation) {
  const int extent = by_dilation.quotient(a.extent - r - 1) + 1;
  const int window = detail::min(a.window, extent);
  return {extent, window, detail::max(detail::min(a.stride, window), 1), 1, a.causal};
}
NATTEN_HD constexpr Axis group_axis(const Axis& a, int r) { return group_axis(a, r, detail::Division{a.dilation}); }

/// Keys that a window reaches before its leader; the last key of a causal window is its leader.
NATTEN_HD constexpr int reach_before(const Axis& g) { return g.causal ? g.window - 1 : g.window / 2; }

/// Keys that the query at position p sees; `g` comes from `group_axis`. The query itself is among them.
///   The `stride` queries of one stride group share the window of their leader (its middle, rounded up; the last one
///   if causal). An even window reaches one key further to the left. A causal window ends at the query itself.
NATTEN_HD constexpr Span key_span(const Axis& g, int p) {
  if (g.window == 0) return {0, 0};
  const int leader_offset = g.causal ? g.stride - 1 : g.stride / 2;
  const int leader = detail::min(p / g.stride * g.stride + leader_offset, g.extent - 1);
  if (g.causal) return {detail::max(leader - reach_before(g), 0), p + 1};
  const int begin = detail::max(detail::min(leader - reach_before(g), g.extent - g.window), 0);
  return {begin, begin + g.window};
}

/// The keys of a token of the axis itself: `count` tokens from `first` on, `a.dilation` apart.
struct TokenKeys {
  int first, count;
};
NATTEN_HD constexpr TokenKeys token_keys(const Axis& a, int token) {
  const int residue = token % a.dilation;
  const Span keys = key_span(group_axis(a, residue), token / a.dilation);
  return {residue + a.dilation * keys.begin, keys.size()};
}

/// Queries that see the key at position p: the exact inverse of `key_span`. Never empty unless the window is.
NATTEN_HD constexpr Span query_span(const Axis& g, int p) {
  if (g.window == 0) return {0, 0};
  const int leader_offset = g.causal ? g.stride - 1 : g.stride / 2;
  int begin = g.causal ? p : 0, end = g.extent;
  if (!g.causal && p >= g.window)  // the first stride group whose window ends behind p
    begin = detail::ceil_div(p - g.window + 1 + reach_before(g) - leader_offset, g.stride) * g.stride;
  if (p < g.extent - g.window)  // behind the last stride group whose window begins at or before p
    end = detail::min(((p + reach_before(g) - leader_offset) / g.stride + 1) * g.stride, g.extent);
  return {begin, end};
}

/// Index into the relative position bias of an axis, 0 .. 2 * window - 2, `a` being the axis as the user gave it.
NATTEN_HD constexpr int bias_index(const Axis& a, int query, int key) { return key - query + a.window - 1; }

/// Query-key pairs along the whole axis; the pairs of a grid are the product over its axes.
constexpr int64_t num_pairs(const Axis& a) {
  int64_t pairs = 0;
  for (int r = 0; r < num_groups(a); ++r) {
    const Axis g = group_axis(a, r);
    for (int p = 0; p < g.extent; ++p) pairs += key_span(g, p).size();
  }
  return pairs;
}

}  // namespace natten
