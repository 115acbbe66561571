// SPDX-License-Identifier: MIT
// Every plan of every case against the dense attention: forward, backward, guard bands, determinism. The guard bands,
// the NaN in every output and in the workspace, and the check that inputs stay as they are, are part of each run.
// Covers T-1 (tile edges, guard bands), T-2 to T-5, T-7, T-9, T-12, T-24 (tiny and empty problems), T-30 (layouts),
// T-31 (alignment), T-32 (inputs unchanged), T-35 (every output is written), T-40 to T-44 (lse gradient, additional
// keys, bias, shared heads, values of another length), T-47 (determinism), T-51 (extreme logits).
#include "natten/attention.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "operands.h"

namespace {

using natten::DType;
using natten::Pass;
using natten::Plan;
using test::Case;
using test::Operands;

constexpr DType kTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
constexpr uint32_t kSeed = 7;

std::vector<Plan> plans(const natten::Problem& problem, Pass pass) {
  natten::validate(problem);
  return natten::list_plans(problem, pass, test::kDevice).plans;
}

void run_best_forward(Operands& operands) {
  run(operands, Pass::forward, natten::choose_plan(operands.problem, Pass::forward, test::kDevice));
}

void check_forward(const Case& c, DType dtype) {
  SCOPED_TRACE(c.name + " " + test::to_string(dtype));
  Operands operands(c, dtype, kSeed);
  const test::Reference reference(operands);
  for (const Plan& plan : plans(operands.problem, Pass::forward)) {
    SCOPED_TRACE(natten::to_string(plan));
    run(operands, Pass::forward, plan);
    reference.check(operands, Pass::forward, plan);
  }
}

void check_backward(const Case& c, DType dtype) {
  SCOPED_TRACE(c.name + " " + test::to_string(dtype));
  Operands operands(c, dtype, kSeed);
  const test::Reference reference(operands);
  for (const Plan& plan : plans(operands.problem, Pass::backward)) {
    SCOPED_TRACE(natten::to_string(plan));
    run_forward_for(operands, plan);
    run(operands, Pass::backward, plan);
    reference.check(operands, Pass::backward, plan);
  }
}

/// The same bits for any number of threads, any order of tasks and in a repetition.
void check_determinism(const Case& c, DType dtype, Pass pass) {
  SCOPED_TRACE(c.name + " " + test::to_string(dtype) + (pass == Pass::forward ? " forward" : " backward"));
  Operands operands(c, dtype, kSeed);
  for (const Plan& plan : plans(operands.problem, pass)) {
    SCOPED_TRACE(natten::to_string(plan));
    if (pass == Pass::backward) run_forward_for(operands, plan);
    run(operands, pass, plan);
    const auto once = test::snapshot(operands, pass);
    for (const natten::Executor& executor :
         {natten::serial_executor(), natten::thread_executor(1), natten::thread_executor(2), natten::thread_executor(3),
          test::reverse_executor(3), test::reverse_executor(16)}) {
      run(operands, pass, plan, executor);
      EXPECT_EQ(test::snapshot(operands, pass), once) << executor.num_threads << " threads";
    }
  }
}

class Attention : public testing::TestWithParam<Case> {};

TEST_P(Attention, Forward) {
  for (const DType dtype : kTypes) check_forward(GetParam(), dtype);
}

TEST_P(Attention, Backward) {
  for (const DType dtype : kTypes) check_backward(GetParam(), dtype);
}

TEST_P(Attention, Determinism) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16})
    for (const Pass pass : {Pass::forward, Pass::backward}) check_determinism(GetParam(), dtype, pass);
}

INSTANTIATE_TEST_SUITE_P(Named, Attention, testing::ValuesIn(test::named_cases()),
                         [](const auto& info) { return info.param.name; });

class Sweep : public testing::TestWithParam<int> {};

TEST_P(Sweep, ForwardAndBackwardAtEveryTileEdge) {
  const std::vector<Case> cases = test::sweep_cases(GetParam());
  for (size_t i = 0; i < cases.size() && !HasFailure(); ++i) {
    for (const DType dtype : {DType::f32, i % 3 == 0 ? DType::f64 : i % 3 == 1 ? DType::bf16 : DType::f16}) {
      const natten::Axis& x = cases[i].axes.back();
      SCOPED_TRACE("x: extent " + std::to_string(x.extent) + " window " + std::to_string(x.window) + " stride " +
                   std::to_string(x.stride) + " dilation " + std::to_string(x.dilation) + (x.causal ? " causal" : ""));
      check_forward(cases[i], dtype);
      check_backward(cases[i], dtype);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, Sweep, testing::Values(1, 2, 3));

// ---- outputs that are not wanted ----

TEST(Calls, SkipsEachGradientWhoseAddressIsNull) {
  const Case c{.name = "", .axes = {{6, 3}, {18, 5}}, .heads = 2, .extra = 3, .bias = true, .dlse = true};
  Operands operands(c, DType::f32, kSeed);
  for (const Plan& plan : plans(operands.problem, Pass::backward)) {
    SCOPED_TRACE(natten::to_string(plan));
    run_forward_for(operands, plan);
    run(operands, Pass::backward, plan);
    const Operands::Named outputs = operands.outputs(Pass::backward);
    const auto all = test::snapshot(operands, Pass::backward);
    for (size_t skipped = 0; skipped < outputs.size(); ++skipped) {
      test::Tensor absent;
      std::swap(absent, *outputs[skipped].second);
      run(operands, Pass::backward, plan);
      std::swap(absent, *outputs[skipped].second);
      for (size_t i = 0; i < outputs.size(); ++i)
        EXPECT_TRUE(i == skipped || outputs[i].second->snapshot() == all[i]) << outputs[i].first;
    }
  }
}

TEST(Calls, GradientsOfAnEmptyBatchAreZero) {
  const Case c{.name = "", .axes = {{5, 3}}, .batch = 0, .bias = true};
  Operands operands(c, DType::f32, kSeed);
  for (const Plan& plan : plans(operands.problem, Pass::backward)) {
    run(operands, Pass::backward, plan);
    for (const double x : operands.dbias.values()) EXPECT_EQ(x, 0.0) << natten::to_string(plan);
  }
}

TEST(Calls, ChangesWithEveryParameterOfTheWindow) {
  const Case plain{.name = "", .axes = {{9, 4}, {20, 4}}};
  const auto output = [](const Case& c) {
    Operands operands(c, DType::f32, kSeed);
    run_best_forward(operands);
    return operands.out.values();
  };
  const std::vector<double> out = output(plain);
  for (size_t axis = 0; axis < 2; ++axis) {
    for (int change = 0; change < 4; ++change) {
      Case c = plain;
      if (change == 0) c.axes[axis].window = 5;
      if (change == 1) c.axes[axis].stride = 2;
      if (change == 2) c.axes[axis].dilation = 2;
      if (change == 3) c.axes[axis].causal = true;
      EXPECT_NE(output(c), out) << "axis " << axis << " change " << change;
    }
  }
}

}  // namespace
