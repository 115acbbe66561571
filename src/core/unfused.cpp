// SPDX-License-Identifier: MIT
// The passes of unfused attention as products, which the backend of the plan computes.
#include "natten/unfused.h"

#include "core/backend.h"
#include "natten/error.h"

namespace natten {
namespace {

const UnfusedKernels& kernels_of(const Plan& plan) {
  if (const UnfusedKernels* kernels = backend_of(plan).unfused) return *kernels;
  throw Error(ErrorKind::invalid_argument, "engine '" + std::string(plan.backend) + "' has no unfused operators");
}

}  // namespace

size_t unfused_workspace_bytes(const Problem& problem, const Plan& plan, int num_threads) {
  return kernels_of(plan).workspace_bytes(problem, plan, num_threads);
}

void qk(const Problem& p, const QkArgs& args, const Plan& plan, const Executor& executor, void* workspace) {
  const Product product{p.head_dim, p.scale, args.attn, args.q, args.k, args.extra_k, args.bias, args.unused};
  kernels_of(plan).scores(p, product, plan, executor, workspace);
}

void qk_backward(const Problem& p, const QkBackwardArgs& args, const Plan& plan, const Executor& executor,
                 void* workspace) {
  const UnfusedKernels& kernels = kernels_of(plan);
  if (args.dq)
    kernels.weigh_keys(p, {p.head_dim, p.scale, args.dattn, args.dq, args.k, args.extra_k, {}}, plan, executor,
                       workspace);
  if (args.dk || args.dextra_k)
    kernels.weigh_queries(p, {p.head_dim, p.scale, args.dattn, args.q, args.dk, args.dextra_k, {}}, plan, executor,
                          workspace);
  if (args.dbias) kernels.sum_bias(p, {0, 1.0, args.dattn, {}, {}, {}, args.dbias}, plan, executor, workspace);
}

void av(const Problem& p, const AvArgs& args, const Plan& plan, const Executor& executor, void* workspace) {
  kernels_of(plan).weigh_keys(p, {p.head_dim_v, 1.0, args.attn, args.out, args.v, args.extra_v, {}}, plan, executor,
                              workspace);
}

void av_backward(const Problem& p, const AvBackwardArgs& args, const Plan& plan, const Executor& executor,
                 void* workspace) {
  const UnfusedKernels& kernels = kernels_of(plan);
  if (args.dattn)
    kernels.scores(p, {p.head_dim_v, 1.0, args.dattn, args.dout, args.v, args.extra_v, {}}, plan, executor, workspace);
  if (args.dv || args.dextra_v)
    kernels.weigh_queries(p, {p.head_dim_v, 1.0, args.attn, args.dout, args.dv, args.dextra_v, {}}, plan, executor,
                          workspace);
}

}  // namespace natten
