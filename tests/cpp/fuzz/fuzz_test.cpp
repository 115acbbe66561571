// SPDX-License-Identifier: MIT
// Random problems, absurd ones among them: validate throws, or a plan runs and agrees with the dense attention, fused
// (three quarters of the time) and unfused. Meant for a build with AddressSanitizer and UndefinedBehaviorSanitizer
// (preset "asan"), which see what no comparison sees: tensors are allocated without guard bands, to the byte.
//   natten_fuzz [seconds = $NATTEN_FUZZ_SECONDS or 20] [seed = $NATTEN_FUZZ_SEED or 1]
// Each problem has a seed of its own, which a failure prints: `natten_fuzz 0 <that seed>` runs it alone.
// Covers T-1, T-24, T-65 at random.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cases.h"
#include "natten/error.h"
#include "operands.h"
#include "unfused_operands.h"

namespace {

using natten::DType;
using natten::Pass;
using natten::Plan;
using natten::Problem;
using test::Case;

double g_seconds = 20.0;
uint32_t g_seed = 1;

class Generator {
 public:
  explicit Generator(uint32_t seed) : rng_(seed) {}

  int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng_); }
  bool once_in(int n) { return between(1, n) == 1; }

  template <typename T>
  T one_of(const std::vector<T>& values) {
    return values[size_t(between(0, int(values.size()) - 1))];
  }

  Case problem() {
    absurd_ = once_in(3);
    Case c;
    const int rank = between(1, 3);
    const int longest = rank == 1 ? 150 : rank == 2 ? 40 : 12;
    for (int i = 0; i < rank; ++i) c.axes.push_back(axis(once_in(4) ? between(1, 3) : between(1, longest)));
    if (once_in(15)) no_window(c);
    c.batch = maybe(once_in(20) ? 0 : between(1, 3));
    c.heads_kv = maybe(between(1, 3));
    c.heads = maybe(int(int64_t{c.heads_kv} * between(1, 3) % INT_MAX));
    c.head_dim = maybe(one_of<int>({1, 2, 4, 7, 8, 16, 17, 32, 33, 64, 80}));
    c.head_dim_v = maybe(once_in(3) ? between(1, 40) : c.head_dim);
    c.extra = maybe(once_in(3) ? between(1, 20) : 0);
    c.bias = once_in(3);
    c.dlse = once_in(2);
    c.layout = test::Layout(between(0, 5));
    c.scale = one_of<double>({0.0, -1.0, 0.125, 0.5, 1.0, 3.0});
    if (absurd_ && once_in(4)) c.scale = one_of<double>({1e38, -1e300, 1e-320, std::nan(""), HUGE_VAL});
    c.amplitude = one_of<double>({0.0, 1e-3, 1.0, 1.0, 1.0, 10.0});
    return c;
  }

  natten::Executor executor() {
    const int threads = between(1, 4);
    return once_in(2) ? natten::thread_executor(threads) : test::reverse_executor(threads);
  }

 private:
  /// `value`, or now and then in an absurd problem something that no caller should ask for.
  int maybe(int value) {
    if (!absurd_ || !once_in(6)) return value;
    return one_of<int>({INT_MIN, -1000000, -1, 0, 1, 2, 255, 65536, (1 << 28) - 1, 1 << 28, (1 << 28) + 1, 1 << 30,
                        INT_MAX - 1, INT_MAX});
  }

  natten::Axis axis(int extent) {
    const int window = once_in(6) ? between(1, extent + 4) : between(1, std::min(extent, 9));
    const int stride = once_in(3) ? between(1, window) : 1;
    const int dilation = once_in(3) ? between(1, extent + 2) : between(1, 2);
    return {maybe(extent), maybe(window), maybe(stride), maybe(dilation), once_in(3)};
  }

  static void no_window(Case& c) {
    for (natten::Axis& a : c.axes) a.window = 0, a.stride = 1;
  }

  std::mt19937 rng_;
  bool absurd_ = false;
};

std::string show(const Case& c, DType dtype) {
  std::ostringstream text;
  text.precision(17);
  text << test::to_string(dtype) << " batch " << c.batch << " heads " << c.heads << "/" << c.heads_kv << " head_dim "
       << c.head_dim << "/" << c.head_dim_v << " extra " << c.extra << " bias " << c.bias << " dlse " << c.dlse
       << " scale " << *c.scale << " amplitude " << c.amplitude << " " << test::to_string(c.layout);
  for (const natten::Axis& a : c.axes)
    text << "; L " << a.extent << " K " << a.window << " s " << a.stride << " d " << a.dilation
         << (a.causal ? " causal" : "");
  return text.str();
}

/// By elements of the largest tensor and by logits, in double so that nothing overflows here. Empty problems count as
/// if they had one token of one sample, for their additional keys and their bias may still be large.
bool is_small(const Problem& p) {
  double tokens = 1.0, table = p.heads;
  for (const natten::Axis& a : p.axes) tokens *= std::max(a.extent, 1), table *= 2.0 * a.window - 1.0;
  const double rows = double(std::max<int64_t>(p.batch, 1)) * p.heads;
  const double logits = rows * tokens * (tokens + p.extra_keys);
  const double channels = std::max(p.head_dim, p.head_dim_v);
  return rows * (tokens + p.extra_keys) * channels < 1e5 && logits < 2e6 && logits * channels < 1e8 &&
         (!p.has_bias || table < 1e5);
}

struct Counts {
  int refused = 0, too_large = 0, compared = 0, run = 0;
};

/// Every valid problem has plans, the size of a workspace and a number of pairs, however large it is.
void plan_only(const Problem& p) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const std::vector<Plan> plans = natten::list_plans(p, pass, test::kDevice).plans;
    EXPECT_FALSE(plans.empty());
    for (const Plan& plan : plans) natten::workspace_bytes(p, pass, plan, 2);
  }
  const natten::Int3 g = p.grid();
  const bool short_axes = std::max({g.z, g.y, g.x}) < 1 << 22;  // the count walks along them
  EXPECT_GE(short_axes ? natten::num_pairs(p) : 0, 0);
}

// Now and then not a number anywhere: nothing to compare then, but it must not lead an engine astray either.
bool break_inputs(test::Operands& operands, Generator& random) {
  if (!random.once_in(10)) return false;
  for (const auto& [name, tensor] : operands.inputs(Pass::forward))
    tensor->fill([&] { return random.once_in(30) ? random.one_of<double>({std::nan(""), HUGE_VAL, 0.0}) : 1.0; });
  return true;
}

// Gradients times such a scale overflow or vanish in float, rightly so.
bool is_comparable(const Case& c) {
  return *c.scale == 0.0 || (std::abs(*c.scale) > 1e-3 && std::abs(*c.scale) < 10.0);
}

void run_case(const Case& c, DType dtype, uint32_t seed, Generator& random, Counts& counts) {
  test::Operands operands(c, dtype, seed, 0);
  const bool broken = break_inputs(operands, random);
  const Plan backward = random.one_of(natten::list_plans(operands.problem, Pass::backward, test::kDevice).plans);
  std::vector<Plan> forwards = natten::list_plans(operands.problem, Pass::forward, test::kDevice).plans;
  std::erase_if(forwards, [&](const Plan& plan) { return test::in_tf32(plan) != test::in_tf32(backward); });
  const Plan forward = random.one_of(forwards);
  SCOPED_TRACE(natten::to_string(forward) + " and " + natten::to_string(backward));
  run(operands, Pass::forward, forward, random.executor());
  run(operands, Pass::backward, backward, random.executor());
  ++counts.run;
  if (broken || !is_comparable(c)) return;
  const test::Reference reference(operands);
  reference.check(operands, Pass::forward, forward);
  reference.check(operands, Pass::backward, backward);
  ++counts.compared;
}

void run_unfused(const Case& c, DType dtype, uint32_t seed, Generator& random, Counts& counts) {
  const Problem p = c.problem(dtype);
  try {
    natten::validate_unfused(p);
  } catch (const natten::Error&) {
    ++counts.refused;
    return;
  }
  const std::vector<Plan> plans = natten::list_unfused_plans(p, test::kDevice).plans;
  EXPECT_FALSE(plans.empty());
  const Plan plan = random.one_of(plans);
  SCOPED_TRACE("unfused " + natten::to_string(plan));
  natten::unfused_workspace_bytes(p, plan, 2);
  if (test::UnfusedOperands::work(p) > 3e5) {
    ++counts.too_large;
    return;
  }
  test::UnfusedOperands operands(c, dtype, seed, 0);
  const bool broken = break_inputs(operands.operands, random);
  if (!broken && is_comparable(c)) operands.expect(), ++counts.compared;
  operands.check(plan);
  ++counts.run;
}

void fuzz(uint32_t seed, bool unfused, Counts& counts) {
  Generator random(seed);
  const Case c = random.problem();
  const DType dtype = DType(random.between(0, 3));
  SCOPED_TRACE("seed " + std::to_string(seed) + ": " + show(c, dtype));
  Problem p = c.problem(dtype);
  p.oversize = !random.once_in(8);
  try {
    natten::validate(p);
  } catch (const natten::Error& error) {
    EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_argument);
    EXPECT_GE(std::string(error.what()).size(), 20u);
    ++counts.refused;
    return;
  }
  if (is_small(p) && unfused) return run_unfused(c, dtype, seed, random, counts);
  if (is_small(p)) return run_case(c, dtype, seed, random, counts);
  plan_only(p);
  ++counts.too_large;
}

void fuzz_for(double seconds, bool unfused) {
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  Counts counts;
  uint32_t seed = g_seed;
  do {
    ASSERT_NO_THROW(fuzz(seed, unfused, counts)) << "seed " << seed;
    ++seed;
  } while (elapsed() < seconds && !testing::Test::HasFailure());
  std::cout << "seeds " << g_seed << " to " << seed - 1 << ": " << counts.run << " ran, " << counts.compared
            << " of them compared, " << counts.refused << " refused, " << counts.too_large << " only planned\n";
}

TEST(Fuzz, RandomProblems) { fuzz_for(0.75 * g_seconds, false); }

TEST(Fuzz, RandomUnfusedProblems) { fuzz_for(0.25 * g_seconds, true); }

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const auto option = [&](int position, const char* variable) -> const char* {
    return argc > position ? argv[position] : std::getenv(variable);
  };
  if (const char* seconds = option(1, "NATTEN_FUZZ_SECONDS")) g_seconds = std::atof(seconds);
  if (const char* seed = option(2, "NATTEN_FUZZ_SEED")) g_seed = uint32_t(std::strtoul(seed, nullptr, 10));
  return RUN_ALL_TESTS();
}
