// SPDX-License-Identifier: MIT
// Hands a problem to the backend that its plan names.
#include "natten/attention.h"

#include <thread>
#include <vector>

#include "core/backend.h"
#include "natten/error.h"

namespace natten {

const Backend& backend_of(const Plan& plan) {
  for (const Backend* backend : kBackends)
    if (plan.backend == backend->name) return *backend;
  throw Error(ErrorKind::invalid_argument, "this build has no engine '" + std::string(plan.backend) + "'");
}

namespace {

bool is_empty(const Problem& p) { return p.batch == 0 || p.tokens() == 0; }

}  // namespace

Executor serial_executor() {
  return {1, [](int64_t count, const std::function<void(int64_t)>& task) {
            for (int64_t i = 0; i < count; ++i) task(i);
          }};
}

Executor thread_executor(int num_threads) {
  return {num_threads, [num_threads](int64_t count, const std::function<void(int64_t)>& task) {
            auto share = [&](int64_t thread) {
              for (int64_t i = thread; i < count; i += num_threads) task(i);
            };
            std::vector<std::thread> threads;
            for (int t = 1; t < num_threads; ++t) threads.emplace_back(share, t);
            share(0);
            for (std::thread& t : threads) t.join();
          }};
}

size_t workspace_bytes(const Problem& problem, Pass pass, const Plan& plan, int num_threads) {
  return backend_of(plan).workspace_bytes(problem, pass, plan, num_threads);
}

void forward(const Problem& problem, const ForwardArgs& args, const Plan& plan, const Executor& executor,
             void* workspace) {
  if (!is_empty(problem)) backend_of(plan).forward(problem, args, plan, executor, workspace);
}

void backward(const Problem& problem, const BackwardArgs& args, const Plan& plan, const Executor& executor,
              void* workspace) {
  // NOTE: also without queries: gradients of the bias and of additional keys are then zero, and must be written.
  backend_of(plan).backward(problem, args, plan, executor, workspace);
}

}  // namespace natten
