// SPDX-License-Identifier: MIT
// The two passes of the engine, launched on executor.stream.
#pragma once
#include "core/backend.h"

namespace natten::cuda_reference {

extern const UnfusedKernels kUnfused;

/// Adds the engine's plan if this GPU can run it, else why it cannot.
void list_if_usable(PlanList& list);

/// Blocks for `items` pieces of work, of which a block takes `per_block` at a time. Kernels loop, so a grid never has
/// more blocks than the device can keep busy.
int num_blocks(int64_t items, int per_block);

void forward(const Problem& p, const ForwardArgs& args, void* stream);
/// `delta` holds one double per query.
void backward(const Problem& p, const BackwardArgs& args, double* delta, void* stream);

}  // namespace natten::cuda_reference
