// SPDX-License-Identifier: MIT
// The unfused operators of the CPU engine as the core sees them.
#include "core/backend.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "natten/error.h"

namespace natten::cpu {
namespace {

constexpr std::string_view kSliding[] = {"sliding-avx512", "sliding-avx2", "sliding-portable"};
constexpr std::string_view kLoops[] = {"loops-avx512", "loops-avx2", "loops-portable"};

void list_plans(const Problem& p, PlanList& list) {
  const char* reason = why_not_sliding(p);
  if (reason) list.rejections.push_back({"cpu/sliding", reason});
  for (Isa isa : isas())
    if (!reason) list.plans.push_back({kBackend.name, kSliding[int(isa)], {}});
  for (Isa isa : isas()) list.plans.push_back({kBackend.name, kLoops[int(isa)], {}});
}

const UnfusedProducts& products_of(const Plan& plan) {
  for (Isa isa : isas())
    if (plan.variant == kSliding[int(isa)])
      return kernels(isa).unfused_sliding;
    else if (plan.variant == kLoops[int(isa)])
      return kernels(isa).unfused_loops;
  throw Error(ErrorKind::invalid_argument, "the CPU engine has no kernel '" + std::string(plan.variant) + "' here");
}

size_t workspace_bytes(const Problem& p, const Plan& plan, int num_threads) {
  return products_of(plan).workspace(p, num_threads);
}

template <UnfusedProducts::Run UnfusedProducts::*kProduct>
void run(const Problem& p, const Product& product, const Plan& plan, const Executor& executor, void* workspace) {
  (products_of(plan).*kProduct)(p, product, executor, workspace);
}

}  // namespace

extern const UnfusedKernels kUnfused;
const UnfusedKernels kUnfused{list_plans,
                              workspace_bytes,
                              run<&UnfusedProducts::scores>,
                              run<&UnfusedProducts::weigh_keys>,
                              run<&UnfusedProducts::weigh_queries>,
                              run<&UnfusedProducts::sum_bias>};

}  // namespace natten::cpu
