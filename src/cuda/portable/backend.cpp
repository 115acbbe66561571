// SPDX-License-Identifier: MIT
// The engine for every GPU from compute capability 8.0 on, as the core sees it.
#include "core/backend.h"

#include "cuda/device.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr std::string_view kBoxes = "boxes";

void list_plans(const Problem& p, Pass pass, PlanList& list) {
  const cuda::DeviceInfo* device = cuda::current_device();
  if (!device)
    return list.rejections.push_back(
        {kBackend.name, "there is no GPU that CUDA 13 can use: none, or a driver before 580"});
  if (device->major < 8)
    return list.rejections.push_back({kBackend.name, "it needs a GPU of compute capability 8.0 or newer"});
  if (const char* reason = why_not_boxes(p, pass))
    list.rejections.push_back({"portable/boxes", reason});
  else
    list.plans.push_back({kBackend.name, kBoxes, boxes_tile(p)});
}

size_t workspace_bytes(const Problem& p, Pass pass, const Plan&, int) { return boxes_workspace(p, pass); }

void forward(const Problem& p, const ForwardArgs& args, const Plan&, const Executor& executor, void*) {
  boxes_forward(p, args, executor.stream);
}

void backward(const Problem& p, const BackwardArgs& args, const Plan&, const Executor& executor, void* workspace) {
  boxes_backward(p, args, executor.stream, workspace);
}

}  // namespace

const Backend kBackend{"portable", DeviceKind::cuda, list_plans, workspace_bytes, forward, backward};

}  // namespace natten::cuda_portable
