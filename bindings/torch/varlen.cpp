// SPDX-License-Identifier: MIT
// Packed samples for torch; the ops' schemas stand in binding.cpp with the others. Tensors are [batch, tokens, heads,
// channels], the samples one behind the other along the tokens. They are told in one of two ways:
//
//   grids    `rank` sizes for each sample, whose queries and keys lie on that grid, row-major
//   bounds   for dense attention: the tokens at which each sample begins, and the end of the last; queries and keys may
//            differ in number. What lies behind the last sample is not seen and sees nothing.
#include "natten/packed.h"

#include "call.h"

namespace {

using namespace natten::binding;
using natten::BackwardArgs;
using natten::ForwardArgs;
using natten::Int3;
using natten::Problem;
using natten::TensorView;

// Where a sample lies among the tokens: queries on a grid, and `keys` keys, as many unless they have bounds of
// their own.
struct Piece {
  int64_t first_q, first_k;
  Int3 grid;
  int64_t keys;
};

struct Packed {
  Parameters par;
  bool is_dense;
  Tensor q, k, v;
  OptionalTensor bias;
  DeviceScope device;
  Problem base;
  std::vector<Piece> pieces;

  Packed(const Parameters& parameters, Tensor q, Tensor k, Tensor v, OptionalTensor bias, const Ints& grids,
         const OptionalTensor& bounds_q, const OptionalTensor& bounds_kv);

  Ints out_sizes() const { return {base.batch, q.size(1), base.heads, base.head_dim_v}; }
  Problem problem(const Piece& piece) const;
  natten::Plan plan(const Problem& p, natten::Pass pass) const;
  void fill(ForwardArgs& args, const Problem& p, const Piece& piece, const Tensor& out, const Tensor& lse) const;
  TensorView queries(const Tensor& t, const Piece& piece) const;
  TensorView keys(const Tensor& t, const Piece& piece) const;

  template <class Sample>
  void run(const std::vector<Sample>& samples, void (*pass)(std::span<const Sample>, const natten::Executor&, void*)) {
    double work = 0;
    for (const Sample& s : samples) work += approximate_work(s.problem);
    const natten::Executor executor = device.is_cuda() ? device.stream_executor() : torch_executor(work);
    const std::span<const Sample> all(samples);
    const Workspace workspace(device, workspace_bytes(all, executor.num_threads));
    pass(all, executor, workspace.data());
  }

 private:
  void lay_out_grids(const Ints& grids);
  void lay_out_bounds(const Ints& bounds_q, const Ints& bounds_kv);
};

// NOTE: bounds on a GPU are waited for, because windows, plans and grids of launches follow from them.
Ints bounds_of(const char* side, const Tensor& bounds, int64_t tokens) {
  if (bounds.dim() != 1 || bounds.size(0) == 0) fail(std::string("the bounds of samples must be 1-D, of ") + side);
  const Tensor host = torch::stable::empty_cpu({bounds.size(0)}, ScalarType::Long);
  TORCH_SUBSET_CALL(aoti_torch_copy_(host.get(), bounds.get(), 0));
  const int64_t* values = static_cast<const int64_t*>(host.data_ptr());
  const Ints list(values, values + bounds.size(0));
  if (list[0] != 0 || !std::is_sorted(list.begin(), list.end()))
    fail(std::string("samples of ") + side + " must have 0 or more tokens, one behind the other from token 0 on");
  if (list.back() > tokens)
    fail(std::string("samples of ") + side + " add up to " + std::to_string(list.back()) +
         " tokens, but the tensor has " + std::to_string(tokens) + ": pack all samples into it");
  return list;
}

Packed::Packed(const Parameters& parameters, Tensor query, Tensor key, Tensor value, OptionalTensor table,
               const Ints& grids, const OptionalTensor& bounds_q, const OptionalTensor& bounds_kv)
    : par(parameters),
      is_dense(bounds_q.has_value()),
      q(with_unit_last_stride(query)),
      k(with_unit_last_stride(key)),
      v(with_unit_last_stride(value)),
      bias(table ? OptionalTensor(with_unit_last_stride(*table)) : table),
      device(q) {
  par.check_ranks();
  if (q.dim() != 4 || k.dim() != 4)
    fail("packed query and key must be [batch, tokens, heads, head_dim], got " + shape_of(q) + " and " + shape_of(k));
  if (is_dense != bounds_kv.has_value()) fail("samples need bounds of queries and of keys: give both or neither");
  if (is_dense && (par.rank() != 1 || bias)) fail("samples with bounds are lines, and have no relative position bias");
  check_alike("key", k, q), check_alike("value", v, q);
  base.dtype = dtype_of(q);
  base.batch = q.size(0);
  base.heads = narrow(q.size(2), "heads"), base.heads_kv = narrow(k.size(2), "key heads");
  base.head_dim = narrow(q.size(3), "head_dim");
  base.head_dim_v = v.dim() == 4 ? narrow(v.size(3), "value head_dim") : 0;
  base.scale = par.scale, base.oversize = par.oversize;
  base.has_bias = bias.has_value();
  check_shape("key", k, {base.batch, is_dense ? k.size(1) : q.size(1), base.heads_kv, base.head_dim});
  check_shape("value", v, {base.batch, k.size(1), base.heads_kv, base.head_dim_v});
  if (bias) check_bias(*bias, q, base.heads, par.window);
  Problem checked = base;  // heads, channels and scale, also where there is no sample
  checked.has_bias = false;
  natten::validate(checked);
  if (is_dense)
    lay_out_bounds(bounds_of("queries", *bounds_q, q.size(1)), bounds_of("keys", *bounds_kv, k.size(1)));
  else
    lay_out_grids(grids);
}

void Packed::lay_out_grids(const Ints& grids) {
  if (grids.size() % par.rank() != 0) fail("samples need one size for each axis of their grids");
  int64_t first = 0;
  for (size_t i = 0; i < grids.size(); i += par.rank()) {
    Int3 grid;
    int* const axes[3] = {&grid.z, &grid.y, &grid.x};
    for (int64_t d = 0; d < par.rank(); ++d) *axes[3 - par.rank() + d] = narrow(grids[i + d], "grid axis");
    pieces.push_back({first, first, grid, 0});
    natten::validate(problem(pieces.back()));
    first += pieces.back().keys = grid.volume();
    if (first > q.size(1)) break;  // no sum of the sizes of legal grids can overflow
  }
  if (first != q.size(1))
    fail("samples have " + std::to_string(first) + " tokens in all, but query has " + std::to_string(q.size(1)));
}

void Packed::lay_out_bounds(const Ints& bounds_q, const Ints& bounds_kv) {
  if (bounds_q.size() != bounds_kv.size())
    fail("there are " + std::to_string(bounds_q.size() - 1) + " samples of queries but " +
         std::to_string(bounds_kv.size() - 1) + " of keys");
  auto add = [&](int64_t q0, int64_t q1, int64_t k0, int64_t k1) {
    pieces.push_back({q0, k0, {1, 1, narrow(q1 - q0, "a sample")}, k1 - k0});
  };
  for (size_t i = 1; i < bounds_q.size(); ++i) add(bounds_q[i - 1], bounds_q[i], bounds_kv[i - 1], bounds_kv[i]);
  add(bounds_q.back(), q.size(1), k.size(1), k.size(1));  // what lies behind
  add(q.size(1), q.size(1), bounds_kv.back(), k.size(1));
  for (const Piece& piece : pieces) {
    Problem p = problem(piece);
    if (piece.keys == 0) p.extra_keys = 1;  // NOTE: no keys at all are a mistake elsewhere, and a legal sample here
    natten::validate(p);
  }
}

// Dense attention is the problem whose window is its grid, or between lines of two lengths one whose keys are all
// additional.
Problem Packed::problem(const Piece& piece) const {
  Problem p = base;
  const int extents[3] = {piece.grid.z, piece.grid.y, piece.grid.x};
  for (int64_t d = 0; !is_dense && d < par.rank(); ++d)
    p.axes[3 - par.rank() + d] = par.axis(d, extents[3 - par.rank() + d]);
  if (!is_dense) return p;
  const int length = piece.grid.x, keys = narrow(piece.keys, "a sample");
  if (length == keys && length > 0) {
    p.axes[2] = {length, length, 1, 1, par.causal[0]};
    return p;
  }
  if (par.causal[0] && length > 0 && keys > 0)
    fail("attention with is_causal needs as many queries as keys, got " + std::to_string(length) + " and " +
         std::to_string(keys) + ": which key a query is aligned with is ambiguous otherwise");
  for (natten::Axis& a : p.axes) a.window = 0;
  p.axes[2].extent = length, p.extra_keys = keys;
  return p;
}

// A forced plan means the samples that have something to compute.
natten::Plan Packed::plan(const Problem& p, natten::Pass pass) const {
  const bool computes = p.tokens() > 0 && (p.has_window() || p.extra_keys > 0);
  return choose_plan(p, pass, device.kind(), computes ? std::string_view(par.plan) : std::string_view());
}

// Tokens of [batch, tokens, heads, ...] from `first` on as a grid.
TensorView view_on(const Tensor& t, int64_t first, Int3 grid) {
  const auto s = t.strides();
  const ScalarType type = t.scalar_type();
  const int bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  char* const begin = static_cast<char*>(t.data_ptr()) + first * s[1] * bytes;
  return {begin, {s[0], s[1] * grid.x * grid.y, s[1] * grid.x, s[1], s[2], 1}};
}

TensorView Packed::queries(const Tensor& t, const Piece& piece) const { return view_on(t, piece.first_q, piece.grid); }
TensorView Packed::keys(const Tensor& t, const Piece& piece) const { return view_on(t, piece.first_k, piece.grid); }

void Packed::fill(ForwardArgs& args, const Problem& p, const Piece& piece, const Tensor& out, const Tensor& lse) const {
  args.q = queries(q, piece), args.out = queries(out, piece), args.lse = queries(lse, piece);
  (p.has_window() ? args.k : args.extra_k) = keys(k, piece);
  (p.has_window() ? args.v : args.extra_v) = keys(v, piece);
  if (bias) args.bias = bias_view(*bias, par.rank());
}

std::tuple<Tensor, Tensor> na_varlen_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor bias, Ints grids,
                                         OptionalTensor bounds_q, OptionalTensor bounds_kv, Ints window, Ints stride,
                                         Ints dilation, std::vector<bool> causal, double scale, bool oversize,
                                         std::string plan) {
  return with_prefixed_errors([&]() -> std::tuple<Tensor, Tensor> {
    Packed in({window, stride, dilation, causal, scale, oversize, plan}, q, k, v, bias, grids, bounds_q, bounds_kv);
    Tensor out = empty(q, in.out_sizes());
    Tensor lse = empty(q, {q.size(0), q.size(1), q.size(2)}, lse_dtype(q));
    std::vector<natten::ForwardSample> samples;
    for (const Piece& piece : in.pieces) {
      const Problem p = in.problem(piece);
      if (p.tokens() == 0) continue;
      samples.push_back({p, {}, in.plan(p, natten::Pass::forward)});
      in.fill(samples.back().args, p, piece, out, lse);
    }
    in.run(samples, natten::forward);
    return {out, lse};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> na_varlen_bwd(Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v,
                                                         OptionalTensor bias, Tensor out, Tensor lse, Ints grids,
                                                         OptionalTensor bounds_q, OptionalTensor bounds_kv, Ints window,
                                                         Ints stride, Ints dilation, std::vector<bool> causal,
                                                         double scale, bool oversize, std::string plan) {
  return with_prefixed_errors([&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    Packed in({window, stride, dilation, causal, scale, oversize, plan}, q, k, v, bias, grids, bounds_q, bounds_kv);
    check_results(q, out, dout, lse, dlse, in.out_sizes());
    dout = with_unit_last_stride(dout), out = with_unit_last_stride(out);
    Tensor dq = empty_like(q, q), dk = empty_like(k, q), dv = empty_like(v, q);
    Ints tables{0};  // [samples, heads, ...]: every sample has its own
    if (bias) tables = {int64_t(in.pieces.size())};
    for (int64_t d = 0; bias && d < bias->dim(); ++d) tables.push_back(bias->size(d));
    Tensor dbias = empty(q, tables);
    std::vector<natten::BackwardSample> samples;
    for (size_t i = 0; i < in.pieces.size(); ++i) {
      const Piece& piece = in.pieces[i];
      const Problem p = in.problem(piece);
      if (p.tokens() == 0 && p.extra_keys == 0 && !bias) continue;  // there is nothing to write
      samples.push_back({p, {}, in.plan(p, natten::Pass::backward)});
      BackwardArgs& args = samples.back().args;
      in.fill(args, p, piece, out, lse);
      args.dout = in.queries(dout, piece), args.dq = in.queries(dq, piece);
      if (dlse) args.dlse = in.queries(*dlse, piece);
      (p.has_window() ? args.dk : args.dextra_k) = in.keys(dk, piece);
      (p.has_window() ? args.dv : args.dextra_v) = in.keys(dv, piece);
      if (!bias) continue;
      args.dbias = view_of(dbias, kNone, 2, in.par.rank(), 1);
      args.dbias.ptr = static_cast<char*>(args.dbias.ptr) + int64_t(i) * dbias.strides()[0] * size_of(p.dtype);
    }
    in.run(samples, natten::backward);
    return {dq, dk, dv, dbias};
  });
}

}  // namespace

#define NATTEN_VARLEN_KERNELS(m)                        \
  do {                                                  \
    m.impl("na_varlen_fwd", TORCH_BOX(&na_varlen_fwd)); \
    m.impl("na_varlen_bwd", TORCH_BOX(&na_varlen_bwd)); \
  } while (0)
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CPU, m) { NATTEN_VARLEN_KERNELS(m); }
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CUDA, m) { NATTEN_VARLEN_KERNELS(m); }
