// SPDX-License-Identifier: MIT
// The families of kernels of this engine, as backend.cpp sees them: whether a family can run a problem, how much
// workspace it takes, and the two passes. All memory is on the device.
#pragma once
#include <cstddef>
#include <span>
#include <string_view>

#include "core/backend.h"
#include "cuda/portable/boxes.h"

namespace natten::cuda_portable {

// Variants of plans: the kernels, and how exact their products of floats are.
constexpr std::string_view kWindow = "window", kBoxes = "boxes", kBoxesTf32 = "boxes-tf32";

/// Null, or the first requirement that the problem does not meet.
const char* why_not_boxes(const Problem& problem, Pass pass);
Int3 boxes_tile(const Problem& problem, Pass pass);
/// A problem as the one sample of a call.
BoxesSample only_sample(const Problem& problem);
/// Several samples are parts of the same tensors, at most kMostSamples of them and without a gradient of the bias:
/// `problem` is then the largest one, with the most keys, and views have strides of 0 along z and y.
/// `tf32` lets products of floats be as exact as tf32 is, instead of as exact as floats are.
size_t boxes_workspace(const Problem& problem, Pass pass, std::span<const BoxesSample> samples);
void boxes_forward(const Problem& problem, const ForwardArgs& args, std::span<const BoxesSample> samples, bool tf32,
                   void* stream);
void boxes_backward(const Problem& problem, const BackwardArgs& args, std::span<const BoxesSample> samples, bool tf32,
                    void* stream, void* workspace);

/// All samples of a packed call; workspace as `workspace_bytes` of the core.
size_t samples_workspace(std::span<const BackwardSample> samples);
void run_samples(std::span<const ForwardSample> samples, const Executor& executor, void* workspace);
void run_samples(std::span<const BackwardSample> samples, const Executor& executor, void* workspace);

const char* why_not_window(const Problem& problem, Pass pass);
Int3 window_tile(const Problem& problem, Pass pass);
/// False, and nothing done, if layouts (alignment, 32-bit offsets) or the scale do not fit: then boxes run it.
bool window_forward(const Problem& problem, const ForwardArgs& args, void* stream);
bool window_backward(const Problem& problem, const BackwardArgs& args, void* stream, void* workspace);
size_t window_workspace(const Problem& problem, Pass pass);

/// Null, or why this engine cannot run anything here.
const char* why_not_this_gpu();
extern const UnfusedKernels kUnfused;

}  // namespace natten::cuda_portable
