// SPDX-License-Identifier: MIT
// Several samples in one call against the dense attention of each. Covers T-1 and T-35 (guards, outputs written), T-10
// (empty samples), T-42 and T-43 (bias, shared heads), T-47 (the same bits for any number of threads).
#include "natten/packed.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cases.h"
#include "operands.h"

namespace {

using natten::DType;
using natten::Pass;
using test::Case;
using test::Operands;

using Batch = std::vector<Operands>;

/// One batch of samples that differ in more than their grids: a unit must take everything from its own problem.
std::vector<Case> samples() {
  return {{.name = "", .axes = {{5, 3}, {18, 4}}, .heads = 4, .heads_kv = 2, .bias = true, .dlse = true},
          {.name = "", .axes = {{4, 3}, {0, 4}}, .heads = 4, .heads_kv = 2, .bias = true, .dlse = true},
          {.name = "", .axes = {{30, 5, 1, 2}, {41, 7}}, .heads = 2, .head_dim_v = 6},
          {.name = "", .axes = {{9, 0}}, .batch = 2, .heads = 4, .heads_kv = 1, .extra = 20, .dlse = true},
          {.name = "", .axes = {{1, 1}}, .heads = 3, .layout = test::Layout::heads_first},
          {.name = "", .axes = {{17, 17, 1, 1, true}}, .heads = 2, .layout = test::Layout::packed}};
}

Batch make_batch(DType dtype) {
  Batch batch;
  for (const Case& c : samples()) batch.emplace_back(c, dtype, uint32_t(batch.size()));
  return batch;
}

template <class Sample>
std::vector<Sample> to_samples(const Batch& batch, Pass pass, const std::string& wanted) {
  std::vector<Sample> list;
  for (const Operands& o : batch)
    list.push_back({o.problem, o.args(), natten::choose_plan(o.problem, pass, test::kDevice, wanted)});
  return list;
}

template <class Sample>
void run_pass(Batch& batch, Pass pass, const natten::Executor& executor, const std::string& wanted,
              void (*run)(std::span<const Sample>, const natten::Executor&, void*)) {
  for (Operands& o : batch)
    for (const auto& [name, tensor] : o.outputs(pass)) tensor->poison();
  const std::vector<Sample> list = to_samples<Sample>(batch, pass, wanted);
  const std::span<const Sample> all(list);
  const auto bytes = int64_t(workspace_bytes(all, executor.num_threads));
  test::Tensor workspace(DType::f32, {1, 1, 1, 1, 1, bytes / 4 + 1}, test::Layout::contiguous);
  run(all, executor, workspace.view().ptr);
  EXPECT_TRUE(workspace.guards_intact());
  for (Operands& o : batch)
    for (const auto& [name, tensor] : o.outputs(pass)) EXPECT_TRUE(tensor->guards_intact()) << name;
}

void run(Batch& batch, Pass pass, const natten::Executor& executor, const std::string& wanted = "") {
  if (pass == Pass::forward)
    run_pass<natten::ForwardSample>(batch, pass, executor, wanted, natten::forward);
  else
    run_pass<natten::BackwardSample>(batch, pass, executor, wanted, natten::backward);
}

TEST(Packed, EverySampleIsAProblemOfItsOwn) {
  const std::string reference = test::kDevice == natten::DeviceKind::cpu ? "reference" : "cuda-reference";
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (const std::string& wanted : {std::string(), reference}) {
      SCOPED_TRACE(test::to_string(dtype) + " " + wanted);
      Batch batch = make_batch(dtype);
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        run(batch, pass, natten::serial_executor(), wanted);
        for (size_t i = 0; i < batch.size(); ++i) {
          SCOPED_TRACE(i);
          test::Reference(batch[i]).check(batch[i], pass);
        }
      }
    }
}

TEST(Packed, GivesTheSameBitsForAnyNumberOfThreads) {
  if (test::kDevice != natten::DeviceKind::cpu) return;
  Batch batch = make_batch(DType::f32);
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    run(batch, pass, natten::serial_executor());
    std::vector<std::vector<std::vector<std::byte>>> once;
    for (Operands& o : batch) once.push_back(test::snapshot(o, pass));
    for (const natten::Executor& executor : {natten::thread_executor(2), natten::thread_executor(5),
                                             test::reverse_executor(3), test::reverse_executor(64)}) {
      run(batch, pass, executor);
      for (size_t i = 0; i < batch.size(); ++i) EXPECT_EQ(test::snapshot(batch[i], pass), once[i]) << i;
    }
  }
}

TEST(Packed, TakesNoSamples) {
  EXPECT_EQ(workspace_bytes(std::span<const natten::ForwardSample>(), 4), 0u);
  natten::forward(std::span<const natten::ForwardSample>(), natten::serial_executor(), nullptr);
  natten::backward(std::span<const natten::BackwardSample>(), natten::serial_executor(), nullptr);
}

}  // namespace
