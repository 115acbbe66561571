// SPDX-License-Identifier: MIT
// The CPU engine as the core sees it: two kernel families, `sliding` for stride 1 along x and `loops` for anything,
// each for every instruction set of this processor.
#include "core/backend.h"

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "natten/error.h"

namespace natten::cpu {

extern const UnfusedKernels kUnfused;  // unfused.cpp

namespace {

// One name for each family and instruction set; plans refer to them by address.
constexpr std::string_view kSliding[] = {"sliding-avx512", "sliding-avx2", "sliding-portable"};
constexpr std::string_view kLoops[] = {"loops-avx512", "loops-avx2", "loops-portable"};

// The scores of all slots of a few lanes are kept at once; beyond this they would not fit in any cache.
constexpr int64_t kMostSlots = 1 << 16;
// Elements of packed keys and values that a thread may hold.
constexpr double kMostRing = 1 << 27;

}  // namespace

const char* why_not_sliding(const Problem& p) {
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (!p.has_window()) return "kernel_size 0 has no windows to slide";
  const Axis x = group_axis(p.axes[2], 0);
  if (x.stride != 1) return "the last axis has a stride";
  if (p.extra_keys > 0) return "additional keys are not in this kernel";
  if (int64_t{group_axis(p.axes[0], 0).window} * group_axis(p.axes[1], 0).window * x.window > kMostSlots)
    return "the window has more than 65536 keys";
  const Axis z = group_axis(p.axes[0], 0), y = group_axis(p.axes[1], 0);
  if (double(z.window) * y.window * (x.window + 128.0) * (double(p.head_dim) + p.head_dim_v) > kMostRing)
    return "the key rows of a window would take gigabytes";
  return nullptr;
}

namespace {

void list_plans(const Problem& p, Pass pass, Wanted wanted, PlanList& list) {
  const char* reason = why_not_sliding(p);
  if (reason) list.rejections.push_back({"cpu/sliding", reason});
  for (Isa isa : isas()) {
    if (reason) break;
    list.plans.push_back({kBackend.name, kSliding[int(isa)], kernels(isa).sliding_q_tile(p, pass)});
    if (wanted == Wanted::best) return;
  }
  for (Isa isa : isas()) list.plans.push_back({kBackend.name, kLoops[int(isa)], {}});
}

struct Choice {
  bool sliding;
  const Kernels& kernels;
};

Choice choice_of(const Plan& plan) {
  for (Isa isa : isas()) {
    if (plan.variant == kSliding[int(isa)]) return {true, kernels(isa)};
    if (plan.variant == kLoops[int(isa)]) return {false, kernels(isa)};
  }
  throw Error(ErrorKind::invalid_argument, "the CPU engine has no kernel '" + std::string(plan.variant) + "' here");
}

size_t workspace_bytes(const Problem& p, Pass pass, const Plan& plan, int num_threads) {
  const Choice c = choice_of(plan);
  return c.sliding ? c.kernels.sliding_workspace(p, pass, num_threads)
                   : c.kernels.loops_workspace(p, pass, num_threads);
}

void forward(const Problem& p, const ForwardArgs& args, const Plan& plan, const Executor& executor, void* workspace) {
  const Choice c = choice_of(plan);
  (c.sliding ? c.kernels.sliding_forward : c.kernels.loops_forward)(p, args, executor, workspace);
}

void backward(const Problem& p, const BackwardArgs& args, const Plan& plan, const Executor& executor, void* workspace) {
  const Choice c = choice_of(plan);
  (c.sliding ? c.kernels.sliding_backward : c.kernels.loops_backward)(p, args, executor, workspace);
}

}  // namespace

const Backend kBackend{"cpu", DeviceKind::cpu, list_plans, workspace_bytes, forward, backward, &kUnfused};

}  // namespace natten::cpu
