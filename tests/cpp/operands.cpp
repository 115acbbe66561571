// SPDX-License-Identifier: MIT
#include "operands.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace test {

using natten::DType;
using natten::Pass;

Operands::Operands(const Case& c, DType dtype, uint32_t seed, int64_t guard) : problem(c.problem(dtype)) {
  const natten::Problem& p = problem;
  const DType sums = natten::accumulator_of(dtype);
  const bool expanded = c.layout == Layout::expanded_heads || c.layout == Layout::expanded_batch;
  const Layout in = c.layout, result = expanded ? Layout::contiguous : c.layout;
  const Layout table = c.layout == Layout::contiguous ? Layout::heads_first : result;
  const auto grid = [&](DType type, int heads, int channels, Layout layout) {
    const natten::Int3 g = p.grid();
    return Tensor(type, {p.batch, g.z, g.y, g.x, heads, channels}, layout, guard);
  };
  const auto extra = [&](int channels, Layout layout) {
    return Tensor(dtype, {p.batch, 1, 1, p.extra_keys, p.heads_kv, channels}, layout, guard);
  };
  const auto bias_table = [&](Layout layout) {
    const auto& a = p.axes;
    return Tensor(dtype, {1, 2 * a[0].window - 1, 2 * a[1].window - 1, 2 * a[2].window - 1, p.heads, 1}, layout, guard);
  };

  q = grid(dtype, p.heads, p.head_dim, in);
  dq = grid(dtype, p.heads, p.head_dim, result);
  if (p.has_window()) {
    k = grid(dtype, p.heads_kv, p.head_dim, in);
    v = grid(dtype, p.heads_kv, p.head_dim_v, in);
    dk = grid(dtype, p.heads_kv, p.head_dim, result);
    dv = grid(dtype, p.heads_kv, p.head_dim_v, result);
  }
  out = grid(dtype, p.heads, p.head_dim_v, result);
  dout = grid(dtype, p.heads, p.head_dim_v, in);
  lse = grid(sums, p.heads, 1, result);
  if (c.dlse) dlse = grid(sums, p.heads, 1, in);
  if (p.has_bias) bias = bias_table(table);
  if (p.has_bias) dbias = bias_table(table);
  if (p.extra_keys > 0) {
    extra_k = extra(p.head_dim, in);
    extra_v = extra(p.head_dim_v, in);
    dextra_k = extra(p.head_dim, result);
    dextra_v = extra(p.head_dim_v, result);
  }

  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  for (auto& [name, tensor] : inputs(Pass::backward)) {
    const bool scores = name == "q" || name == "k" || name == "extra_k";
    if (name != "out" && name != "lse") tensor->fill([&] { return normal(rng) * (scores ? c.amplitude : 1.0); });
  }
}

natten::BackwardArgs Operands::args() const {
  natten::BackwardArgs a;
  a.q = q.view(), a.k = k.view(), a.v = v.view(), a.bias = bias.view();
  a.extra_k = extra_k.view(), a.extra_v = extra_v.view();
  a.out = out.view(), a.lse = lse.view(), a.dout = dout.view(), a.dlse = dlse.view();
  a.dq = dq.view(), a.dk = dk.view(), a.dv = dv.view(), a.dbias = dbias.view();
  a.dextra_k = dextra_k.view(), a.dextra_v = dextra_v.view();
  return a;
}

dense::Inputs Operands::dense_inputs() const {
  return {q.values(),       k.values(),       v.values(),    bias.values(),
          extra_k.values(), extra_v.values(), dout.values(), dlse.values()};
}

namespace {

Operands::Named present(Operands::Named list) {
  std::erase_if(list, [](const auto& named) { return !*named.second; });
  return list;
}

}  // namespace

Operands::Named Operands::inputs(Pass pass) {
  Named list = {{"q", &q}, {"k", &k}, {"v", &v}, {"bias", &bias}, {"extra_k", &extra_k}, {"extra_v", &extra_v}};
  if (pass == Pass::backward) list.insert(list.end(), {{"dout", &dout}, {"dlse", &dlse}, {"out", &out}, {"lse", &lse}});
  return present(list);
}

Operands::Named Operands::outputs(Pass pass) {
  if (pass == Pass::forward) return present({{"out", &out}, {"lse", &lse}});
  return present(
      {{"dq", &dq}, {"dk", &dk}, {"dv", &dv}, {"dbias", &dbias}, {"dextra_k", &dextra_k}, {"dextra_v", &dextra_v}});
}

dense::Problem to_dense(const natten::Problem& problem) {
  dense::Problem p;
  p.batch = int(problem.batch);
  p.heads = problem.heads;
  p.heads_kv = problem.heads_kv;
  p.head_dim = problem.head_dim;
  p.head_dim_v = problem.head_dim_v;
  for (int i = 0; i < 3; ++i) {
    const natten::Axis& a = problem.axes[i];
    p.axes[i] = {a.extent, a.window, a.stride, a.dilation, a.causal};
  }
  p.extra_keys = problem.extra_keys;
  p.has_bias = problem.has_bias;
  p.scale = problem.scale;
  return p;
}

void run(Operands& operands, Pass pass, const natten::Plan& plan, const natten::Executor& executor) {
  std::vector<std::vector<std::byte>> before;
  for (const auto& [name, tensor] : operands.inputs(pass)) before.push_back(tensor->snapshot());
  for (const auto& [name, tensor] : operands.outputs(pass)) tensor->poison();

  // The workspace is bytes to us: elements of a float tensor, all NaN, between bands.
  const size_t bytes = natten::workspace_bytes(operands.problem, pass, plan, executor.num_threads);
  const Shape sizes = {1, 1, 1, 1, 1, int64_t(bytes / sizeof(float) + (bytes % sizeof(float) ? 1 : 0))};
  Tensor workspace(DType::f32, sizes, Layout::contiguous);
  if (pass == Pass::forward)
    natten::forward(operands.problem, operands.args(), plan, executor, workspace.view().ptr);
  else
    natten::backward(operands.problem, operands.args(), plan, executor, workspace.view().ptr);

  EXPECT_TRUE(workspace.guards_intact()) << "wrote outside of the workspace";
  for (const auto& [name, tensor] : operands.outputs(pass))
    EXPECT_TRUE(tensor->guards_intact()) << "wrote outside of " << name;
  size_t i = 0;
  for (const auto& [name, tensor] : operands.inputs(pass)) {
    const std::vector<std::byte> after = tensor->snapshot();
    EXPECT_TRUE(after == before[i++]) << "changed the input " << name;
  }
}

void run_forward_for(Operands& operands, const natten::Plan& backward) {
  const char* wanted = in_tf32(backward) ? "+tf32" : "";
  run(operands, Pass::forward, natten::choose_plan(operands.problem, Pass::forward, kDevice, wanted));
}

natten::Executor reverse_executor(int num_threads) {
  return {num_threads, [](int64_t count, const std::function<void(int64_t)>& task) {
            for (int64_t i = count; i-- > 0;) task(i);
          }};
}

std::vector<std::vector<std::byte>> snapshot(Operands& operands, Pass pass) {
  std::vector<std::vector<std::byte>> bytes;
  for (const auto& [name, tensor] : operands.outputs(pass)) bytes.push_back(tensor->snapshot());
  return bytes;
}

// ---- comparison ----

namespace {

template <DType kType>
double round_like(double x) {
  return round_to(kType, x);
}

double largest(const dense::Array& values) {
  double m = 0.0;
  for (const double x : values)
    if (std::isfinite(x)) m = std::max(m, std::abs(x));
  return m;
}

/// NaN where only one of them is finite, or both are infinite and differ.
double largest_difference(const dense::Array& a, const dense::Array& b) {
  double m = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;  // equal infinities included
    const double difference = std::abs(a[i] - b[i]);
    if (!std::isfinite(difference)) return std::numeric_limits<double>::quiet_NaN();
    m = std::max(m, difference);
  }
  return m;
}

const dense::Array& result(const dense::Results& results, const std::string& name) {
  if (name == "out") return results.out;
  if (name == "lse") return results.lse;
  if (name == "dq") return results.dq;
  if (name == "dk") return results.dk;
  if (name == "dv") return results.dv;
  if (name == "dbias") return results.dbias;
  return name == "dextra_k" ? results.dextra_k : results.dextra_v;
}

}  // namespace

bool in_tf32(const natten::Plan& plan) { return plan.variant.ends_with("-tf32"); }

Reference::Reference(const Operands& operands)
    : dtype_(operands.problem.dtype), scale_(operands.problem.scale), inputs_(operands.dense_inputs()) {
  const dense::Problem problem = to_dense(operands.problem);
  exact_ = dense::attention(problem, inputs_);
  if (size_of(dtype_) > 2) return;
  const dense::Round round = dtype_ == DType::bf16 ? round_like<DType::bf16> : round_like<DType::f16>;
  rounded_.push_back(dense::attention(problem, inputs_, {.stored = round, .scores = nullptr}));
  rounded_.push_back(dense::attention(problem, inputs_, {.stored = round, .scores = round}));
}

/// The size of the terms of which a result is the sum; they may cancel to nothing.
double Reference::term(const std::string& name) const {
  const double k = std::max(largest(inputs_.k), largest(inputs_.extra_k));
  if (name == "out") return std::max(largest(inputs_.v), largest(inputs_.extra_v));
  if (name == "lse") return std::max(exact_.max_logit, 1.0);
  if (name == "dv" || name == "dextra_v") return largest(inputs_.dout);
  if (name == "dbias") return exact_.max_dp;
  return std::abs(scale_) * exact_.max_dp * (name == "dq" ? k : largest(inputs_.q));
}

/// Sums are in float (double for f64), so results are within 1e-5 (1e-12) of the largest one. Three things add to that:
/// - An error of a logit multiplies the probabilities: 8 roundoffs of the largest logit, where that is more.
/// - Where terms cancel (window 1, saturated softmax) their roundoff is left.
/// - Half types: FlashAttention's rule, twice the error of a dense computation in that precision, at least the rounding
///   of the largest result. Where errors of few elements cancel by chance, storing less of it may err more: the larger.
/// - TF32: a roundoff of each factor, of the logits too, which multiplies the probabilities.
double Reference::tolerance(const std::string& name, bool tf32) const {
  const dense::Array& exact = result(exact_, name);
  const DType sums = natten::accumulator_of(dtype_);
  const double relative = std::max(sums == DType::f64 ? 1e-12 : 1e-5, 8.0 * unit_roundoff(sums) * exact_.max_logit);
  const double in_sums = relative * largest(exact) + 16.0 * unit_roundoff(sums) * term(name);
  if (tf32) return in_sums + 0x1p-10 * (1.0 + exact_.max_logit) * (term(name) + largest(exact));
  if (rounded_.empty() || name == "lse") return in_sums;
  double by_rounding = unit_roundoff(dtype_) * largest(exact);
  for (const dense::Results& rounded : rounded_)
    by_rounding = std::max(by_rounding, 2.0 * largest_difference(exact, result(rounded, name)));
  return in_sums + by_rounding;
}

void Reference::check(Operands& operands, Pass pass, const natten::Plan& plan) const {
  for (const auto& [name, tensor] : operands.outputs(pass)) {
    const dense::Array& exact = result(exact_, name);
    const dense::Array values = tensor->values();
    ASSERT_EQ(values.size(), exact.size()) << name;
    const double limit = tolerance(name, in_tf32(plan)), difference = largest_difference(values, exact);
    EXPECT_TRUE(difference <= limit) << name << " is off by " << difference << ", may be by " << limit
                                     << "; the largest value is " << largest(exact);
  }
}

}  // namespace test
