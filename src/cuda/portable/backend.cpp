// SPDX-License-Identifier: MIT
// The engine for every GPU from compute capability 8.0 on, as the core sees it.
#include "core/backend.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

void list_plans(const Problem& p, Pass pass, Wanted wanted, PlanList& list) {
  if (const char* reason = why_not_this_gpu()) return list.rejections.push_back({kBackend.name, reason});
  if (const char* reason = why_not_window(p, pass))
    list.rejections.push_back({"portable/window", reason});
  else
    list.plans.push_back({kBackend.name, kWindow, window_tile(p, pass)});
  if (wanted == Wanted::best && !list.plans.empty()) return;
  if (const char* reason = why_not_boxes(p, pass)) {
    list.rejections.push_back({"portable/boxes", reason});
    return;
  }
  list.plans.push_back({kBackend.name, kBoxes, boxes_tile(p, pass)});
  if (p.dtype == DType::f32)
    list.plans.push_back({kBackend.name, kBoxesTf32, boxes_tile(p, pass)});
  else
    list.rejections.push_back({"portable/boxes-tf32", "it runs float32 only"});
}

size_t workspace_bytes(const Problem& p, Pass pass, const Plan& plan, int) {
  const BoxesSample all = only_sample(p);
  const size_t boxes = boxes_workspace(p, pass, {&all, 1});
  return plan.variant == kWindow ? std::max(window_workspace(p, pass), boxes) : boxes;
}

void forward(const Problem& p, const ForwardArgs& args, const Plan& plan, const Executor& executor, void*) {
  if (plan.variant == kWindow && window_forward(p, args, executor.stream)) return;
  const BoxesSample all = only_sample(p);
  boxes_forward(p, args, {&all, 1}, plan.variant == kBoxesTf32, executor.stream);
}

void backward(const Problem& p, const BackwardArgs& args, const Plan& plan, const Executor& executor, void* workspace) {
  if (plan.variant == kWindow && window_backward(p, args, executor.stream, workspace)) return;
  const BoxesSample all = only_sample(p);
  boxes_backward(p, args, {&all, 1}, plan.variant == kBoxesTf32, executor.stream, workspace);
}

}  // namespace

const char* why_not_this_gpu() {
  const cuda::DeviceInfo* device = cuda::current_device();
  if (!device) return "there is no GPU that CUDA 13 can use: none, or a driver before 580";
  return device->major < 8 ? "it needs a GPU of compute capability 8.0 or newer" : nullptr;
}

constexpr PackedKernels kPacked{samples_workspace, run_samples, run_samples};

const Backend kBackend{"portable", DeviceKind::cuda, list_plans, workspace_bytes,
                       forward,    backward,         &kUnfused,  &kPacked};

}  // namespace natten::cuda_portable
