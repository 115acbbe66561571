// SPDX-License-Identifier: MIT
// The entry points that each instruction set offers to backend.cpp: one table, one instance per instruction set.
#pragma once
#include "core/backend.h"

namespace natten::cpu {

/// The products of unfused attention.
struct UnfusedProducts {
  size_t (*workspace)(const Problem&, int num_threads);
  using Run = void (*)(const Problem&, const Product&, const Executor&, void* workspace);
  Run scores, weigh_keys, weigh_queries, sum_bias;
};

/// Null if the sliding kernels can run the problem.
const char* why_not_sliding(const Problem& p);

struct Kernels {
  Int3 (*sliding_q_tile)(const Problem&, Pass);
  size_t (*sliding_workspace)(const Problem&, Pass, int num_threads);
  void (*sliding_forward)(const Problem&, const ForwardArgs&, const Executor&, void* workspace);
  void (*sliding_backward)(const Problem&, const BackwardArgs&, const Executor&, void* workspace);
  size_t (*loops_workspace)(const Problem&, Pass, int num_threads);
  void (*loops_forward)(const Problem&, const ForwardArgs&, const Executor&, void* workspace);
  void (*loops_backward)(const Problem&, const BackwardArgs&, const Executor&, void* workspace);
  UnfusedProducts unfused_sliding, unfused_loops;
};

}  // namespace natten::cpu
