// SPDX-License-Identifier: MIT
// Several problems in one call: the samples of a packed batch, whose grids differ. A sample is a problem of its own,
// with views of its tokens; no two samples share an output. All are of one element type and one device.
#pragma once
#include <span>

#include "natten/attention.h"

namespace natten {

struct ForwardSample {
  Problem problem;
  ForwardArgs args;
  Plan plan;
};
struct BackwardSample {
  Problem problem;
  BackwardArgs args;
  Plan plan;
};

/// Memory for one call, as for a single problem.
size_t workspace_bytes(std::span<const ForwardSample> samples, int num_threads);
size_t workspace_bytes(std::span<const BackwardSample> samples, int num_threads);

/// As `forward` and `backward` of each sample, with all their work in one run over the executor's threads.
void forward(std::span<const ForwardSample> samples, const Executor& executor, void* workspace);
void backward(std::span<const BackwardSample> samples, const Executor& executor, void* workspace);

}  // namespace natten
