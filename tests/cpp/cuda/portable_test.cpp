// SPDX-License-Identifier: MIT
// The kernels for small windows on the emulated GPU: problems that reach them, and values that are not finite, those
// in the unfused operators too; tiles of 128 rows of the boxes kernels, which small grids do not get; and what float32
// asks of tensor cores (T-54). The tests of the CPU engines run on the same GPU and reach the others.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "cases.h"
#include "natten/unfused.h"
#include "operands.h"

namespace {

using natten::DeviceKind;
using natten::DType;
using natten::Pass;
using natten::Plan;
using test::Case;
using test::Operands;

constexpr uint32_t kSeed = 7;

std::vector<Plan> plans(const natten::Problem& problem, Pass pass) {
  natten::validate(problem);
  std::vector<Plan> list = natten::list_plans(problem, pass, DeviceKind::cuda).plans;
  std::erase_if(list, [](const Plan& plan) { return plan.backend != "portable"; });
  return list;
}

void check(const Case& c, DType dtype) {
  SCOPED_TRACE(c.name + " " + test::to_string(dtype));
  Operands operands(c, dtype, kSeed);
  const test::Reference reference(operands);
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    for (const Plan& plan : plans(operands.problem, pass)) {
      SCOPED_TRACE(natten::to_string(plan));
      if (pass == Pass::backward) run_forward_for(operands, plan);
      run(operands, pass, plan);
      reference.check(operands, pass, plan);
      const auto first = test::snapshot(operands, pass);
      run(operands, pass, plan);
      EXPECT_TRUE(test::snapshot(operands, pass) == first) << "other bits in a repetition";
    }
  }
}

class SmallWindows : public testing::TestWithParam<Case> {};

TEST_P(SmallWindows, IsNearTheDenseAttention) {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) check(GetParam(), dtype);
}

const auto kName = [](const auto& info) { return info.param.name; };
INSTANTIATE_TEST_SUITE_P(Portable, SmallWindows, testing::ValuesIn(test::small_window_cases()), kName);

TEST(SmallWindow, TakesABiasAndSharedKeyHeads) {
  for (const bool bias : {false, true})
    for (const int kv : {1, 2, 4}) {
      const Case c{.name = "", .axes = {{21, 7}, {37, 7}}, .heads = 4, .heads_kv = kv, .head_dim = 32, .bias = bias};
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        const std::vector<Plan> list = plans(c.problem(DType::bf16), pass);
        ASSERT_FALSE(list.empty());
        EXPECT_EQ(list[0].variant, "window") << "bias " << bias << ", key heads " << kv;
      }
    }
}

/// Windows that need square tiles, and channels that do not fill their bucket (T-31).
TEST(SmallWindow, TakesWindowsUpTo13AndEveryEighthHeadDim) {
  for (const int window : {9, 10, 12, 13})
    for (const int head_dim : {8, 24, 32, 48, 64})
      for (const int kv : {1, 2}) {
        Case c{.name = "", .axes = {{30, window}, {40, window}}, .heads = 2, .heads_kv = kv, .head_dim = head_dim};
        for (const Pass pass : {Pass::forward, Pass::backward})
          EXPECT_EQ(plans(c.problem(DType::f16), pass)[0].variant, "window") << window << ", head_dim " << head_dim;
        c.bias = true;
        EXPECT_EQ(plans(c.problem(DType::f16), Pass::forward)[0].variant, "window") << window;
      }
}

/// Whether results stay the same bits, for all queries, or change to something that is not finite.
void check_containment(Operands& operands, const Plan& plan, test::Tensor& poisoned, double bad) {
  SCOPED_TRACE(natten::to_string(plan));
  run(operands, Pass::forward, plan);
  const std::vector<double> before = operands.out.values();
  const test::Shape key = {1, 0, operands.problem.axes[1].extent / 2, operands.problem.axes[2].extent / 3, 0, 5};
  const double good = poisoned.get(key);
  poisoned.set(key, bad);
  run(operands, Pass::forward, plan);
  const std::vector<double> after = operands.out.values();
  poisoned.set(key, good);
  const bool value = &poisoned == &operands.v;
  const dense::Problem p = test::to_dense(operands.problem);
  size_t i = 0;
  operands.out.for_each([&](const test::Shape& at) {
    bool reached = at[0] == key[0] && at[4] == key[4] && (!value || at[5] == key[5]);
    for (size_t a = 0; a < 3; ++a) reached = reached && dense::sees(p.axes[a], int(at[a + 1]), int(key[a + 1]));
    EXPECT_TRUE(!reached || !std::isfinite(after[i])) << "a query sees it, but stayed finite";
    EXPECT_TRUE(reached || before[i] == after[i]) << "a query does not see it, but changed";
    EXPECT_TRUE(!reached || !value || std::isnan(bad) || after[i] == bad) << "not that infinity, but " << after[i];
    ++i;
  });
}

TEST(SmallWindow, ContainsNaNAndInfinityInKeysAndValues) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = HUGE_VAL;
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
    for (const natten::Axis& y : {natten::Axis{19, 5, 1, 1, false}, natten::Axis{18, 4, 1, 3, true}}) {
      // Wide windows are of tiles whose rows see other rows, and of channels that do not fill their bucket.
      Case c{.name = "", .axes = {y, natten::Axis{21, y.causal ? 12 : 7, 1, 1, false}}};
      c.batch = 2, c.heads = 2, c.head_dim = y.causal ? 24 : 32;
      Operands operands(c, dtype, kSeed);
      for (const Plan& plan : plans(operands.problem, Pass::forward)) {
        check_containment(operands, plan, operands.k, kNaN);
        for (const double bad : {kNaN, kInfinity, -kInfinity}) check_containment(operands, plan, operands.v, bad);
      }
    }
}

// ---- boxes: tiles of 128 rows, 32 for each warp ----

std::vector<Case> large_tile_cases() {
  using natten::Axis;
  Case line{.name = "line", .axes = {Axis{700, 90, 1, 1, true}}, .heads = 2, .head_dim = 128};
  Case plane{.name = "plane", .axes = {Axis{26, 9, 1, 1, false}, Axis{37, 11, 1, 1, false}}, .heads = 4};
  plane.heads_kv = 2, plane.head_dim = 64, plane.extra = 70, plane.bias = true;
  Case dilated{.name = "dilated", .axes = {Axis{31, 8, 2, 2, false}, Axis{50, 13, 1, 2, true}}, .heads = 2};
  dilated.head_dim = 100;
  Case volume{.name = "volume", .axes = {Axis{9, 5, 1, 1, true}, Axis{10, 5, 1, 1, false}, Axis{11, 4, 1, 1, false}}};
  volume.heads = 2, volume.head_dim = 52;  // rows that cannot be copied by 16 bytes
  return {line, plane, dilated, volume};
}

natten::Plan large_tile_plan(const natten::Problem& problem) {
  const Plan plan = natten::choose_plan(problem, Pass::forward, DeviceKind::cuda, "portable/boxes");
  EXPECT_GT(plan.q_tile.volume(), 64);
  return plan;
}

TEST(LargeTiles, AreNearTheDenseAttention) {
  for (const Case& c : large_tile_cases())
    for (const DType dtype : {DType::bf16, DType::f16}) {
      large_tile_plan(c.problem(dtype));
      check(c, dtype);
    }
}

TEST(LargeTiles, ContainNaNAndInfinityInKeysAndValues) {
  for (const Case& large : large_tile_cases()) {
    Case c = large;
    c.batch = 2, c.heads_kv = 0, c.bias = false, c.extra = 0;
    Operands operands(c, DType::bf16, kSeed);
    const Plan plan = large_tile_plan(operands.problem);
    check_containment(operands, plan, operands.k, double(NAN));
    for (const double bad : {double(NAN), HUGE_VAL, -HUGE_VAL}) check_containment(operands, plan, operands.v, bad);
  }
}

/// Every key of a window of 169 is infinite or NaN, which a tile counts in one float (T-53).
TEST(SmallWindow, CountsValuesThatAreNotFinite) {
  const Case c{.name = "", .axes = {{14, 13}, {18, 13}}, .head_dim = 8};
  for (const DType dtype : {DType::bf16, DType::f16}) {
    Operands operands(c, dtype, kSeed);
    const std::vector<double> bad = {HUGE_VAL, -HUGE_VAL, NAN, 0.0};  // of channels 0 to 3
    operands.v.for_each([&](const test::Shape& at) {
      if (at[5] < 4) operands.v.set(at, at[5] == 3 ? (at[3] % 2 ? HUGE_VAL : -HUGE_VAL) : bad[size_t(at[5])]);
    });
    const Plan plan = natten::choose_plan(operands.problem, Pass::forward, DeviceKind::cuda, "portable/window");
    ASSERT_EQ(plan.variant, "window");
    run(operands, Pass::forward, plan);
    operands.out.for_each([&](const test::Shape& at) {
      const double out = operands.out.get(at);
      const bool right = at[5] < 2 ? out == bad[size_t(at[5])] : at[5] < 4 ? std::isnan(out) : std::isfinite(out);
      EXPECT_TRUE(right) << test::to_string(dtype) << ", channel " << at[5] << ": " << out;
    });
  }
}

/// The unfused products that sum: a NaN or infinity in a value reaches the outputs of exactly the queries that see it,
/// one in dout the gradients of exactly the values that its query sees. Slots in shared memory, and in place.
void check_unfused_containment(const Case& c, DType dtype, bool of_values, double bad) {
  SCOPED_TRACE(c.name + " " + test::to_string(dtype) + (of_values ? " values" : " dout"));
  Operands o(c, dtype, kSeed);
  const natten::Problem& p = o.problem;
  const natten::Int3 g = p.grid();
  test::Tensor attn(dtype, {p.batch, g.z, g.y, g.x, p.heads, natten::num_slots(p)}, test::Layout::contiguous);
  int n = 0;
  attn.fill([&] { return test::round_to(dtype, std::sin(++n * 0.7)); });
  const Plan plan = natten::choose_unfused_plan(p, DeviceKind::cuda, "portable");
  test::Tensor &poisoned = of_values ? o.v : o.dout, &result = of_values ? o.out : o.dv;
  const auto run = [&] {
    const natten::AvArgs av{attn.view(), o.v.view(), {}, o.out.view()};
    const natten::AvBackwardArgs backward{o.dout.view(), attn.view(), o.v.view(), {}, {}, o.dv.view(), {}};
    if (of_values)
      natten::av(p, av, plan, natten::serial_executor(), nullptr);
    else
      natten::av_backward(p, backward, plan, natten::serial_executor(), nullptr);
    return result.values();
  };
  const std::vector<double> before = run();
  const test::Shape where = {0, 0, g.y / 2, g.x / 3, 0, 5};
  poisoned.set(where, bad);
  const std::vector<double> after = run();
  const dense::Problem d = test::to_dense(p);
  size_t i = 0;
  result.for_each([&](const test::Shape& at) {
    const test::Shape &query = of_values ? at : where, &key = of_values ? where : at;
    bool reached = at[0] == where[0] && at[4] == where[4] && at[5] == where[5];
    for (size_t a = 0; a < 3; ++a) reached = reached && dense::sees(d.axes[a], int(query[a + 1]), int(key[a + 1]));
    EXPECT_EQ(std::isfinite(after[i]), !reached);
    EXPECT_TRUE(reached || std::abs(before[i] - after[i]) <= 0.02 * (1 + std::abs(before[i])));
    ++i;
  });
}

TEST(PortableUnfused, ContainsNaNAndInfinity) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const bool of_values : {true, false})
      for (const double bad : {double(NAN), HUGE_VAL}) {
        Case plane{.name = "plane", .axes = {natten::Axis{11, 5, 1, 1, true}, natten::Axis{19, 4, 1, 2, false}}};
        Case line{.name = "line", .axes = {natten::Axis{300, 280, 1, 1, true}}};
        plane.heads = 2, plane.head_dim = 32, line.head_dim = 16;
        for (const Case& c : {plane, line}) check_unfused_containment(c, dtype, of_values, bad);
      }
}

// ---- float32 ----

/// Sums of thousands of positive terms: within the tensor cores, which cut off, they would drift by more than 1e-5.
TEST(Float32, LongSumsDoNotDrift) {
  const Case c{.name = "", .axes = {{8, 3}}, .extra = 6000};
  Operands operands(c, DType::f32, kSeed);
  for (test::Tensor* values : {&operands.v, &operands.extra_v})
    values->for_each([&](const test::Shape& at) { values->set(at, 1 + 0.01 * std::abs(values->get(at))); });
  const test::Reference reference(operands);
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const Plan plan = natten::choose_plan(operands.problem, pass, DeviceKind::cuda);
    SCOPED_TRACE(natten::to_string(plan));
    run(operands, pass, plan);
    reference.check(operands, pass, plan);
  }
}

TEST(Float32, IsInTf32OnlyIfThePlanSaysSo) {
  const Case c{.name = "", .axes = {{9, 5}, {20, 7}}, .head_dim = 40};
  Operands operands(c, DType::f32, kSeed);
  const auto variant = [&](const char* wanted, Pass pass = Pass::forward) {
    return std::string(natten::choose_plan(operands.problem, pass, DeviceKind::cuda, wanted).variant);
  };
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    for (const char* exact : {"", "portable", "portable/boxes"}) EXPECT_EQ(variant(exact, pass), "boxes");
    for (const char* tf32 : {"+tf32", "portable+tf32", "portable/boxes+tf32", "portable/boxes-tf32"})
      EXPECT_EQ(variant(tf32, pass), "boxes-tf32");
  }
  EXPECT_EQ(variant("cuda-reference+tf32"), "");
  operands.problem.dtype = DType::bf16;
  EXPECT_EQ(variant("+tf32"), "boxes");
  operands.problem.dtype = DType::f32;

  const auto error = [&](const char* wanted) {
    run(operands, Pass::forward, natten::choose_plan(operands.problem, Pass::forward, DeviceKind::cuda, wanted));
    const std::vector<double> out = operands.out.values();
    run(operands, Pass::forward,
        natten::choose_plan(operands.problem, Pass::forward, DeviceKind::cuda, "cuda-reference"));
    const std::vector<double> exact = operands.out.values();
    double most = 0;
    for (size_t i = 0; i < out.size(); ++i) most = std::max(most, std::abs(out[i] - exact[i]));
    return most;
  };
  EXPECT_LT(error(""), 2e-6);
  EXPECT_GT(error("+tf32"), 1e-5) << "it does nothing but split, then";
  EXPECT_LT(error("+tf32"), 5e-3);
}

}  // namespace
