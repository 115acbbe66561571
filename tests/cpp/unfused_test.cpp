// SPDX-License-Identifier: MIT
// The four passes of unfused attention, by every plan of every case, against sums over all pairs that the dense
// attention's `sees` allows. Guard bands, poisoned outputs and workspaces, inputs of every layout, determinism; slots
// without a key hold NaN wherever an engine reads weights.
#include "natten/unfused.h"

#include <gtest/gtest.h>

#include <string>

#include "cases.h"
#include "natten/error.h"
#include "unfused_operands.h"

namespace {

using natten::DType;
using test::Case;

class Unfused : public testing::TestWithParam<Case> {};

TEST_P(Unfused, EveryPassOfEveryPlan) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    const natten::Problem p = GetParam().problem(dtype);
    natten::validate_unfused(p);
    if (p.batch * p.heads * p.tokens() * natten::num_slots(p) > 60000) return;  // minutes, and the others see as much
    test::UnfusedOperands operands(GetParam(), dtype, 11);
    operands.expect();
    for (const natten::Plan& plan : natten::list_unfused_plans(p, test::kDevice).plans) {
      SCOPED_TRACE(natten::to_string(plan) + " " + test::to_string(dtype));
      operands.check(plan);
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Named, Unfused, testing::ValuesIn(test::named_cases()),
                         [](const auto& info) { return info.param.name; });

TEST(UnfusedProblems, AnAttentionTensorMustBeCountable) {
  natten::Problem p;
  for (natten::Axis& a : p.axes) a.window = 1 << 28;
  natten::validate(p);
  EXPECT_THROW(natten::validate_unfused(p), natten::Error);
}

TEST(UnfusedProblems, PlansAreForcedByName) {
  natten::Problem p;
  p.axes[2] = {20, 5, 1, 1, false};
  const auto name = [&](const char* wanted) {
    return natten::to_string(natten::choose_unfused_plan(p, natten::DeviceKind::cpu, wanted));
  };
  EXPECT_EQ(name("reference"), "reference");
  EXPECT_EQ(name("cpu/loops").substr(0, 10), "cpu/loops-");
  EXPECT_EQ(name("").substr(0, 12), "cpu/sliding-");
  EXPECT_THROW(name("nothing"), natten::Error);
}

}  // namespace
