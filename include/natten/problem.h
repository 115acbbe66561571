// SPDX-License-Identifier: MIT
// One attention problem: sizes, operator parameters, element type. Pointers are not part of it (see attention.h), so a
// problem can be planned, counted and validated before anything is allocated.
//
//   out[q] = sum over keys of P[q, key] * v[key],   P[q, :] = softmax(scale * <q, k[key]> + bias[key - q])
//
// over the keys of q's window (neighborhood.h) and, in the same softmax, the additional keys, which every query sees.
// Source: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143, section 3.1; dilation: arXiv
// 2209.15001; stride: arXiv 2504.16922, section 3.
#pragma once
#include <cstdint>

#include "natten/neighborhood.h"

namespace natten {

enum class DType : uint8_t { f32, f64, bf16, f16 };

/// Bytes of one element.
NATTEN_HD constexpr int size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
/// The type of `lse`, and of sums: double for double, float for everything else.
NATTEN_HD constexpr DType accumulator_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

struct Problem {
  DType dtype = DType::f32;
  int64_t batch = 1;
  int heads = 1;          ///< of q and out
  int heads_kv = 1;       ///< of k and v; divides `heads`; query head h reads key head h / (heads / heads_kv)
  int head_dim = 1;       ///< of q and k
  int head_dim_v = 1;     ///< of v and out
  Axis axes[3];           ///< z, y, x: slowest first; unused leading axes keep extent 1
  int extra_keys = 0;     ///< additional keys and values per sample
  bool has_bias = false;  ///< relative position bias, [heads, 2 * window - 1 per axis]; windows as given, not cut
  double scale = 1.0;     ///< zero means zero
  bool oversize = true;   ///< cut windows that are larger than their group; false: an error

  NATTEN_HD Int3 grid() const { return {axes[0].extent, axes[1].extent, axes[2].extent}; }
  NATTEN_HD int64_t tokens() const { return grid().volume(); }
  NATTEN_HD bool has_window() const { return axes[0].window > 0 && axes[1].window > 0 && axes[2].window > 0; }
  NATTEN_HD int heads_per_kv() const { return heads / heads_kv; }
};

/// Throws Error(invalid_argument) with one sentence if no engine could give a meaning to `p`.
void validate(const Problem& p);

/// Query-key pairs per sample and head, additional keys included; exact for every parameter.
/// Forward takes 2 * (head_dim + head_dim_v) flops per pair, backward 2 * (3 * head_dim + 2 * head_dim_v).
int64_t num_pairs(const Problem& p);

/// Multiply-adds of the forward pass, if every window were full: found without looking at the tokens.
double approximate_work(const Problem& p);

}  // namespace natten
