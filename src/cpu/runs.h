// SPDX-License-Identifier: MIT
// A window as runs of tokens along x, for kernels that walk one query or one key at a time: the fused loops and the
// unfused products.
#pragma once
#include "cpu/pass.h"

namespace natten::cpu::NATTEN_ISA {

inline constexpr int kChunks = 32;  // tasks per head; fixed, so that sums over tasks have a fixed order

// A token's place on one axis.
struct Place {
  int residue, position;
  Axis group;
};
NATTEN_INLINE Place place_of(const Axis& a, int token) {
  const int residue = token % a.dilation;
  return {residue, token / a.dilation, group_axis(a, residue)};
}

// A run of tokens along x, `dilation` apart: all of a key row that a query sees, or of a query row that sees a key.
struct Run {
  Int3 token;  // the first
  int count;
  int64_t bias_entry;  // of the first; the next one's is one further for keys, one back for queries
  int64_t slot;        // of the first key; for queries: of the key's row in the query's window
};

// Calls visit(run) for the key rows that `token` sees, or for the query rows that see it.
template <class Visit>
NATTEN_INLINE void for_each_run(const Problem& p, Int3 token, Span (*span)(const Axis&, int), bool of_queries,
                                Visit&& visit) {
  const Axis &az = p.axes[0], &ay = p.axes[1], &ax = p.axes[2];
  const Place z = place_of(az, token.z), y = place_of(ay, token.y), x = place_of(ax, token.x);
  const Span zs = span(z.group, z.position), ys = span(y.group, y.position), xs = span(x.group, x.position);
  auto entry = [&](const Axis& a, int here, int there) {
    return int64_t{of_queries ? bias_index(a, there, here) : bias_index(a, here, there)};
  };
  auto slot = [&](const Place& here, Span seen, int there) {
    return int64_t{of_queries ? here.position - key_span(here.group, there).begin : there - seen.begin};
  };
  for (int oz = zs.begin; oz < zs.end; ++oz)
    for (int oy = ys.begin; oy < ys.end; ++oy)
      visit(Run{{z.residue + az.dilation * oz, y.residue + ay.dilation * oy, x.residue + ax.dilation * xs.begin},
                xs.size(),
                (entry(az, z.position, oz) * (2 * ay.window - 1) + entry(ay, y.position, oy)) * (2 * ax.window - 1) +
                    entry(ax, x.position, xs.begin),
                (slot(z, zs, oz) * ay.window + slot(y, ys, oy)) * ax.window});
}
NATTEN_INLINE Span keys_of(const Axis& g, int position) { return key_span(g, position); }
NATTEN_INLINE Span queries_of(const Axis& g, int position) { return query_span(g, position); }

template <class Visit>
NATTEN_INLINE void for_each_key_run(const Problem& p, Int3 token, Visit&& visit) {
  if (p.has_window()) for_each_run(p, token, keys_of, false, visit);
}

NATTEN_INLINE Int3 token_at(Int3 grid, int64_t index) {
  return {int(index / (int64_t{grid.y} * grid.x)), int(index / grid.x % grid.y), int(index % grid.x)};
}

// The most keys that a query can see.
NATTEN_INLINE int64_t most_slots(const Problem& p) {
  int64_t slots = p.has_window() ? 1 : 0;
  for (const Axis& a : p.axes) slots *= a.extent < a.window ? a.extent : a.window;
  return slots + p.extra_keys;
}

// Calls visit(batch, token) for share `chunk` of kChunks of all queries of a head.
template <class Visit>
NATTEN_INLINE void for_each_query(const Problem& p, int64_t chunk, Visit&& visit) {
  const int64_t all = p.batch * p.tokens();
  for (int64_t i = all * chunk / kChunks; i < all * (chunk + 1) / kChunks; ++i)
    visit(i / p.tokens(), token_at(p.grid(), i % p.tokens()));
}

}  // namespace natten::cpu::NATTEN_ISA
