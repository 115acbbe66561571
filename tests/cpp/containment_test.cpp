// SPDX-License-Identifier: MIT
// Values that are not finite: a NaN or infinity in a key or value reaches exactly the queries that see it, and leaves
// the bits of all others alone; -infinity in the bias removes keys, all of them if need be.
// Covers T-6 (exact windows, at every border), T-8 (each parameter matters), T-10 (rows without keys) and T-53.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
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
using test::Shape;
using test::Tensor;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint32_t kSeed = 11;

/// Problems in which every query misses some key; GQA, because a key then reaches several heads.
std::vector<Case> containment_cases() {
  const auto axis = [](int extent, int window, int stride = 1, int dilation = 1, bool causal = false) {
    return natten::Axis{extent, window, stride, dilation, causal};
  };
  std::vector<Case> list = {
      {.name = "1d", .axes = {axis(40, 6)}},
      {.name = "1d_causal_dilated", .axes = {axis(41, 4, 1, 3, true)}},
      {.name = "2d", .axes = {axis(7, 3), axis(20, 4)}},
      {.name = "2d_window_1", .axes = {axis(5, 1), axis(18, 1)}},
      {.name = "2d_dilated", .axes = {axis(7, 2, 1, 2), axis(23, 3, 1, 3)}},
      {.name = "2d_causal", .axes = {axis(6, 3, 1, 1, true), axis(19, 5, 1, 1, true)}},
      {.name = "2d_stride", .axes = {axis(8, 4, 3), axis(17, 5, 2)}},
      {.name = "2d_wide", .axes = {axis(3, 2), axis(133, 9)}},
      {.name = "2d_tall", .axes = {axis(70, 5), axis(6, 3)}},
      {.name = "2d_head_dim_32", .axes = {axis(9, 3), axis(19, 5)}, .head_dim = 32},
      {.name = "2d_head_dim_32_bias", .axes = {axis(9, 4), axis(19, 5)}, .head_dim = 32, .bias = true},
      {.name = "3d", .axes = {axis(3, 2), axis(4, 3), axis(17, 4, 1, 2)}},
      {.name = "3d_mixed", .axes = {axis(4, 3, 1, 1, true), axis(4, 2, 2), axis(9, 4, 1, 2, true)}},
  };
  for (Case& c : list) {
    c.batch = 2;
    c.heads = 4;
    c.heads_kv = 2;
  }
  return list;
}

bool sees(const natten::Problem& problem, const Shape& query, const Shape& key) {
  const dense::Problem p = test::to_dense(problem);
  for (size_t a = 0; a < 3; ++a)
    if (!dense::sees(p.axes[a], int(query[a + 1]), int(key[a + 1]))) return false;
  return query[0] == key[0] && query[4] / problem.heads_per_kv() == key[4];
}

/// The corners, the middle and a few more keys.
std::vector<Shape> sample_keys(const natten::Problem& p) {
  const natten::Int3 g = p.grid();
  const int64_t z = g.z - 1, y = g.y - 1, x = g.x - 1;
  return {{0, 0, 0, 0, 0, 0},         {1, z, y, x, 1, 0},         {0, z / 2, y / 2, x / 2, 1, 0},
          {1, 0, y, x / 3, 0, 0},     {0, z, 0, 2 * x / 3, 0, 0}, {1, z / 2, y / 3, x, 1, 0},
          {0, z, 2 * y / 3, 1, 1, 0}, {1, 0, y / 2, x - 1, 0, 0}};
}

/// Runs both passes with one plan; backward only if `plan` can run it.
std::vector<std::vector<double>> results(Operands& operands, Pass pass, const Plan& plan) {
  if (pass == Pass::backward) run_forward_for(operands, plan);
  run(operands, pass, plan);
  std::vector<std::vector<double>> values;
  for (const auto& [name, tensor] : operands.outputs(pass)) values.push_back(tensor->values());
  return values;
}

/// Calls visit(coordinates, value before, value after).
template <typename Visit>
void compare(const Tensor& tensor, const std::vector<double>& before, const std::vector<double>& after, Visit visit) {
  size_t i = 0;
  tensor.for_each([&](const Shape& at) { visit(at, before[i], after[i]), ++i; });
}

std::string show(const Shape& at) {
  std::string text;
  for (const int64_t i : at) text += (text.empty() ? "[" : ", ") + std::to_string(i);
  return text + "]";
}

/// `values` is whether the bad element stands in v: then it reaches only its own channel of out.
void check_forward(Operands& operands, const Plan& plan, const Shape& key, double bad, bool values) {
  SCOPED_TRACE(natten::to_string(plan) + (values ? " value " : " key ") + show(key) + " = " + std::to_string(bad));
  Tensor& poisoned = values ? operands.v : operands.k;
  const auto before = results(operands, Pass::forward, plan);
  const double good = poisoned.get(key);
  poisoned.set(key, bad);
  const auto after = results(operands, Pass::forward, plan);
  poisoned.set(key, good);

  // An infinite key may also mean a probability of 0 or a NaN: where it is seen, anything is right that follows IEEE.
  const bool certain = values || std::isnan(bad);
  compare(operands.out, before[0], after[0], [&](const Shape& at, double x, double y) {
    const bool reached = sees(operands.problem, at, key) && (!values || at[5] == key[5]);
    ASSERT_TRUE(reached || x == y) << "out" << show(at) << " does not see it, but changed";
    ASSERT_TRUE(!(reached && certain) || !std::isfinite(y)) << "out" << show(at) << " sees it, but stayed finite";
  });
  compare(operands.lse, before[1], after[1], [&](const Shape& at, double x, double y) {
    const bool reached = sees(operands.problem, at, key) && !values;
    ASSERT_TRUE(reached || x == y) << "lse" << show(at) << " does not see it, but changed";
    ASSERT_TRUE(!(reached && certain) || std::isnan(y)) << "lse" << show(at) << " sees it, but is a number";
  });
}

/// dq of a query changes only if it sees the key; dk and dv of another key only if one query sees both.
void check_backward(Operands& operands, const Plan& plan, const Shape& key, double bad, bool values) {
  SCOPED_TRACE(natten::to_string(plan) + (values ? " value " : " key ") + show(key) + " = " + std::to_string(bad));
  Tensor& poisoned = values ? operands.v : operands.k;
  const auto before = results(operands, Pass::backward, plan);
  const double good = poisoned.get(key);
  poisoned.set(key, bad);
  const auto after = results(operands, Pass::backward, plan);
  poisoned.set(key, good);

  std::vector<Shape> readers;
  operands.lse.for_each([&](const Shape& query) {
    if (sees(operands.problem, query, key)) readers.push_back(query);
  });
  compare(operands.dq, before[0], after[0], [&](const Shape& at, double x, double y) {
    const bool reached = sees(operands.problem, at, key);
    ASSERT_TRUE(reached || x == y) << "dq" << show(at) << " does not see it, but changed";
    ASSERT_TRUE(!(reached && std::isnan(bad)) || std::isnan(y)) << "dq" << show(at) << " sees it, but is a number";
  });
  for (const size_t i : {size_t{1}, size_t{2}}) {
    bool shared = false;
    compare(i == 1 ? operands.dk : operands.dv, before[i], after[i], [&](const Shape& at, double x, double y) {
      const auto sees_both = [&](const Shape& query) { return sees(operands.problem, query, at); };
      if (at[5] == 0) shared = std::any_of(readers.begin(), readers.end(), sees_both);
      ASSERT_TRUE(shared || x == y) << (i == 1 ? "dk" : "dv") << show(at) << " shares no query with it, but changed";
    });
  }
}

class Containment : public testing::TestWithParam<Case> {};

TEST_P(Containment, ForwardReachesExactlyTheQueriesThatSeeIt) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    SCOPED_TRACE(test::to_string(dtype));
    Operands operands(GetParam(), dtype, kSeed);
    for (const Plan& plan : natten::list_plans(operands.problem, Pass::forward, test::kDevice).plans)
      for (const Shape& key : sample_keys(operands.problem))
        for (const double bad : {kNaN, kInfinity, -kInfinity})
          for (const bool values : {false, true}) check_forward(operands, plan, key, bad, values);
  }
}

TEST_P(Containment, BackwardReachesExactlyTheQueriesThatSeeIt) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16}) {
    SCOPED_TRACE(test::to_string(dtype));
    Operands operands(GetParam(), dtype, kSeed);
    for (const Plan& plan : natten::list_plans(operands.problem, Pass::backward, test::kDevice).plans)
      for (const Shape& key : sample_keys(operands.problem))
        for (const double bad : {kNaN, kInfinity})
          for (const bool values : {false, true}) check_backward(operands, plan, key, bad, values);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Containment, testing::ValuesIn(containment_cases()),
                         [](const auto& info) { return info.param.name; });

// ---- -infinity in the bias ----

const Case kBiased[] = {
    {.name = "1d", .axes = {{30, 5}}, .heads = 2, .bias = true, .dlse = true},
    {.name = "2d", .axes = {{7, 3}, {19, 4}}, .heads = 2, .bias = true},
    {.name = "2d_32", .axes = {{9, 3}, {19, 5}}, .heads = 2, .head_dim = 32, .bias = true, .dlse = true},
    {.name = "2d_extra", .axes = {{7, 3}, {19, 4}}, .heads = 2, .extra = 2, .bias = true, .dlse = true},
    {.name = "2d_causal", .axes = {{7, 3, 1, 1, true}, {19, 4, 2, 1, true}}, .bias = true},
};

/// Both passes of every plan against the dense attention, once `change` has set some of the bias to -infinity.
template <typename Change>
void check_bias(Change change) {
  for (const Case& c : kBiased) {
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      SCOPED_TRACE(c.name + " " + test::to_string(dtype));
      Operands operands(c, dtype, kSeed);
      operands.bias.for_each([&](const Shape& at) {
        if (change(at, operands.bias.sizes())) operands.bias.set(at, -kInfinity);
      });
      // Rows without keys have lse -infinity; a gradient for it means nothing and must not leave NaN behind.
      const test::Reference reference(operands);
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        for (const Plan& plan : natten::list_plans(operands.problem, pass, test::kDevice).plans) {
          SCOPED_TRACE(natten::to_string(plan) + (pass == Pass::forward ? " forward" : " backward"));
          if (pass == Pass::backward) run_forward_for(operands, plan);
          run(operands, pass, plan);
          reference.check(operands, pass, plan);
        }
      }
    }
  }
}

TEST(MinusInfinityInTheBias, RemovesKeys) {
  check_bias([](const Shape& at, const Shape&) { return (at[2] + at[3] + at[4]) % 3 == 1; });
}

TEST(MinusInfinityInTheBias, MayLeaveNothingButTheQueryItself) {
  check_bias([](const Shape& at, const Shape& sizes) { return at[2] != sizes[2] / 2 || at[3] != sizes[3] / 2; });
}

TEST(MinusInfinityInTheBias, MayLeaveNothingToSomeQueries) {
  check_bias([](const Shape& at, const Shape& sizes) { return at[3] <= sizes[3] / 2; });
}

TEST(MinusInfinityInTheBias, MayLeaveNothingAtAll) {
  check_bias([](const Shape&, const Shape&) { return true; });
}

}  // namespace
