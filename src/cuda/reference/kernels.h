// SPDX-License-Identifier: MIT
// The two passes of the engine, launched on executor.stream.
#pragma once
#include "natten/attention.h"

namespace natten::cuda_reference {

/// Blocks for `items` pieces of work, of which a block takes `per_block` at a time. Kernels loop, so a grid never has
/// more blocks than the device can keep busy.
int num_blocks(int64_t items, int per_block);

void forward(const Problem& p, const ForwardArgs& args, void* stream);
/// `delta` holds one double per query.
void backward(const Problem& p, const BackwardArgs& args, double* delta, void* stream);

}  // namespace natten::cuda_reference
