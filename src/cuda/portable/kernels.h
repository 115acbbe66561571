// SPDX-License-Identifier: MIT
// The families of kernels of this engine, as backend.cpp sees them: whether a family can run a problem, how much
// workspace it takes, and the two passes. All memory is on the device.
#pragma once
#include <cstddef>

#include "core/backend.h"

namespace natten::cuda_portable {

/// Null, or the first requirement that the problem does not meet.
const char* why_not_boxes(const Problem& problem, Pass pass);
Int3 boxes_tile(const Problem& problem);
size_t boxes_workspace(const Problem& problem, Pass pass);
void boxes_forward(const Problem& problem, const ForwardArgs& args, void* stream);
void boxes_backward(const Problem& problem, const BackwardArgs& args, void* stream, void* workspace);

const char* why_not_window(const Problem& problem, Pass pass);
Int3 window_tile(const Problem& problem, Pass pass);
/// False, and nothing done, if the tensors' layouts do not fit (alignment, 32-bit offsets): then boxes run it.
bool window_forward(const Problem& problem, const ForwardArgs& args, void* stream);
bool window_backward(const Problem& problem, const BackwardArgs& args, void* stream, void* workspace);
size_t window_workspace(const Problem& problem, Pass pass);

/// Null, or why this engine cannot run anything here.
const char* why_not_this_gpu();
extern const UnfusedKernels kUnfused;

}  // namespace natten::cuda_portable
