// SPDX-License-Identifier: MIT
// Dense attention in double precision under a mask: what every engine is compared with, the library's own reference
// included. It is written from the window formula of arXiv 2504.16922, section 3, in raw coordinates and includes
// nothing of the library, so that no mistake can stand on both sides of a comparison.
#pragma once
#include <vector>

namespace dense {

struct Axis {
  int extent = 1, window = 1, stride = 1, dilation = 1;
  bool causal = false;
};

struct Problem {
  int batch = 1, heads = 1, heads_kv = 1, head_dim = 1, head_dim_v = 1;
  Axis axes[3];  // slowest first
  int extra_keys = 0;
  bool has_bias = false;
  double scale = 1.0;
};

using Array = std::vector<double>;

/// All contiguous. Grid tensors are [batch, token, head, channel], extra ones [batch, key, head, channel], the bias is
/// [z, y, x, head], dlse is [batch, token, head]. An empty dout means: no backward; an empty dlse means zeros.
struct Inputs {
  Array q, k, v, bias, extra_k, extra_v, dout, dlse;
};

struct Results {
  Array out, lse, dq, dk, dv, dbias, dextra_k, dextra_v;
  double max_logit = 0.0;  // largest magnitude among finite ones
  double max_dp = 0.0;     // largest magnitude of <dout, v>
};

/// Whether a query sees a key, both being tokens of the axis. Windows larger than a dilation group are cut to it.
bool sees(const Axis& axis, int query, int key);

using Round = double (*)(double);

/// Rounding as a computation in a lower precision would do it; null is exact.
struct Rounding {
  Round stored = nullptr;  // out and the gradients, which any implementation stores in that precision
  Round scores = nullptr;  // P and dS, which one of plain matrix products stores as well
};

/// Queries all of whose logits are -infinity get out 0, lse -infinity and no gradient.
Results attention(const Problem& problem, const Inputs& inputs, Rounding rounding = {});

}  // namespace dense
