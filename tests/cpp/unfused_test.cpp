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

const auto kName = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Named, Unfused, testing::ValuesIn(test::named_cases()), kName);

/// Several tiles of the CUDA engine's octets (T-1), slots in shared memory and too many for it: rows of slots
/// on and off 16-byte boundaries, all channels of its buckets, windows that change the last row or column of a tile.
std::vector<Case> tiled_cases() {
  const auto axis = [](int extent, int window, int dilation = 1, bool causal = false, int stride = 1) {
    return natten::Axis{extent, window, stride, dilation, causal};
  };
  return {
      {.name = "plane", .axes = {axis(17, 7), axis(24, 7)}, .heads = 2, .head_dim = 32},
      {.name = "plane_of_large_tiles", .axes = {axis(21, 3), axis(17, 3)}, .batch = 3, .heads = 2, .head_dim = 32},
      {.name = "plane_bias", .axes = {axis(19, 5), axis(21, 7)}, .batch = 2, .head_dim = 64, .bias = true},
      {.name = "plane_causal", .axes = {axis(18, 7, 1, true), axis(17, 6, 1, true)}, .head_dim = 32, .bias = true},
      {.name = "plane_heads_first",
       .axes = {axis(17, 7), axis(23, 7)},
       .heads = 2,
       .head_dim = 32,
       .layout = test::Layout::heads_first},
      {.name = "plane_dilated", .axes = {axis(23, 4, 2), axis(37, 5, 3)}, .head_dim = 32, .bias = true},
      {.name = "plane_stride", .axes = {axis(18, 6, 1, false, 3), axis(21, 5, 1, false, 2)}, .head_dim = 128},
      {.name = "plane_13", .axes = {axis(15, 13), axis(18, 13)}, .head_dim = 32},
      {.name = "plane_shared_heads", .axes = {axis(17, 5), axis(18, 3)}, .heads = 4, .heads_kv = 2, .head_dim = 96},
      {.name = "volume", .axes = {axis(5, 3), axis(9, 5), axis(18, 5)}, .head_dim = 32},
      {.name = "line", .axes = {axis(150, 9, 1, true)}, .heads = 2, .head_dim = 40},
      {.name = "line_wide", .axes = {axis(160, 150)}, .head_dim = 128, .bias = true},
      {.name = "line_extra", .axes = {axis(140, 8)}, .head_dim = 64, .extra = 70},
      {.name = "column", .axes = {axis(40, 9), axis(1, 1)}, .head_dim = 16},
  };
}
INSTANTIATE_TEST_SUITE_P(Tiled, Unfused, testing::ValuesIn(tiled_cases()), kName);

TEST(UnfusedProblems, AnAttentionTensorMustBeCountable) {
  natten::Problem p;
  for (natten::Axis& a : p.axes) a.window = 1 << 28;
  natten::validate(p);
  EXPECT_THROW(natten::validate_unfused(p), natten::Error);
}

}  // namespace
