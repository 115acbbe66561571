// SPDX-License-Identifier: MIT
// Windows one key at a time, as the plain loops of the oracle walk them.
#pragma once
#include "core/backend.h"
#include "core/pairs.h"

namespace natten::reference {

extern const UnfusedKernels kUnfused;

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

}  // namespace natten::reference
