// SPDX-License-Identifier: MIT
// The table of one instruction set's kernels.
#include "cpu/kernels.h"

#include "cpu/loops.h"
#include "cpu/sliding.h"
#include "cpu/unfused.h"

namespace natten::cpu::NATTEN_ISA {
namespace {

// For one thread; more threads may cut a grid of one row into narrower strips, which changes no result.
Int3 sliding_q_tile(const Problem& p, Pass pass) {
  const int strip =
      dispatch(p.dtype, [&](auto element) { return Layout<RealOf<decltype(element)>>(p, pass, 1).schedule.strip; });
  return {1, group_axis(p.axes[1], 0).extent < kRows ? group_axis(p.axes[1], 0).extent : kRows, strip};
}

size_t sliding_workspace(const Problem& p, Pass pass, int num_threads) {
  return pass == Pass::forward ? sliding_forward_workspace(p, num_threads) : sliding_backward_workspace(p, num_threads);
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels{sliding_q_tile,
                       sliding_workspace,
                       sliding_forward,
                       sliding_backward,
                       loops_workspace,
                       loops_forward,
                       loops_backward,
                       {unfused_sliding_workspace, unfused_sliding_scores, unfused_sliding_weigh_keys,
                        unfused_loops_weigh_queries, unfused_loops_sum_bias},
                       {unfused_loops_workspace, unfused_loops_scores, unfused_loops_weigh_keys,
                        unfused_loops_weigh_queries, unfused_loops_sum_bias}};

}  // namespace natten::cpu::NATTEN_ISA
