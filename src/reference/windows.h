// SPDX-License-Identifier: MIT
// Windows one key at a time, as the plain loops of the oracle walk them.
#pragma once
#include "core/backend.h"
#include "core/element.h"

namespace natten::reference {

extern const UnfusedKernels kUnfused;

// Position of a token in its dilation group, and the keys it sees there.
struct AxisKeys {
  Axis group;
  int residue, position;
  Span keys;
};

inline AxisKeys axis_keys(const Axis& a, int token) {
  const int residue = token % a.dilation;
  const Axis group = group_axis(a, residue);
  const int position = token / a.dilation;
  return {group, residue, position, key_span(group, position)};
}

// Calls visit(key token, bias index, slot), the latter two per axis, for each key of the grid that `query` sees.
template <class Visit>
void for_each_key(const Problem& p, Int3 query, Visit visit) {
  if (!p.has_window()) return;
  const Axis &az = p.axes[0], &ay = p.axes[1], &ax = p.axes[2];
  const AxisKeys z = axis_keys(az, query.z), y = axis_keys(ay, query.y), x = axis_keys(ax, query.x);
  for (int kz = z.keys.begin; kz < z.keys.end; ++kz)
    for (int ky = y.keys.begin; ky < y.keys.end; ++ky)
      for (int kx = x.keys.begin; kx < x.keys.end; ++kx)
        visit(Int3{z.residue + az.dilation * kz, y.residue + ay.dilation * ky, x.residue + ax.dilation * kx},
              Int3{bias_index(az, z.position, kz), bias_index(ay, y.position, ky), bias_index(ax, x.position, kx)},
              Int3{kz - z.keys.begin, ky - y.keys.begin, kx - x.keys.begin});
}

template <class Visit>
void for_each_token(Int3 grid, Visit visit) {
  for (int z = 0; z < grid.z; ++z)
    for (int y = 0; y < grid.y; ++y)
      for (int x = 0; x < grid.x; ++x) visit(Int3{z, y, x});
}

inline int64_t token_index(Int3 grid, Int3 t) { return (int64_t{t.z} * grid.y + t.y) * grid.x + t.x; }

template <class T>
double dot(const T* a, const T* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(to_real(a[i])) * double(to_real(b[i]));
  return sum;
}

}  // namespace natten::reference
