// SPDX-License-Identifier: MIT
// The definition of the operator (natten/neighborhood.h) against the window formula as dense.cpp states it and against
// golden vectors. Exhaustive on small axes, sampled on larger ones.
// Covers T-2 (even windows), T-3 (dilation that does not divide), T-4 (stride), T-6 (borders), T-9 (window = axis).
#include "natten/neighborhood.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "dense.h"
#include "natten/problem.h"

namespace {

using natten::Axis;
using natten::Span;

std::string show(const Axis& a) {
  return "L=" + std::to_string(a.extent) + " K=" + std::to_string(a.window) + " s=" + std::to_string(a.stride) +
         " d=" + std::to_string(a.dilation) + (a.causal ? " causal" : "");
}

/// Tokens that a query sees, in order, by the formula.
std::vector<int> formula_keys(const Axis& a, int query) {
  const dense::Axis axis{a.extent, a.window, a.stride, a.dilation, a.causal};
  std::vector<int> keys;
  for (int key = 0; key < a.extent; ++key)
    if (dense::sees(axis, query, key)) keys.push_back(key);
  return keys;
}

/// Tokens that a query sees, by the library.
std::vector<int> span_keys(const Axis& a, int query) {
  const int r = query % a.dilation;
  const Span span = natten::key_span(natten::group_axis(a, r), query / a.dilation);
  std::vector<int> keys;
  for (int p = span.begin; p < span.end; ++p) keys.push_back(r + a.dilation * p);
  return keys;
}

/// Every stride of an axis, causal and not.
template <typename Visit>
void for_each_stride(const Axis& axis, Visit visit) {
  for (int stride = 1; stride <= std::max(axis.window, 1); ++stride)
    for (const bool causal : {false, true}) visit(Axis{axis.extent, axis.window, stride, axis.dilation, causal});
}

template <typename Visit>
void for_each_small_axis(Visit visit) {
  for (int extent = 1; extent <= 14; ++extent)
    for (int window = 0; window <= extent + 2; ++window)
      for (int dilation = 1; dilation <= 4; ++dilation)
        for_each_stride(Axis{extent, window, 1, dilation, false}, visit);
}

template <typename Visit>
void for_each_sampled_axis(Visit visit) {
  std::mt19937 rng(1);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); };
  for (int i = 0; i < 300; ++i) {
    const int extent = pick(1, 200), window = pick(1, extent + 5);
    visit(Axis{extent, window, pick(1, window), pick(1, extent / 3 + 2), pick(0, 1) == 1});
  }
}

void expect_formula(const Axis& a) {
  for (int query = 0; query < a.extent; ++query)
    ASSERT_EQ(span_keys(a, query), formula_keys(a, query)) << show(a) << " query " << query;
}

void expect_inverse(const Axis& a) {
  for (int r = 0; r < natten::num_groups(a); ++r) {
    const Axis g = natten::group_axis(a, r);
    for (int key = 0; key < g.extent; ++key) {
      const Span queries = natten::query_span(g, key);
      ASSERT_EQ(queries.size() > 0, g.window > 0) << show(a) << " group " << r << " key " << key;
      for (int query = 0; query < g.extent; ++query)
        ASSERT_EQ(queries.contains(query), natten::key_span(g, query).contains(key))
            << show(a) << " group " << r << " query " << query << " key " << key;
    }
  }
}

TEST(KeySpan, EqualsTheFormulaOnEverySmallAxis) { for_each_small_axis(expect_formula); }
TEST(KeySpan, EqualsTheFormulaOnLargerAxes) { for_each_sampled_axis(expect_formula); }
TEST(QuerySpan, IsTheInverseOnEverySmallAxis) { for_each_small_axis(expect_inverse); }
TEST(QuerySpan, IsTheInverseOnLargerAxes) { for_each_sampled_axis(expect_inverse); }

TEST(KeySpan, HoldsTheQueryItselfAndNoMoreThanTheWindow) {
  for_each_small_axis([](const Axis& a) {
    for (int r = 0; a.window > 0 && r < natten::num_groups(a); ++r) {
      const Axis g = natten::group_axis(a, r);
      for (int p = 0; p < g.extent; ++p) {
        const Span span = natten::key_span(g, p);
        ASSERT_TRUE(span.contains(p)) << show(a);
        ASSERT_GE(span.begin, 0) << show(a);
        ASSERT_LE(span.end, g.extent) << show(a);
        ASSERT_TRUE(a.causal ? span.size() <= g.window : span.size() == g.window) << show(a);
      }
    }
  });
}

TEST(GroupAxis, GroupsPartitionTheAxis) {
  for_each_small_axis([](const Axis& a) {
    std::set<int> tokens;
    for (int r = 0; r < natten::num_groups(a); ++r) {
      const Axis g = natten::group_axis(a, r);
      ASSERT_GE(g.extent, 1) << show(a);
      ASSERT_EQ(g.dilation, 1) << show(a);
      ASSERT_EQ(g.causal, a.causal) << show(a);
      ASSERT_EQ(g.window, std::min(a.window, g.extent)) << show(a);
      ASSERT_GE(g.stride, 1) << show(a);
      ASSERT_LE(g.stride, std::max(g.window, 1)) << show(a);
      for (int p = 0; p < g.extent; ++p) tokens.insert(r + a.dilation * p);
    }
    ASSERT_EQ(int(tokens.size()), a.extent) << show(a);
    ASSERT_EQ(*tokens.rbegin(), a.extent - 1) << show(a);
  });
}

TEST(GroupAxis, AnEmptyAxisHasNoGroups) { EXPECT_EQ(natten::num_groups(Axis{0, 3, 1, 2, false}), 0); }

TEST(BiasIndex, StaysInTheTableAndIsTheOffsetInTheGroup) {
  for_each_small_axis([](const Axis& a) {
    for (int query = 0; query < a.extent; ++query) {
      for (const int key : span_keys(a, query)) {
        const int index = natten::bias_index(a, query / a.dilation, key / a.dilation);
        ASSERT_EQ(index, (key - query) / a.dilation + a.window - 1) << show(a);
        ASSERT_GE(index, 0) << show(a);
        ASSERT_LE(index, 2 * a.window - 2) << show(a);
      }
    }
  });
}

TEST(NumPairs, CountsThePairsOfEverySmallAxis) {
  for_each_small_axis([](const Axis& a) {
    int64_t pairs = 0;
    for (int query = 0; query < a.extent; ++query) pairs += int64_t(formula_keys(a, query).size());
    ASSERT_EQ(natten::num_pairs(a), pairs) << show(a);
  });
}

TEST(NumPairs, OfAProblemIsTheProductPlusTheExtraKeys) {
  natten::Problem p;
  p.axes[1] = {5, 3, 1, 1, false};
  p.axes[2] = {7, 4, 2, 1, true};
  p.extra_keys = 6;
  EXPECT_EQ(natten::num_pairs(p), natten::num_pairs(p.axes[1]) * natten::num_pairs(p.axes[2]) + 6 * 35);
  for (Axis& a : p.axes) a.window = 0;
  for (Axis& a : p.axes) a.stride = 1;
  EXPECT_EQ(natten::num_pairs(p), 6 * 35);
}

// ---- golden vectors: first and last key of each query ----

using FirstLast = std::vector<std::pair<int, int>>;

struct Golden {
  Axis axis;
  FirstLast keys;
};

const Golden kGolden[] = {
    {{10, 4, 1, 1, false}, {{0, 3}, {0, 3}, {0, 3}, {1, 4}, {2, 5}, {3, 6}, {4, 7}, {5, 8}, {6, 9}, {6, 9}}},
    {{10, 5, 1, 1, false}, {{0, 4}, {0, 4}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {4, 8}, {5, 9}, {5, 9}, {5, 9}}},
    {{11, 3, 1, 2, false}, {{0, 4}, {1, 5}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {4, 8}, {5, 9}, {6, 10}, {5, 9}, {6, 10}}},
    {{10, 3, 1, 1, true}, {{0, 0}, {0, 1}, {0, 2}, {1, 3}, {2, 4}, {3, 5}, {4, 6}, {5, 7}, {6, 8}, {7, 9}}},
    {{12, 5, 4, 1, false},
     {{0, 4}, {0, 4}, {0, 4}, {0, 4}, {4, 8}, {4, 8}, {4, 8}, {4, 8}, {7, 11}, {7, 11}, {7, 11}, {7, 11}}},
    {{12, 6, 3, 1, false},
     {{0, 5}, {0, 5}, {0, 5}, {1, 6}, {1, 6}, {1, 6}, {4, 9}, {4, 9}, {4, 9}, {6, 11}, {6, 11}, {6, 11}}},
    {{10, 4, 2, 1, true}, {{0, 0}, {0, 1}, {0, 2}, {0, 3}, {2, 4}, {2, 5}, {4, 6}, {4, 7}, {6, 8}, {6, 9}}},
    {{13, 3, 2, 2, false},
     {{0, 4}, {1, 5}, {0, 4}, {1, 5}, {4, 8}, {5, 9}, {4, 8}, {5, 9}, {8, 12}, {7, 11}, {8, 12}, {7, 11}, {8, 12}}},
    {{13, 3, 1, 3, true},
     {{0, 0}, {1, 1}, {2, 2}, {0, 3}, {1, 4}, {2, 5}, {0, 6}, {1, 7}, {2, 8}, {3, 9}, {4, 10}, {5, 11}, {6, 12}}},
};

TEST(Golden, TheLibraryAndTheFormulaGiveTheVectors) {
  for (const Golden& golden : kGolden) {
    ASSERT_EQ(int(golden.keys.size()), golden.axis.extent);
    for (int query = 0; query < golden.axis.extent; ++query) {
      for (const std::vector<int>& keys : {span_keys(golden.axis, query), formula_keys(golden.axis, query)})
        EXPECT_EQ((std::pair{keys.front(), keys.back()}), golden.keys[size_t(query)])
            << show(golden.axis) << " query " << query;
    }
  }
}

// ---- special cases with a meaning of their own ----

TEST(Stride, EqualToTheWindowGivesBlocks) {
  for (int window = 1; window <= 6; ++window) {
    const Axis a{window * 4, window, window, 1, false};
    for (int p = 0; p < a.extent; ++p)
      EXPECT_EQ(natten::key_span(a, p), (Span{p / window * window, (p / window + 1) * window})) << show(a);
  }
}

TEST(Window, AsLongAsTheAxisIsDenseAttention) {
  for (int extent = 1; extent <= 9; ++extent) {
    for (int p = 0; p < extent; ++p) {
      EXPECT_EQ(natten::key_span({extent, extent, 1, 1, false}, p), (Span{0, extent}));
      EXPECT_EQ(natten::key_span({extent, extent, 1, 1, true}, p), (Span{0, p + 1}));
    }
    EXPECT_EQ(natten::num_pairs(Axis{extent, extent, 1, 1, false}), extent * extent);
  }
}

TEST(Window, OneKeyShorterThanTheAxisIsNotDense) {
  const Axis a{8, 7, 1, 1, false};
  EXPECT_EQ(natten::key_span(a, 3), (Span{0, 7}));
  EXPECT_EQ(natten::key_span(a, 4), (Span{1, 8}));
}

TEST(Window, LargerThanAGroupIsCutPerGroup) {
  const Axis a{5, 4, 4, 2, false};  // groups 0 2 4 and 1 3
  EXPECT_EQ(span_keys(a, 0), (std::vector<int>{0, 2, 4}));
  EXPECT_EQ(span_keys(a, 1), (std::vector<int>{1, 3}));
  EXPECT_EQ(natten::group_axis(a, 0).stride, 3);
  EXPECT_EQ(natten::group_axis(a, 1).stride, 2);
}

static_assert(natten::key_span({10, 4, 1, 1, false}, 5) == Span{3, 7}, "the definition is usable at compile time");
static_assert(natten::query_span({10, 4, 1, 1, false}, 0) == Span{0, 3}, "so is its inverse");
static_assert(natten::num_pairs(natten::Axis{10, 4, 1, 1, false}) == 40);

}  // namespace
