// SPDX-License-Identifier: MIT
// Attention in two steps with the attention tensor in memory between them, for whoever changes weights on the way or
// wants to see them: `qk` writes the logits of every window, `av` sums values by weights. Both are bilinear, so each
// pass below is made of the same few products, and so is every derivative of them.
//
// An attention tensor is [batch, z, y, x, heads, slots]. Slots are row-major over the window as the user gave it, the
// additional keys behind them; slot j of an axis is key j of the query's span. Where a causal or cut window has fewer
// keys, the last slots of the axis are unused:
//
//   window 4, causal, query 2      slots  0 1 2 -      keys 0 1 2
#pragma once
#include <cmath>

#include "natten/attention.h"

namespace natten {

/// Slots of a query: all of the window as given, and the additional keys.
NATTEN_HD int64_t num_slots(const Problem& p) {
  int64_t slots = p.has_window() ? 1 : 0;
  for (const Axis& a : p.axes) slots *= a.window;
  return slots + p.extra_keys;
}

/// `validate`, and that an attention tensor of this problem can be counted.
void validate_unfused(const Problem& p);

/// Element type is Problem::dtype throughout; sums are in accumulator_of(dtype).
/// attn[q, slot] = scale * <q, k[slot]> + bias[k - q], and `unused` where there is no key.
struct QkArgs {
  TensorView q, k, bias, extra_k;  ///< as in ForwardArgs
  TensorView attn;
  double unused = -HUGE_VAL;
};
struct QkBackwardArgs {
  TensorView dattn;                    ///< unused slots may hold anything
  TensorView q, k, bias, extra_k;      ///< the bias is not read
  TensorView dq, dk, dbias, dextra_k;  ///< overwritten; a null one is skipped
};
/// out[q] = sum over slots of attn[q, slot] * v[slot]; unused slots may hold anything.
struct AvArgs {
  TensorView attn, v, extra_v, out;
};
struct AvBackwardArgs {
  TensorView dout, attn, v, extra_v;
  TensorView dattn, dv, dextra_v;  ///< overwritten, dattn with 0 in unused slots; a null one is skipped
};

/// As list_plans and choose_plan for the fused operator. A plan serves all four passes.
PlanList list_unfused_plans(const Problem& problem, DeviceKind device);
Plan choose_unfused_plan(const Problem& problem, DeviceKind device, std::string_view wanted = {});
size_t unfused_workspace_bytes(const Problem& problem, const Plan& plan, int num_threads);

/// The same bits for every number of threads and in every repetition.
void qk(const Problem& p, const QkArgs& args, const Plan& plan, const Executor& executor, void* workspace);
void qk_backward(const Problem& p, const QkBackwardArgs& args, const Plan& plan, const Executor& executor,
                 void* workspace);
void av(const Problem& p, const AvArgs& args, const Plan& plan, const Executor& executor, void* workspace);
void av_backward(const Problem& p, const AvBackwardArgs& args, const Plan& plan, const Executor& executor,
                 void* workspace);

}  // namespace natten
