// SPDX-License-Identifier: MIT
// The unfused ops for torch; their schemas stand in binding.cpp with the others. Tensors have their heads before the
// grid, as in every release of the original: [batch, heads, *grid, head_dim] and [batch, heads, *grid, slots].
#include "natten/unfused.h"

#include "call.h"

namespace {

using namespace natten::binding;
using natten::TensorView;

TensorView heads_first_view(const Tensor& t, int64_t rank) { return view_of(t, 0, 2, rank, 1); }

// One call: `query` has the queries' heads and grid (q, dout or attn), `key` holds rows of keys (k or v).
struct Call {
  DeviceScope device;
  Parameters par;
  natten::Problem p;
  int64_t rank;
  Ints grid;  // [batch, heads, *grid]

  Call(const Parameters& parameters, const char* query_name, const Tensor& query, const char* key_name,
       const Tensor& key, const OptionalTensor& extra, const OptionalTensor& bias);

  Ints with(int64_t last) const {
    Ints sizes = grid;
    sizes.push_back(last);
    return sizes;
  }
  Ints attn_sizes() const { return with(num_slots(p)); }
  TensorView view(const Tensor& t) const { return heads_first_view(t, rank); }
  TensorView extra_view(const OptionalTensor& t) const { return t ? heads_first_view(*t, 1) : TensorView{}; }
  TensorView table(const OptionalTensor& t) const { return t ? bias_view(*t, rank) : TensorView{}; }

  template <class Args>
  void run(void (*pass)(const natten::Problem&, const Args&, const natten::Plan&, const natten::Executor&, void*),
           const Args& args) const {
    const natten::Plan plan = choose_unfused_plan(p, device.kind(), par.plan);
    const natten::Executor executor = device.is_cuda() ? device.stream_executor() : torch_executor(approximate_work(p));
    const Workspace workspace(device, unfused_workspace_bytes(p, plan, executor.num_threads));
    pass(p, args, plan, executor, workspace.data());
  }
};

Call::Call(const Parameters& parameters, const char* query_name, const Tensor& query, const char* key_name,
           const Tensor& key, const OptionalTensor& extra, const OptionalTensor& bias)
    : device(query), par(parameters), rank(parameters.rank()) {
  par.check_ranks();
  for (auto [name, t] : {std::pair{query_name, &query}, {key_name, &key}})
    if (t->dim() != rank + 3)
      fail(std::string(name) + " has shape " + shape_of(*t) + ", but must have " + std::to_string(rank + 3) +
           " dimensions: [batch, heads, " + std::to_string(rank) + " grid axes, channels]");
  check_alike(key_name, key, query);
  p.dtype = dtype_of(query);
  p.batch = query.size(0);
  p.heads = narrow(query.size(1), "heads");
  p.heads_kv = narrow(key.size(1), "key heads");
  p.head_dim = p.head_dim_v = narrow(key.size(rank + 2), "head_dim");
  p.scale = par.scale;
  p.oversize = par.oversize;
  p.has_bias = bias.has_value();
  Ints expected{p.batch, p.heads_kv};
  for (int64_t d = 0; d < rank; ++d) {
    p.axes[3 - rank + d] = par.axis(d, query.size(2 + d));
    expected.push_back(query.size(2 + d));
  }
  for (int64_t d = 0; d < rank + 2; ++d) grid.push_back(query.size(d));
  expected.push_back(p.head_dim);
  check_shape(key_name, key, expected);
  if (bias) check_bias(*bias, query, p.heads, par.window);
  if (extra) {
    const std::string name = std::string("additional ") + key_name + "s";
    check_alike(name.c_str(), *extra, query);
    p.extra_keys = extra->dim() > 2 ? narrow(extra->size(2), "additional keys") : 0;
    check_shape(name.c_str(), *extra, {p.batch, p.heads_kv, p.extra_keys, p.head_dim});
  }
  natten::validate_unfused(p);
}

void check_attn(const char* name, const Tensor& attn, const Tensor& other, const Call& call) {
  check_alike(name, attn, other);
  check_shape(name, attn, call.attn_sizes());
}

OptionalTensor unit(const OptionalTensor& t) { return t ? OptionalTensor(with_unit_last_stride(*t)) : t; }

Tensor na_qk(Tensor q, Tensor k, OptionalTensor bias, OptionalTensor extra_k, Ints window, Ints stride, Ints dilation,
             std::vector<bool> causal, double scale, double unused, bool oversize, std::string plan) {
  return with_prefixed_errors([&] {
    const Call call({window, stride, dilation, causal, scale, oversize, plan}, "query", q, "key", k, extra_k, bias);
    check_shape("query", q, call.with(call.p.head_dim));
    q = with_unit_last_stride(q), k = with_unit_last_stride(k), bias = unit(bias), extra_k = unit(extra_k);
    Tensor attn = empty(q, call.attn_sizes());
    call.run(natten::qk, natten::QkArgs{call.view(q), call.view(k), call.table(bias), call.extra_view(extra_k),
                                        call.view(attn), unused});
    return attn;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> na_qk_bwd(Tensor dattn, Tensor q, Tensor k, OptionalTensor bias,
                                                     OptionalTensor extra_k, Ints window, Ints stride, Ints dilation,
                                                     std::vector<bool> causal, double scale, bool oversize,
                                                     std::string plan) {
  return with_prefixed_errors([&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    const Call call({window, stride, dilation, causal, scale, oversize, plan}, "query", q, "key", k, extra_k, bias);
    check_shape("query", q, call.with(call.p.head_dim));
    check_attn("dattn", dattn, q, call);
    dattn = with_unit_last_stride(dattn), q = with_unit_last_stride(q), k = with_unit_last_stride(k);
    extra_k = unit(extra_k);
    Tensor dq = empty_like(q, q), dk = empty_like(k, q), dbias = empty_like(bias, q), dextra = empty_like(extra_k, q);
    call.run(natten::qk_backward, natten::QkBackwardArgs{call.view(dattn),
                                                         call.view(q),
                                                         call.view(k),
                                                         {},
                                                         call.extra_view(extra_k),
                                                         call.view(dq),
                                                         call.view(dk),
                                                         bias ? call.table(dbias) : TensorView{},
                                                         extra_k ? call.extra_view(dextra) : TensorView{}});
    return {dq, dk, dbias, dextra};
  });
}

Tensor na_av(Tensor attn, Tensor v, OptionalTensor extra_v, Ints window, Ints stride, Ints dilation,
             std::vector<bool> causal, bool oversize, std::string plan) {
  return with_prefixed_errors([&] {
    const Call call({window, stride, dilation, causal, 1.0, oversize, plan}, "attn", attn, "value", v, extra_v, {});
    check_attn("attn", attn, v, call);
    attn = with_unit_last_stride(attn), v = with_unit_last_stride(v), extra_v = unit(extra_v);
    Tensor out = empty(v, call.with(call.p.head_dim_v));
    call.run(natten::av, natten::AvArgs{call.view(attn), call.view(v), call.extra_view(extra_v), call.view(out)});
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> na_av_bwd(Tensor dout, Tensor attn, Tensor v, OptionalTensor extra_v, Ints window,
                                             Ints stride, Ints dilation, std::vector<bool> causal, bool oversize,
                                             std::string plan) {
  return with_prefixed_errors([&]() -> std::tuple<Tensor, Tensor, Tensor> {
    const Call call({window, stride, dilation, causal, 1.0, oversize, plan}, "dout", dout, "value", v, extra_v, {});
    check_shape("dout", dout, call.with(call.p.head_dim_v));
    check_attn("attn", attn, v, call);
    dout = with_unit_last_stride(dout), attn = with_unit_last_stride(attn), v = with_unit_last_stride(v);
    extra_v = unit(extra_v);
    Tensor dattn = empty_like(attn, v), dv = empty_like(v, v), dextra = empty_like(extra_v, v);
    call.run(natten::av_backward,
             natten::AvBackwardArgs{call.view(dout), call.view(attn), call.view(v), call.extra_view(extra_v),
                                    call.view(dattn), call.view(dv), extra_v ? call.extra_view(dextra) : TensorView{}});
    return {dattn, dv, dextra};
  });
}

}  // namespace

#define NATTEN_UNFUSED_KERNELS(m)               \
  do {                                          \
    m.impl("na_qk", TORCH_BOX(&na_qk));         \
    m.impl("na_qk_bwd", TORCH_BOX(&na_qk_bwd)); \
    m.impl("na_av", TORCH_BOX(&na_av));         \
    m.impl("na_av_bwd", TORCH_BOX(&na_av_bwd)); \
  } while (0)
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CPU, m) { NATTEN_UNFUSED_KERNELS(m); }
NATTEN_LIBRARY_IMPL(NATTEN_OP_NAMESPACE, CUDA, m) { NATTEN_UNFUSED_KERNELS(m); }
