// SPDX-License-Identifier: MIT
// The kernels that take any problem: one query (or, for the gradients of keys and values, one key) at a time,
// vectorised over the channels. No two tasks write to the same place, and every sum has a fixed order.
#pragma once
#include "cpu/vec.h"
#include "natten/attention.h"

namespace natten::cpu::NATTEN_ISA {

size_t loops_workspace(const Problem& p, Pass pass, int num_threads);
void loops_forward(const Problem& p, const ForwardArgs& args, const Executor& executor, void* workspace);
void loops_backward(const Problem& p, const BackwardArgs& args, const Executor& executor, void* workspace);

}  // namespace natten::cpu::NATTEN_ISA
