// SPDX-License-Identifier: MIT
// The ops for torch: schemas, Tensor -> TensorView, allocation, threads. No mathematics, and no check that the core
// makes. It touches torch through the stable ABI of 2.10 alone, so one binary serves every later torch; and no
// CPython, so it serves every Python. Errors leave as `natten[kind] sentence`, which python/natten maps to Python's
// exceptions.
#include "call.h"

namespace {

using namespace natten::binding;
using natten::TensorView;

// Of a tensor [batch, grid..., heads, ...], and of additional keys, whose grid is a line.
TensorView grid_view(const Tensor& t, int64_t rank) { return view_of(t, 0, 1, rank, 1 + rank); }
TensorView extra_view(const Tensor& t) { return grid_view(t, 1); }

// The tensors of one call: checked against each other, with unit last strides.
struct Inputs {
  Tensor q, k, v;
  OptionalTensor bias, extra_k, extra_v;

  void check_alike(const char* name, const Tensor& t) const { natten::binding::check_alike(name, t, q); }

  // Sizes of a tensor on the query's grid.
  Ints on_grid(int64_t rank, std::initializer_list<int64_t> trailing) const {
    Ints sizes;
    for (int64_t d = 0; d <= rank; ++d) sizes.push_back(q.size(d));
    sizes.insert(sizes.end(), trailing);
    return sizes;
  }

  natten::Problem problem(const Parameters& par) const;
  void fill(natten::ForwardArgs& args, int64_t rank) const;
};

natten::Problem Inputs::problem(const Parameters& par) const {
  const int64_t rank = par.rank();
  par.check_ranks();
  if (q.dim() != rank + 3)
    fail("query has shape " + shape_of(q) + ", but must have " + std::to_string(rank + 3) + " dimensions: [batch, " +
         std::to_string(rank) + " grid axes, heads, head_dim]");
  for (auto [name, t] : {std::pair{"key", &k}, {"value", &v}}) {
    check_alike(name, *t);
    if (t->dim() != rank + 3) fail(std::string(name) + " has shape " + shape_of(*t) + ", but query has " + shape_of(q));
  }
  natten::Problem p;
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.heads = narrow(q.size(rank + 1), "heads");
  p.heads_kv = narrow(k.size(rank + 1), "key heads");
  p.head_dim = narrow(q.size(rank + 2), "head_dim");
  p.head_dim_v = narrow(v.size(rank + 2), "value head_dim");
  p.scale = par.scale;
  p.oversize = par.oversize;
  for (int64_t d = 0; d < rank; ++d) p.axes[3 - rank + d] = par.axis(d, q.size(1 + d));
  Ints grid = on_grid(rank, {});
  if (!p.has_window()) {  // no query sees a key of the grid, so none need be there
    for (natten::Axis& a : p.axes) a.window = 0, a.stride = 1;
    for (int64_t d = 1; d <= rank; ++d) grid[d] = k.size(d);
  }
  auto shape = [&](int64_t dim) {
    Ints s = grid;
    s.insert(s.end(), {p.heads_kv, dim});
    return s;
  };
  check_shape("key", k, shape(p.head_dim));
  check_shape("value", v, shape(p.head_dim_v));
  if (bias) {
    check_bias(*bias, q, p.heads, par.window);
    p.has_bias = true;
  }
  if (extra_k.has_value() != extra_v.has_value()) fail("additional_keys and additional_values must be given together");
  if (extra_k) {
    check_alike("additional_keys", *extra_k);
    check_alike("additional_values", *extra_v);
    p.extra_keys = extra_k->dim() > 1 ? narrow(extra_k->size(1), "additional keys") : 0;
    check_shape("additional_keys", *extra_k, {p.batch, p.extra_keys, p.heads_kv, p.head_dim});
    check_shape("additional_values", *extra_v, {p.batch, p.extra_keys, p.heads_kv, p.head_dim_v});
  }
  natten::validate(p);
  return p;
}

void Inputs::fill(natten::ForwardArgs& args, int64_t rank) const {
  args.q = grid_view(q, rank);
  args.k = grid_view(k, rank);
  args.v = grid_view(v, rank);
  if (bias) args.bias = bias_view(*bias, rank);
  if (extra_k) args.extra_k = extra_view(*extra_k), args.extra_v = extra_view(*extra_v);
}

Inputs make_inputs(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor extra_k, OptionalTensor extra_v) {
  auto unit = [](OptionalTensor& t) {
    if (t) t = with_unit_last_stride(*t);
  };
  unit(bias), unit(extra_k), unit(extra_v);
  return {with_unit_last_stride(q), with_unit_last_stride(k), with_unit_last_stride(v), bias, extra_k, extra_v};
}

std::tuple<Tensor, Tensor> na_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor bias, OptionalTensor extra_k,
                                  OptionalTensor extra_v, Ints window, Ints stride, Ints dilation,
                                  std::vector<bool> causal, double scale, bool oversize, std::string plan_text) {
  return with_prefixed_errors([&]() -> std::tuple<Tensor, Tensor> {
    const Parameters par{window, stride, dilation, causal, scale, oversize, plan_text};
    const DeviceScope device(q);
    const Inputs in = make_inputs(q, k, v, bias, extra_k, extra_v);
    const natten::Problem p = in.problem(par);
    const natten::Plan plan = choose_plan(p, natten::Pass::forward, device.kind(), par.plan);
    Tensor out = empty(q, in.on_grid(par.rank(), {p.heads, p.head_dim_v}));
    Tensor lse = empty(q, in.on_grid(par.rank(), {p.heads}), lse_dtype(q));
    natten::ForwardArgs args;
    in.fill(args, par.rank());
    args.out = grid_view(out, par.rank());
    args.lse = grid_view(lse, par.rank());
    const natten::Executor executor = device.is_cuda() ? device.stream_executor() : torch_executor(approximate_work(p));
    const Workspace workspace(device, workspace_bytes(p, natten::Pass::forward, plan, executor.num_threads));
    forward(p, args, plan, executor, workspace.data());
    return {out, lse};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> na_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k,
                                                                  Tensor v, OptionalTensor bias, OptionalTensor extra_k,
                                                                  OptionalTensor extra_v, Tensor out, Tensor lse,
                                                                  Ints window, Ints stride, Ints dilation,
                                                                  std::vector<bool> causal, double scale, bool oversize,
                                                                  std::string plan_text) {
  return with_prefixed_errors([&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    const Parameters par{window, stride, dilation, causal, scale, oversize, plan_text};
    const int64_t rank = par.rank();
    const DeviceScope device(q);
    const Inputs in = make_inputs(q, k, v, bias, extra_k, extra_v);
    const natten::Problem p = in.problem(par);
    const natten::Plan plan = choose_plan(p, natten::Pass::backward, device.kind(), par.plan);
    check_results(q, out, dout, lse, dlse, in.on_grid(rank, {p.heads, p.head_dim_v}));
    dout = with_unit_last_stride(dout), out = with_unit_last_stride(out);
    natten::BackwardArgs args;
    in.fill(args, rank);
    args.out = grid_view(out, rank), args.lse = grid_view(lse, rank), args.dout = grid_view(dout, rank);
    if (dlse) args.dlse = grid_view(*dlse, rank);
    Tensor dq = empty_like(q, q), dk = empty_like(k, q), dv = empty_like(v, q), dbias = empty_like(bias, q);
    Tensor dextra_k = empty_like(extra_k, q), dextra_v = empty_like(extra_v, q);
    args.dq = grid_view(dq, rank), args.dk = grid_view(dk, rank), args.dv = grid_view(dv, rank);
    if (bias) args.dbias = bias_view(dbias, rank);
    if (extra_k) args.dextra_k = extra_view(dextra_k), args.dextra_v = extra_view(dextra_v);
    const natten::Executor executor = device.is_cuda() ? device.stream_executor() : torch_executor(approximate_work(p));
    const Workspace workspace(device, workspace_bytes(p, natten::Pass::backward, plan, executor.num_threads));
    backward(p, args, plan, executor, workspace.data());
    return {dq, dk, dv, dbias, dextra_k, dextra_v};
  });
}

// [extent, 2]: the first key of each query and how many there are, `dilation` tokens apart.
Tensor key_spans(int64_t extent, int64_t window, int64_t stride, int64_t dilation, bool causal) {
  return with_prefixed_errors([&] {
    natten::Problem p;
    p.extra_keys = 1;
    p.axes[2] = {narrow(extent, "grid axis"), narrow(window, "kernel_size"), narrow(stride, "stride"),
                 narrow(dilation, "dilation"), causal};
    natten::validate(p);
    const Tensor table = torch::stable::empty_cpu({extent, 2}, ScalarType::Long);
    int64_t* row = static_cast<int64_t*>(table.data_ptr());
    for (int64_t token = 0; token < extent; ++token, row += 2) {
      const natten::TokenKeys keys = natten::token_keys(p.axes[2], int(token));
      row[0] = keys.first;
      row[1] = keys.count;
    }
    return table;
  });
}

}  // namespace

#define NATTEN_WINDOWS "SymInt[] window, SymInt[] stride, SymInt[] dilation, bool[] causal, "
#define NATTEN_SAMPLES "SymInt[] grids, Tensor? bounds_q, Tensor? bounds_kv, "
#define NATTEN_OPERATOR NATTEN_WINDOWS "float scale, bool oversize, str plan"
NATTEN_LIBRARY(NATTEN_OP_NAMESPACE, m) {
  m.def("na_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? extra_k, Tensor? extra_v, " NATTEN_OPERATOR
        ") -> (Tensor out, Tensor lse)");
  m.def(
      "na_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? extra_k, Tensor? extra_v, "
      "Tensor out, Tensor lse, " NATTEN_OPERATOR
      ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dextra_k, Tensor dextra_v)");
  // varlen.cpp; `grids` has the axes of every sample, or bounds have the first token of every sample and the last's end
  m.def("na_varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, " NATTEN_SAMPLES NATTEN_OPERATOR
        ") -> (Tensor out, Tensor lse)");
  m.def(
      "na_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, "
      "Tensor lse, " NATTEN_SAMPLES NATTEN_OPERATOR ") -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  // unfused.cpp
  m.def("na_qk(Tensor q, Tensor k, Tensor? bias, Tensor? extra_k, " NATTEN_WINDOWS
        "float scale, float unused, bool oversize, str plan) -> Tensor attn");
  m.def("na_qk_bwd(Tensor dattn, Tensor q, Tensor k, Tensor? bias, Tensor? extra_k, " NATTEN_OPERATOR
        ") -> (Tensor dq, Tensor dk, Tensor dbias, Tensor dextra_k)");
  m.def("na_av(Tensor attn, Tensor v, Tensor? extra_v, " NATTEN_WINDOWS "bool oversize, str plan) -> Tensor out");
  m.def("na_av_bwd(Tensor dout, Tensor attn, Tensor v, Tensor? extra_v, " NATTEN_WINDOWS
        "bool oversize, str plan) -> (Tensor dattn, Tensor dv, Tensor dextra_v)");
  m.def("key_spans(SymInt extent, SymInt window, SymInt stride, SymInt dilation, bool causal) -> Tensor");
}
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CPU, m) {
  m.impl("na_fwd", TORCH_BOX(&na_fwd));
  m.impl("na_bwd", TORCH_BOX(&na_bwd));
}
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CUDA, m) {
  m.impl("na_fwd", TORCH_BOX(&na_fwd));
  m.impl("na_bwd", TORCH_BOX(&na_bwd));
}
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("key_spans", TORCH_BOX(&key_spans)); }
