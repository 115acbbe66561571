// SPDX-License-Identifier: MIT
// The products of unfused attention (see core/backend.h) in this instruction set.
#pragma once
#include "core/backend.h"
#include "cpu/vec.h"

namespace natten::cpu::NATTEN_ISA {

size_t unfused_loops_workspace(const Problem& p, int num_threads);
void unfused_loops_scores(const Problem& p, const Product& t, const Executor& executor, void* workspace);
void unfused_loops_weigh_keys(const Problem& p, const Product& t, const Executor& executor, void* workspace);
void unfused_loops_weigh_queries(const Problem& p, const Product& t, const Executor& executor, void* workspace);
void unfused_loops_sum_bias(const Problem& p, const Product& t, const Executor& executor, void* workspace);

size_t unfused_sliding_workspace(const Problem& p, int num_threads);
void unfused_sliding_scores(const Problem& p, const Product& t, const Executor& executor, void* workspace);
void unfused_sliding_weigh_keys(const Problem& p, const Product& t, const Executor& executor, void* workspace);

}  // namespace natten::cpu::NATTEN_ISA
