// SPDX-License-Identifier: MIT
// validate: each mistake has its own sentence, which names the axis, the numbers and the remedy.
// Covers T-65 (one precise error) and the conditions of the original that stay errors.
#include "natten/problem.h"

#include <gtest/gtest.h>

#include <climits>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "natten/error.h"

namespace {

using natten::DType;
using natten::Problem;

Problem valid() {
  Problem p;
  p.batch = 2;
  p.heads = 4;
  p.heads_kv = 2;
  p.head_dim = 8;
  p.head_dim_v = 16;
  p.axes[1] = {9, 3, 2, 1, false};
  p.axes[2] = {20, 5, 1, 4, true};
  p.extra_keys = 3;
  p.has_bias = true;
  return p;
}

struct Mistake {
  std::function<void(Problem&)> make;
  std::vector<std::string> words;  // all must occur in the message
};

/// One sentence: no line break, no full stop inside or at its end, and not so short that it only names what is wrong.
void expect_sentence(const std::string& message) {
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  EXPECT_EQ(message.find(". "), std::string::npos) << message;
  EXPECT_NE(message.back(), '.') << message;
  EXPECT_GE(message.size(), 25u) << message;
}

void expect_mistakes(const std::vector<Mistake>& mistakes) {
  for (size_t i = 0; i < mistakes.size(); ++i) {
    const Mistake& mistake = mistakes[i];
    Problem p = valid();
    mistake.make(p);
    try {
      natten::validate(p);
      ADD_FAILURE() << "accepted mistake " << i << ", the message of which should have named " << mistake.words.front();
    } catch (const natten::Error& error) {
      const std::string message = error.what();
      EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_argument) << message;
      expect_sentence(message);
      for (const std::string& word : mistake.words)
        EXPECT_NE(message.find(word), std::string::npos) << "no '" << word << "' in: " << message;
    }
  }
}

TEST(Validate, AcceptsWhatHasAMeaning) {
  const std::vector<std::function<void(Problem&)>> changes = {
      [](Problem&) {},
      [](Problem& p) { p.batch = 0; },
      [](Problem& p) { p.axes[1].extent = 0; },
      [](Problem& p) { p.axes[1] = {}; },
      [](Problem& p) { p.axes[1].window = 9; },
      [](Problem& p) { p.axes[1].window = 100; },
      [](Problem& p) { p.axes[1].dilation = 100; },
      [](Problem& p) { p.axes[1].stride = 3; },
      [](Problem& p) { p.scale = 0.0; },
      [](Problem& p) { p.scale = -3.0; },
      [](Problem& p) { p.heads_kv = 1; },
      [](Problem& p) { p.extra_keys = 0; },
      [](Problem& p) { p.oversize = false; },
      [](Problem& p) {
        for (natten::Axis& a : p.axes) a.window = 0, a.stride = 1;
        p.has_bias = false;
      },
  };
  for (const auto& change : changes) {
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      Problem p = valid();
      p.dtype = dtype;
      change(p);
      EXPECT_NO_THROW(natten::validate(p));
    }
  }
}

TEST(Validate, NamesTheAxisAndTheNumbersOfAWindow) {
  expect_mistakes({
      {[](Problem& p) { p.axes[1].extent = -4; }, {"axis y", "-4"}},
      {[](Problem& p) { p.axes[2].window = -7; }, {"axis x", "-7", "kernel_size"}},
      {[](Problem& p) { p.axes[1].stride = 0; }, {"axis y", "stride", "0", "at least 1"}},
      {[](Problem& p) { p.axes[1].stride = -2; }, {"axis y", "stride", "-2", "at least 1"}},
      {[](Problem& p) { p.axes[1].stride = 4; }, {"axis y", "stride", "4", "kernel_size 3"}},
      {[](Problem& p) { p.axes[0].dilation = 0; }, {"axis z", "dilation", "0", "at least 1"}},
      {[](Problem& p) { p.axes[2].dilation = -6; }, {"axis x", "dilation", "-6", "at least 1"}},
  });
}

TEST(Validate, RefusesOversizeWindowsOnRequest) {
  expect_mistakes({
      {[](Problem& p) { p.oversize = false, p.axes[1] = {32, 9, 1, 4, false}; },
       {"kernel_size 9", "dilation 4", "36", "axis y", "32", "choose a smaller", "oversize"}},
      {[](Problem& p) { p.oversize = false, p.axes[2] = {20, 21, 1, 1, false}; },
       {"kernel_size 21", "axis x", "20", "choose a smaller", "oversize"}},
      {[](Problem& p) { p.oversize = false, p.axes[2] = {20, INT_MAX / 16, 1, 16, true}; }, {"axis x", "20"}},
  });
  Problem exact = valid();
  exact.oversize = false;
  exact.axes[1] = {36, 9, 1, 4, false};
  EXPECT_NO_THROW(natten::validate(exact));
}

TEST(Validate, NamesHeadsAndChannels) {
  expect_mistakes({
      {[](Problem& p) { p.batch = -1; }, {"batch", "-1"}},
      {[](Problem& p) { p.heads = 0; }, {"heads", "0", "at least 1"}},
      {[](Problem& p) { p.heads_kv = 0; }, {"heads", "0", "at least 1"}},
      {[](Problem& p) { p.heads_kv = -2; }, {"heads", "-2", "at least 1"}},
      {[](Problem& p) { p.heads_kv = 3; }, {"heads 4", "3", "multiple"}},
      {[](Problem& p) { p.heads_kv = 8; }, {"heads 4", "8", "multiple"}},
      {[](Problem& p) { p.head_dim = 0; }, {"head_dim", "0", "at least 1"}},
      {[](Problem& p) { p.head_dim_v = -5; }, {"head_dim", "-5", "at least 1"}},
      {[](Problem& p) { p.extra_keys = -9; }, {"additional", "-9"}},
  });
}

void without_window(Problem& p) {
  for (natten::Axis& a : p.axes) a.window = 0, a.stride = 1;
}

TEST(Validate, RefusesProblemsWithoutKeysOrWithoutPositions) {
  expect_mistakes({
      {[](Problem& p) { without_window(p), p.extra_keys = 0, p.has_bias = false; }, {"kernel_size 0", "additional"}},
      {[](Problem& p) { without_window(p); }, {"kernel_size 0", "bias"}},
  });
}

TEST(Validate, RefusesAScaleThatIsNoNumber) {
  expect_mistakes({
      {[](Problem& p) { p.scale = std::nan(""); }, {"scale", "nan"}},
      {[](Problem& p) { p.scale = std::numeric_limits<double>::infinity(); }, {"scale", "inf"}},
  });
}

TEST(Validate, RefusesSizesThatCannotBeAddressed) {
  constexpr int kBig = 1 << 28;
  expect_mistakes({
      {[](Problem& p) { p.axes[1].extent = INT_MAX; }, {"axis y", "2147483647"}},
      {[](Problem& p) { p.axes[1].extent = kBig, p.axes[2].extent = kBig; }, {"smaller"}},
      // Nothing to compute, but sizes and strides overflow all the same.
      {[](Problem& p) { p.batch = 0, p.axes[0].extent = p.axes[1].extent = p.axes[2].extent = kBig; }, {"smaller"}},
      {[](Problem& p) { p.batch = INT64_MAX; }, {"smaller"}},
      {[](Problem& p) { p.heads = INT_MAX - 1; }, {"heads", "2147483646", "at most"}},
      {[](Problem& p) { p.head_dim = INT_MAX; }, {"head_dim", "2147483647", "at most"}},
      {[](Problem& p) {
         p.axes[1] = p.axes[2] = {}, p.has_bias = false;
         p.extra_keys = kBig, p.head_dim = 1 << 20, p.batch = 1 << 20;
       },
       {"smaller"}},
      {[](Problem& p) { p.axes[0].window = p.axes[1].window = p.axes[2].window = kBig; }, {"smaller"}},
      // A table of the bias for every piece of work of the backward pass.
      {[](Problem& p) { p.batch = 1 << 30, p.axes[2] = {1, kBig, 1, 1, false}, p.has_bias = true; },
       {"relative position bias", "smaller"}},
  });
}

TEST(Validate, LeavesNoProblemWhosePairsOverflow) {
  Problem p;
  p.axes[1] = p.axes[2] = {1 << 20, 1 << 20, 1, 1, false};  // 2^80 pairs
  try {
    natten::validate(p);
    EXPECT_GT(natten::num_pairs(p), int64_t{1} << 60);
  } catch (const natten::Error& error) {
    EXPECT_EQ(error.kind(), natten::ErrorKind::invalid_argument);
    expect_sentence(error.what());
  }
}

TEST(Problem, KnowsItsGrid) {
  const Problem p = valid();
  EXPECT_EQ(p.grid(), (natten::Int3{1, 9, 20}));
  EXPECT_EQ(p.tokens(), 180);
  EXPECT_EQ(p.heads_per_kv(), 2);
  EXPECT_TRUE(p.has_window());
  EXPECT_EQ(natten::size_of(DType::f64) + natten::size_of(DType::f32) + natten::size_of(DType::f16), 14);
  EXPECT_EQ(natten::accumulator_of(DType::bf16), DType::f32);
  EXPECT_EQ(natten::accumulator_of(DType::f64), DType::f64);
}

}  // namespace
