// SPDX-License-Identifier: MIT
// A query and a key: where they stand and what the pair contributes. The oracles on CPU and GPU share it, so what they
// compute is written once; the order in which they sum is their own.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/element.h"

namespace natten {

/// Position of a token in its dilation group, and the keys it sees there.
struct AxisKeys {
  Axis group;
  int residue, position;
  Span keys;
};

NATTEN_HD AxisKeys axis_keys(const Axis& a, int token) {
  const int residue = token % a.dilation;
  const Axis group = group_axis(a, residue);
  const int position = token / a.dilation;
  return {group, residue, position, key_span(group, position)};
}

NATTEN_HD int64_t token_index(Int3 grid, Int3 t) { return (int64_t{t.z} * grid.y + t.y) * grid.x + t.x; }

/// Entries per axis of the relative position bias of a head.
NATTEN_HD Int3 bias_table(const Problem& p) {
  return {2 * p.axes[0].window - 1, 2 * p.axes[1].window - 1, 2 * p.axes[2].window - 1};
}

template <class T>
NATTEN_HD double dot(const T* a, const T* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += double(to_real(a[i])) * double(to_real(b[i]));
  return sum;
}

/// An element of lse or dlse.
NATTEN_HD double load_sum(const Problem& p, const TensorView& t, int64_t batch, Int3 token, int head) {
  const int64_t at = offset(t, batch, token, head);
  return p.dtype == DType::f64 ? pointer<double>(t)[at] : double(pointer<float>(t)[at]);
}

/// An lse that was rounded to float can be below a logit; no probability exceeds 1. NaN stays.
NATTEN_HD double probability(double logit, double lse) {
  const double exponent = logit - lse;
  return lse == -HUGE_VAL ? 0 : exp(exponent > 0 ? 0 : exponent);
}

}  // namespace natten
