// SPDX-License-Identifier: MIT
#include "unfused_operands.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

namespace test {
namespace {

using natten::DType;
using natten::Plan;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

}  // namespace

/// What stands in a slot: a key of the grid, an additional one, or nothing.
struct UnfusedOperands::Slot {
  bool used = false, extra = false;
  Shape key{}, bias{};  // coordinates, without head and channel
};

/// The slots of one query in their order, from the definition of the window alone.
std::vector<UnfusedOperands::Slot> UnfusedOperands::slots_of(const natten::Problem& p, const dense::Problem& d,
                                                             const Shape& query) {
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

UnfusedOperands::UnfusedOperands(const Case& c, DType dtype, uint32_t seed, int64_t guard)
    : operands(c, dtype, seed, guard), guard_(guard) {
  const natten::Problem& p = operands.problem;
  const natten::Int3 g = p.grid();
  const Shape sizes{p.batch, g.z, g.y, g.x, p.heads, natten::num_slots(p)};
  const bool expanded = c.layout == Layout::expanded_heads || c.layout == Layout::expanded_batch;
  const Layout layout = expanded ? Layout::contiguous : c.layout;
  attn = Tensor(dtype, sizes, layout, guard), weights = Tensor(dtype, sizes, layout, guard);
  int n = 0;
  weights.fill([&] { return round_to(dtype, std::sin(++n * 0.7)); });
  for_each_slot([&](const Shape& at, const Slot& slot) {
    if (!slot.used) weights.set(at, kNaN);
  });
}

double UnfusedOperands::work(const natten::Problem& p) {
  return double(p.batch) * p.heads * double(p.tokens()) * double(natten::num_slots(p)) *
         std::max(p.head_dim, p.head_dim_v);
}

/// visit(coordinates in the attention tensor, slot)
template <class Visit>
void UnfusedOperands::for_each_slot(Visit visit) {
  const natten::Problem& p = operands.problem;
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

/// W = scale X Y^T + bias
UnfusedOperands::Sums UnfusedOperands::scores(const Tensor& query, const Tensor& key, const Tensor& extra,
                                              const Tensor& bias, int dim, double scale) {
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
void UnfusedOperands::for_each_weight(Add add) {
  for_each_slot([&](const Shape& at, const Slot& slot) {
    if (slot.used) add(weights.get(at), at, slot, with_head(slot.key, at[4]));
  });
}

Shape UnfusedOperands::with_head(Shape key, int64_t head) const {
  key[4] = head / operands.problem.heads_per_kv();
  return key;
}

void UnfusedOperands::compare(const char* name, const Tensor& tensor, const Sums& sums, double unused) {
  SCOPED_TRACE(name);
  EXPECT_TRUE(tensor.guards_intact());
  if (!expected_) return;
  const DType dtype = operands.problem.dtype;
  const double rounding = unit_roundoff(dtype), accumulation = unit_roundoff(natten::accumulator_of(dtype));
  const double smallest = dtype == DType::f16 ? 0x1p-24 : 0, largest = dtype == DType::f16 ? 65504 : HUGE_VAL;
  tensor.for_each([&](const Shape& at) {
    if (testing::Test::HasFailure()) return;
    const auto found = sums.find(at);
    if (found == sums.end()) {
      EXPECT_EQ(tensor.get(at), unused);
      return;
    }
    const Sum& s = found->second;
    const double limit = 1.01 * rounding * std::abs(s.value) + smallest + (s.terms + 8) * accumulation * s.magnitude;
    if (std::abs(s.value) + limit >= largest) return;
    EXPECT_LE(std::abs(tensor.get(at) - s.value), limit);
  });
}

template <class Args>
void UnfusedOperands::run(void (*pass)(const natten::Problem&, const Args&, const Plan&, const natten::Executor&,
                                       void*),
                          const Args& args, const Plan& plan, const std::vector<Tensor*>& outputs) {
  const natten::Problem& p = operands.problem;
  std::vector<std::vector<std::byte>> once;
  for (const natten::Executor& executor : {natten::serial_executor(), reverse_executor(5)}) {
    const auto bytes = int64_t(natten::unfused_workspace_bytes(p, plan, executor.num_threads));
    Tensor workspace(DType::f32, {1, 1, 1, 1, 1, (bytes + 3) / 4}, Layout::contiguous, guard_);  // full of NaN
    for (Tensor* output : outputs) output->poison();
    pass(p, args, plan, executor, workspace.view().ptr);
    EXPECT_TRUE(workspace.guards_intact());
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (once.size() < outputs.size())
        once.push_back(outputs[i]->snapshot());
      else
        EXPECT_EQ(outputs[i]->snapshot(), once[i]);
    }
  }
}

void UnfusedOperands::expect() {
  Operands& o = operands;
  const natten::Problem& p = o.problem;
  expected_ = true;
  attn_sums_ = scores(o.q, o.k, o.extra_k, o.bias, p.head_dim, p.scale);
  dattn_ = scores(o.dout, o.v, o.extra_v, {}, p.head_dim_v, 1.0);
  for (Sums* sums : {&out_, &dq_, &dk_, &dv_, &dextra_k_, &dextra_v_, &dbias_}) sums->clear();
  for_each_weight([&](double w, Shape at, const Slot& slot, Shape key) {
    for (int c = 0; c < std::max(p.head_dim, p.head_dim_v); ++c) {
      at[5] = key[5] = c;
      if (c < p.head_dim_v) out_[at].add(w * (slot.extra ? o.extra_v : o.v).get(key));
      if (c < p.head_dim_v) (slot.extra ? dextra_v_ : dv_)[key].add(w * o.dout.get(at));
      if (c < p.head_dim) dq_[at].add(p.scale * w * (slot.extra ? o.extra_k : o.k).get(key));
      if (c < p.head_dim) (slot.extra ? dextra_k_ : dk_)[key].add(p.scale * w * o.q.get(at));
    }
    Shape entry = slot.bias;
    entry[4] = at[4];
    if (!slot.extra) dbias_[entry].add(w);
  });
}

void UnfusedOperands::check_scores(const Plan& plan) {
  Operands& o = operands;
  const natten::QkArgs qk{o.q.view(), o.k.view(), o.bias.view(), o.extra_k.view(), attn.view()};
  run(natten::qk, qk, plan, {&attn});
  compare("attn", attn, attn_sums_, -HUGE_VAL);

  natten::AvBackwardArgs av{o.dout.view(), weights.view(), o.v.view(), o.extra_v.view(), attn.view(), {}, {}};
  run(natten::av_backward, av, plan, {&attn});
  compare("dattn", attn, dattn_);
}

void UnfusedOperands::check_weighing(const Plan& plan) {
  Operands& o = operands;
  run(natten::av, natten::AvArgs{weights.view(), o.v.view(), o.extra_v.view(), o.out.view()}, plan, {&o.out});
  compare("out", o.out, out_);

  std::vector<Tensor*> gradients{&o.dq};
  for (Tensor* tensor : {&o.dk, &o.dbias, &o.dextra_k})
    if (*tensor) gradients.push_back(tensor);
  natten::QkBackwardArgs qk{weights.view(), o.q.view(),  o.k.view(),     o.bias.view(),    o.extra_k.view(),
                            o.dq.view(),    o.dk.view(), o.dbias.view(), o.dextra_k.view()};
  run(natten::qk_backward, qk, plan, gradients);
  compare("dq", o.dq, dq_);
  if (o.dk) compare("dk", o.dk, dk_);
  if (o.dbias) compare("dbias", o.dbias, dbias_);
  if (o.dextra_k) compare("dextra_k", o.dextra_k, dextra_k_);

  gradients.clear();
  for (Tensor* tensor : {&o.dv, &o.dextra_v})
    if (*tensor) gradients.push_back(tensor);
  natten::AvBackwardArgs av{o.dout.view(), weights.view(),   o.v.view(), o.extra_v.view(), {},
                            o.dv.view(),   o.dextra_v.view()};
  run(natten::av_backward, av, plan, gradients);
  if (o.dv) compare("dv", o.dv, dv_);
  if (o.dextra_v) compare("dextra_v", o.dextra_v, dextra_v_);
}

void UnfusedOperands::check(const Plan& plan) {
  check_scores(plan);
  check_weighing(plan);
}

}  // namespace test
