// SPDX-License-Identifier: MIT
// The oracle on the GPU: it runs every valid problem, forward and backward, with all sums in double and nothing clever.
// It is the engine of float64, of GPUs older than sm_80, and of whatever the other engines refuse.
#include "core/backend.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/reference/kernels.h"
#include "natten/error.h"

namespace natten::cuda_reference {

int num_blocks(int64_t items, int per_block) {
  constexpr int kBlocksPerSm = 16;
  const cuda::DeviceInfo* device = cuda::current_device();
  if (!device) throw Error(ErrorKind::cuda, "there is no CUDA device that this process can use");
  return int(std::min<int64_t>((items + per_block - 1) / per_block, int64_t{device->num_sms} * kBlocksPerSm));
}

void list_if_usable(PlanList& list) {
  const cuda::DeviceInfo* device = cuda::current_device();
  if (!device)
    list.rejections.push_back({kBackend.name, "there is no GPU that CUDA 13 can use: none, or a driver before 580"});
  else if (device->major * 10 + device->minor < 75)
    list.rejections.push_back({kBackend.name, "it needs compute capability 7.5 or newer, but this GPU has " +
                                                  std::to_string(device->major) + "." + std::to_string(device->minor)});
  else
    list.plans.push_back({kBackend.name, "", {}});
}

namespace {

void list_plans(const Problem&, Pass, Wanted, PlanList& list) { list_if_usable(list); }

size_t workspace_bytes(const Problem& p, Pass pass, const Plan&, int) {
  return pass == Pass::forward ? 0 : sizeof(double) * p.batch * p.tokens() * p.heads;
}

void run_forward(const Problem& p, const ForwardArgs& args, const Plan&, const Executor& executor, void*) {
  forward(p, args, executor.stream);
}

void run_backward(const Problem& p, const BackwardArgs& args, const Plan&, const Executor& executor, void* workspace) {
  backward(p, args, static_cast<double*>(workspace), executor.stream);
}

}  // namespace

const Backend kBackend{"cuda-reference", DeviceKind::cuda, list_plans, workspace_bytes,
                       run_forward,      run_backward,     &kUnfused};

}  // namespace natten::cuda_reference
