// SPDX-License-Identifier: MIT
// The four passes of unfused attention, by every plan of every case, against sums over all pairs that the dense
// attention's `sees` allows. Guard bands, poisoned outputs and workspaces, inputs of every layout, determinism; slots
// without a key hold NaN wherever an engine reads weights.
#include "natten/unfused.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cases.h"
#include "dense.h"
#include "natten/error.h"
#include "operands.h"

namespace {

using natten::DType;
using natten::Plan;
using test::Case;
using test::Operands;
using test::Shape;
using test::Tensor;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// A sum and what it is measured against: the sum of the magnitudes of its terms, and how many there are.
struct Sum {
  double value = 0, magnitude = 0;
  int terms = 0;
  void add(double term) { value += term, magnitude += std::abs(term), ++terms; }
};

/// What stands in a slot: a key of the grid, an additional one, or nothing.
struct Slot {
  bool used = false, extra = false;
  Shape key{}, bias{};  // coordinates, without head and channel
};

/// The slots of one query in their order, from the definition of the window alone.
std::vector<Slot> slots_of(const natten::Problem& p, const dense::Problem& d, const Shape& query) {
  std::vector<Slot> slots(natten::num_slots(p));
  std::vector<int> keys[3];
  for (int i = 0; i < 3; ++i)
    for (int key = 0; key < d.axes[i].extent; ++key)
      if (p.has_window() && dense::sees(d.axes[i], int(query[1 + i]), key)) keys[i].push_back(key);
  const auto bias_of = [&](int i, int key) {
    return (key - int(query[1 + i])) / d.axes[i].dilation + d.axes[i].window - 1;
  };
  for (size_t a = 0; a < keys[0].size(); ++a)
    for (size_t b = 0; b < keys[1].size(); ++b)
      for (size_t c = 0; c < keys[2].size(); ++c) {
        const int z = keys[0][a], y = keys[1][b], x = keys[2][c];
        slots[(a * d.axes[1].window + b) * d.axes[2].window + c] = {
            true, false, {query[0], z, y, x, 0, 0}, {0, bias_of(0, z), bias_of(1, y), bias_of(2, x), 0, 0}};
      }
  for (int n = 0; n < p.extra_keys; ++n)
    slots[slots.size() - p.extra_keys + n] = {true, true, {query[0], 0, 0, n, 0, 0}, {}};
  return slots;
}

class Unfused : public testing::TestWithParam<Case> {
 protected:
  void prepare(DType dtype) {
    operands.emplace(GetParam(), dtype, 11);
    const natten::Problem& p = operands->problem;
    natten::validate_unfused(p);
    const natten::Int3 g = p.grid();
    const Shape sizes{p.batch, g.z, g.y, g.x, p.heads, natten::num_slots(p)};
    const bool expanded =
        GetParam().layout == test::Layout::expanded_heads || GetParam().layout == test::Layout::expanded_batch;
    const test::Layout layout = expanded ? test::Layout::contiguous : GetParam().layout;
    attn = Tensor(dtype, sizes, layout), weights = Tensor(dtype, sizes, layout);
    int n = 0;
    weights.fill([&] { return test::round_to(dtype, std::sin(++n * 0.7)); });
    for_each_slot([&](const Shape& at, const Slot& slot) {
      if (!slot.used) weights.set(at, kNaN);
    });
  }

  /// visit(coordinates in the attention tensor, slot)
  template <class Visit>
  void for_each_slot(Visit visit) {
    const natten::Problem& p = operands->problem;
    const dense::Problem d = test::to_dense(p);
    const natten::Int3 g = p.grid();
    for (int64_t i = 0; i < p.batch * p.tokens(); ++i) {
      const Shape token{i / p.tokens(), i / g.x / g.y % g.z, i / g.x % g.y, i % g.x, 0, 0};
      const std::vector<Slot> slots = slots_of(p, d, token);
      for (int64_t j = 0; j < p.heads * int64_t(slots.size()); ++j) {
        Shape at = token;
        at[4] = j / int64_t(slots.size()), at[5] = j % int64_t(slots.size());
        visit(at, slots[at[5]]);
      }
    }
  }

  using Sums = std::map<Shape, Sum>;

  /// W = scale X Y^T + bias
  Sums scores(const Tensor& query, const Tensor& key, const Tensor& extra, const Tensor& bias, int dim, double scale) {
    Sums sums;
    for_each_slot([&](const Shape& at, const Slot& slot) {
      if (!slot.used) return;
      Sum& sum = sums[at];
      for (int c = 0; c < dim; ++c) {
        Shape q = at, k = with_head(slot.key, at[4]);
        q[5] = k[5] = c;
        sum.add(scale * query.get(q) * (slot.extra ? extra : key).get(k));
      }
      Shape entry = slot.bias;
      entry[4] = at[4];
      if (bias && !slot.extra) sum.add(bias.get(entry));
    });
    return sums;
  }

  /// Adds term(weight, query, key) to sums[where].
  template <class Add>
  void for_each_weight(Add add) {
    for_each_slot([&](const Shape& at, const Slot& slot) {
      if (slot.used) add(weights.get(at), at, slot, with_head(slot.key, at[4]));
    });
  }

  Shape with_head(Shape key, int64_t head) const {
    key[4] = head / operands->problem.heads_per_kv();
    return key;
  }

  void check(const char* name, const Tensor& tensor, const Sums& sums, double unused = 0) {
    SCOPED_TRACE(name);
    EXPECT_TRUE(tensor.guards_intact());
    const DType dtype = operands->problem.dtype;
    const double rounding = test::unit_roundoff(dtype),
                 accumulation = test::unit_roundoff(natten::accumulator_of(dtype));
    const double smallest = dtype == DType::f16 ? 0x1p-24 : 0;
    tensor.for_each([&](const Shape& at) {
      if (testing::Test::HasFailure()) return;
      const auto found = sums.find(at);
      if (found == sums.end()) {
        EXPECT_EQ(tensor.get(at), unused);
        return;
      }
      const Sum& s = found->second;
      const double limit = 1.01 * rounding * std::abs(s.value) + smallest + (s.terms + 8) * accumulation * s.magnitude;
      EXPECT_LE(std::abs(tensor.get(at) - s.value), limit);
    });
  }

  /// Runs on guarded memory that is full of NaN; twice, with threads in two orders, to the same bits.
  template <class Args>
  void run(void (*pass)(const natten::Problem&, const Args&, const Plan&, const natten::Executor&, void*),
           const Args& args, const Plan& plan, const std::vector<Tensor*>& outputs) {
    const natten::Problem& p = operands->problem;
    std::vector<std::vector<std::byte>> once;
    for (const natten::Executor& executor : {natten::serial_executor(), test::reverse_executor(5)}) {
      std::vector<double> workspace(natten::unfused_workspace_bytes(p, plan, executor.num_threads) / 8 + 16, kNaN);
      char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
      for (Tensor* output : outputs) output->poison();
      pass(p, args, plan, executor, aligned);
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (once.size() < outputs.size())
          once.push_back(outputs[i]->snapshot());
        else
          EXPECT_EQ(outputs[i]->snapshot(), once[i]);
      }
    }
  }

  void check_all(DType dtype);
  void check_scores(const Plan& plan);
  void check_weighing(const Plan& plan);

  void expect();

  std::optional<Operands> operands;
  Tensor attn, weights;
  Sums attn_sums, dattn, out, dq, dk, dv, dextra_k, dextra_v, dbias;  // what is expected
};

void Unfused::expect() {
  Operands& o = *operands;
  const natten::Problem& p = o.problem;
  attn_sums = scores(o.q, o.k, o.extra_k, o.bias, p.head_dim, p.scale);
  dattn = scores(o.dout, o.v, o.extra_v, {}, p.head_dim_v, 1.0);
  for (Sums* sums : {&out, &dq, &dk, &dv, &dextra_k, &dextra_v, &dbias}) sums->clear();
  for_each_weight([&](double w, Shape at, const Slot& slot, Shape key) {
    for (int c = 0; c < std::max(p.head_dim, p.head_dim_v); ++c) {
      at[5] = key[5] = c;
      if (c < p.head_dim_v) out[at].add(w * (slot.extra ? o.extra_v : o.v).get(key));
      if (c < p.head_dim_v) (slot.extra ? dextra_v : dv)[key].add(w * o.dout.get(at));
      if (c < p.head_dim) dq[at].add(p.scale * w * (slot.extra ? o.extra_k : o.k).get(key));
      if (c < p.head_dim) (slot.extra ? dextra_k : dk)[key].add(p.scale * w * o.q.get(at));
    }
    Shape entry = slot.bias;
    entry[4] = at[4];
    if (!slot.extra) dbias[entry].add(w);
  });
}

void Unfused::check_scores(const Plan& plan) {
  Operands& o = *operands;
  const natten::QkArgs qk{o.q.view(), o.k.view(), o.bias.view(), o.extra_k.view(), attn.view()};
  run(natten::qk, qk, plan, {&attn});
  check("attn", attn, attn_sums, -HUGE_VAL);

  natten::AvBackwardArgs av{o.dout.view(), weights.view(), o.v.view(), o.extra_v.view(), attn.view(), {}, {}};
  run(natten::av_backward, av, plan, {&attn});
  check("dattn", attn, dattn);
}

void Unfused::check_weighing(const Plan& plan) {
  Operands& o = *operands;
  run(natten::av, natten::AvArgs{weights.view(), o.v.view(), o.extra_v.view(), o.out.view()}, plan, {&o.out});
  check("out", o.out, out);

  std::vector<Tensor*> gradients{&o.dq};
  for (Tensor* tensor : {&o.dk, &o.dbias, &o.dextra_k})
    if (*tensor) gradients.push_back(tensor);
  natten::QkBackwardArgs qk{weights.view(), o.q.view(),  o.k.view(),     o.bias.view(),    o.extra_k.view(),
                            o.dq.view(),    o.dk.view(), o.dbias.view(), o.dextra_k.view()};
  run(natten::qk_backward, qk, plan, gradients);
  check("dq", o.dq, dq);
  if (o.dk) check("dk", o.dk, dk);
  if (o.dbias) check("dbias", o.dbias, dbias);
  if (o.dextra_k) check("dextra_k", o.dextra_k, dextra_k);

  gradients.clear();
  for (Tensor* tensor : {&o.dv, &o.dextra_v})
    if (*tensor) gradients.push_back(tensor);
  natten::AvBackwardArgs av{o.dout.view(), weights.view(),   o.v.view(), o.extra_v.view(), {},
                            o.dv.view(),   o.dextra_v.view()};
  run(natten::av_backward, av, plan, gradients);
  if (o.dv) check("dv", o.dv, dv);
  if (o.dextra_v) check("dextra_v", o.dextra_v, dextra_v);
}

void Unfused::check_all(DType dtype) {
  prepare(dtype);
  const natten::Problem& p = operands->problem;
  if (p.batch * p.heads * p.tokens() * natten::num_slots(p) > 60000) return;  // minutes, and the others see as much
  expect();
  for (const Plan& plan : natten::list_unfused_plans(p, test::kDevice).plans) {
    SCOPED_TRACE(natten::to_string(plan) + " " + test::to_string(dtype));
    check_scores(plan);
    check_weighing(plan);
    if (HasFailure()) return;
  }
}

TEST_P(Unfused, EveryPassOfEveryPlan) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) check_all(dtype);
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
