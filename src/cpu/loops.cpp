// SPDX-License-Identifier: MIT
// See loops.h. The forward pass and the gradient of q gather the keys of a query; the gradients of k and v gather the
// queries of a key (query_span) and compute their weights again, which needs no atomics and no second copy of anything.
#include "cpu/loops.h"

#include <cmath>

#include "cpu/runs.h"

namespace natten::cpu::NATTEN_ISA {
namespace {

// --- small vector loops over channels --------------------------------------------------------------------------------

// to[d] += sum over i of weights[i] * from[i][d]; rows of `from` are `step` apart.
template <class Real, class T>
NATTEN_INLINE void add_weighted(const Real* weights, int count, const T* from, int64_t step, int dim, Real* to) {
  for_each_vector<Real>(dim, [&](int d, int lanes) {
    Vec<Real> sum = load<Vec<Real>>(to + d);
    const T* row = from + d;
    for (int i = 0; i < count; ++i, row += step) sum += load_up_to<Real>(row, lanes) * weights[i];
    store(to + d, sum);
  });
}

// --- one thread's memory ---------------------------------------------------------------------------------------------

template <class T, class Real>
struct Scratch {
  int dim, dim_v;
  int64_t capacity;       // of the rows of weights
  Real *weights, *grads;  // P and dS of a query's keys, or of a row of a key's queries
  Real *a, *b;            // a token of q, k, v or dout as Real: [dim], [dim_v]
  Real *sum, *sum_v;      // [dim], [dim_v]
  Real* bias;

  Scratch(const Problem& p, Arena& arena) {
    dim = whole_vectors<Real>(p.head_dim);
    dim_v = whole_vectors<Real>(p.head_dim_v);
    const int64_t most = most_slots(p) > p.axes[2].extent ? most_slots(p) : p.axes[2].extent;
    capacity = (most + kLanes<Real>) / kLanes<Real> * kLanes<Real>;
    weights = arena.take<Real>(capacity);
    grads = arena.take<Real>(capacity);
    a = arena.take<Real>(dim), b = arena.take<Real>(dim_v);
    sum = arena.take<Real>(dim), sum_v = arena.take<Real>(dim_v);
    bias = arena.take<Real>(bias_entries(p));
  }
};

// One head of one sample.
template <class T, class Real>
struct Head {
  const Problem& p;
  const BackwardArgs& args;  // of which the forward pass fills the forward part
  Scratch<T, Real>& s;
  int64_t batch;
  int head;

  int head_kv() const { return head / p.heads_per_kv(); }
  const T* row(const TensorView& t, Int3 token, int of_head) const {
    return pointer<T>(t) + offset(t, batch, token, of_head);
  }
  Real& sum_at(const TensorView& t, Int3 token) const { return pointer<Real>(t)[offset(t, batch, token, head)]; }
  const T* extra(const TensorView& t) const { return pointer<T>(t) + offset(t, batch, 0, 0, 0, head_kv()); }

  void query_forward(Int3 token) const;
  Real query_backward(Int3 token, Real* dbias) const;

 private:
  int64_t logits(Int3 token) const;
  void weigh_keys(const Real* weights, Int3 token, const TensorView& from, const TensorView& extra_from, int dim,
                  Real* to) const;
};

// Logits of `token`, in base 2, into s.weights; returns their number. Behind them stands -infinity up to a whole
// vector.
template <class T, class Real>
int64_t Head<T, Real>::logits(Int3 token) const {
  pack_token(row(args.q, token, head), p.head_dim, s.a);
  const Real factor = Real(p.scale * kLog2E);
  for (int d = 0; d < p.head_dim; ++d) s.a[d] *= factor;
  int64_t n = 0;
  for_each_key_run(p, token, [&](const Run& run) {
    const T* k = row(args.k, run.token, head_kv());
    for (int i = 0; i < run.count; ++i, k += args.k.strides[3] * p.axes[2].dilation)
      s.weights[n++] = dot(s.a, k, p.head_dim) + (p.has_bias ? s.bias[run.bias_entry + i] : 0);
  });
  for (int i = 0; i < p.extra_keys; ++i)
    s.weights[n++] = dot(s.a, extra(args.extra_k) + i * args.extra_k.strides[3], p.head_dim);
  for (int64_t i = n; i % kLanes<Real> != 0 || i == n; ++i) s.weights[i] = -INFINITY;
  return n;
}

// to[d] = sum over the keys of `token` of weight * key[d], the key being a row of k or v.
template <class T, class Real>
void Head<T, Real>::weigh_keys(const Real* weights, Int3 token, const TensorView& from, const TensorView& extra_from,
                               int dim, Real* to) const {
  clear(to, whole_vectors<Real>(dim));
  for_each_key_run(p, token, [&](const Run& run) {
    add_weighted(weights, run.count, row(from, run.token, head_kv()), from.strides[3] * p.axes[2].dilation, dim, to);
    weights += run.count;
  });
  if (p.extra_keys > 0) add_weighted(weights, p.extra_keys, extra(extra_from), extra_from.strides[3], dim, to);
}

template <class T, class Real>
void Head<T, Real>::query_forward(Int3 token) const {
  using V = Vec<Real>;
  const int64_t n = logits(token);
  V lane_max = broadcast<V>(Real(-INFINITY)), lane_sum = {};
  for (int64_t i = 0; i < n; i += kLanes<Real>) lane_max = max(load<V>(s.weights + i), lane_max);
  Real m = lane_max[0];
  for (int l = 1; l < kLanes<Real>; ++l) m = lane_max[l] > m ? lane_max[l] : m;
  if (m == Real(-INFINITY)) m = 0;
  for (int64_t i = 0; i < n; i += kLanes<Real>) {
    const V e = exp2<Real>(load<V>(s.weights + i) - m);
    store(s.weights + i, e);
    lane_sum += e;
  }
  const Real sum = sum_lanes(lane_sum);
  weigh_keys(s.weights, token, args.v, args.extra_v, p.head_dim_v, s.sum_v);
  T* out = const_cast<T*>(row(args.out, token, head));
  for_each_vector<Real>(p.head_dim_v, [&](int d, int lanes) {
    store_up_to<Real>(out + d, sum == 0 ? V{} : load<V>(s.sum_v + d) / sum, lanes);
  });
  sum_at(args.lse, token) = Real(m * Real(kLn2) + std::log(sum));
}

// Writes dq of `token`, adds to dbias, returns delta = <dout, out> - dlse.
template <class T, class Real>
Real Head<T, Real>::query_backward(Int3 token, Real* dbias) const {
  using V = Vec<Real>;
  pack_token(row(args.dout, token, head), p.head_dim_v, s.b);
  const Real delta = dot(s.b, row(args.out, token, head), p.head_dim_v) - (args.dlse ? sum_at(args.dlse, token) : 0);
  const int64_t n = logits(token);
  const Real lse = base2(sum_at(args.lse, token));
  for (int64_t i = 0; i < n; i += kLanes<Real>)
    store(s.weights + i, exp2<Real>(at_most_zero(load<V>(s.weights + i) - lse)));
  int64_t slot = 0;
  for_each_key_run(p, token, [&](const Run& run) {
    const T* v = row(args.v, run.token, head_kv());
    for (int i = 0; i < run.count; ++i, ++slot, v += args.v.strides[3] * p.axes[2].dilation) {
      s.grads[slot] = s.weights[slot] * (dot(s.b, v, p.head_dim_v) - delta);
      if (dbias) dbias[run.bias_entry + i] += s.grads[slot];
    }
  });
  for (int i = 0; i < p.extra_keys; ++i, ++slot)
    s.grads[slot] =
        s.weights[slot] * (dot(s.b, extra(args.extra_v) + i * args.extra_v.strides[3], p.head_dim_v) - delta);
  if (!args.dq) return delta;
  weigh_keys(s.grads, token, args.k, args.extra_k, p.head_dim, s.sum);
  T* dq = const_cast<T*>(row(args.dq, token, head));
  for_each_vector<Real>(
      p.head_dim, [&](int d, int lanes) { store_up_to<Real>(dq + d, load<V>(s.sum + d) * Real(p.scale), lanes); });
  return delta;
}

// --- gradients of one key and value ----------------------------------------------------------------------------------

// Sums over the queries that see a key: s.sum is dk, s.sum_v is dv; s.a and s.b hold the key, in base 2, and the value.
template <class T, class Real>
struct KeyGradient {
  const Head<T, Real>& h;
  const Real* delta;  // of the head: [token]

  // `has_bias`: the run's queries see a key of the grid.
  void add_queries(const Run& run, int dilation, bool has_bias) const {
    const Problem& p = h.p;
    auto& s = h.s;
    const int64_t q_step = h.args.q.strides[3] * dilation, dout_step = h.args.dout.strides[3] * dilation;
    const T *q = h.row(h.args.q, run.token, h.head), *dout = h.row(h.args.dout, run.token, h.head);
    const int64_t first = (int64_t{run.token.z} * p.axes[1].extent + run.token.y) * p.axes[2].extent + run.token.x;
    for (int i = 0; i < run.count; ++i) {
      const Int3 token{run.token.z, run.token.y, run.token.x + i * dilation};
      const Real bias = has_bias ? s.bias[run.bias_entry - i] : 0;
      s.weights[i] = dot(s.a, q + i * q_step, p.head_dim) + bias - base2(h.sum_at(h.args.lse, token));
    }
    for (int i = run.count; i % kLanes<Real> != 0; ++i) s.weights[i] = -INFINITY;
    for (int i = 0; i < run.count; i += kLanes<Real>)
      store(s.weights + i, exp2<Real>(at_most_zero(load<Vec<Real>>(s.weights + i))));
    for (int i = 0; i < run.count; ++i)
      s.grads[i] = s.weights[i] * (dot(s.b, dout + i * dout_step, p.head_dim_v) - delta[first + int64_t{i} * dilation]);
    add_weighted(s.weights, run.count, dout, dout_step, p.head_dim_v, s.sum_v);
    add_weighted(s.grads, run.count, q, q_step, p.head_dim, s.sum);
  }
};

// Gradients of all heads that share key `token` of the grid, or additional key `extra` if that is not negative.
template <class T, class Real>
void key_backward(const Problem& p, const BackwardArgs& args, Scratch<T, Real>& s, const Real* delta, int64_t batch,
                  int head_kv, Int3 token, int extra) {
  const bool in_grid = extra < 0;
  const TensorView &k = in_grid ? args.k : args.extra_k, &v = in_grid ? args.v : args.extra_v;
  const TensorView &dk = in_grid ? args.dk : args.dextra_k, &dv = in_grid ? args.dv : args.dextra_v;
  const Int3 at = in_grid ? token : Int3{0, 0, extra};
  pack_token(pointer<T>(k) + offset(k, batch, at, head_kv), p.head_dim, s.a);
  pack_token(pointer<T>(v) + offset(v, batch, at, head_kv), p.head_dim_v, s.b);
  for (int d = 0; d < p.head_dim; ++d) s.a[d] *= Real(p.scale * kLog2E);
  clear(s.sum, s.dim);
  clear(s.sum_v, s.dim_v);
  for (int i = 0; i < p.heads_per_kv(); ++i) {
    const Head<T, Real> head{p, args, s, batch, head_kv * p.heads_per_kv() + i};
    const KeyGradient<T, Real> gradient{head, delta + (batch * p.heads + head.head) * p.tokens()};
    if (in_grid && p.has_bias) pack_bias<T>(p, args.bias, head.head, Real(kLog2E), s.bias);
    if (in_grid)
      for_each_run(p, token, queries_of, true,
                   [&](const Run& run) { gradient.add_queries(run, p.axes[2].dilation, p.has_bias); });
    for (int z = 0; !in_grid && z < p.axes[0].extent; ++z)
      for (int y = 0; y < p.axes[1].extent; ++y) gradient.add_queries({{z, y, 0}, p.axes[2].extent, 0, 0}, 1, false);
  }
  auto write = [&](const TensorView& to, const Real* from, int dim, Real factor) {
    if (!to) return;
    T* row = pointer<T>(to) + offset(to, batch, at, head_kv);
    for_each_vector<Real>(
        dim, [&](int d, int lanes) { store_up_to<Real>(row + d, load<Vec<Real>>(from + d) * factor, lanes); });
  };
  write(dk, s.sum, p.head_dim, Real(p.scale));
  write(dv, s.sum_v, p.head_dim_v, Real(1));
}

// --- passes ----------------------------------------------------------------------------------------------------------

// What threads share in the backward pass: delta [batch][head][token], partial dbias [head][chunk][entry].
template <class Real>
struct Shared {
  Real *delta, *dbias;
  Shared(const Problem& p, Arena& arena) {
    delta = arena.take<Real>(p.batch * p.heads * p.tokens());
    dbias = arena.take<Real>(int64_t{p.heads} * kChunks * bias_entries(p));
  }
};

template <class T>
void forward_typed(const Problem& p, const BackwardArgs& args, const Executor& executor, char* workspace) {
  using Real = RealOf<T>;
  Arena counter(nullptr);
  Scratch<T, Real>(p, counter);
  run_on_threads(executor, int64_t{p.heads} * kChunks, workspace, counter.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Scratch<T, Real> s(p, arena);
    const int head = int(task / kChunks);
    if (p.has_bias) pack_bias<T>(p, args.bias, head, Real(kLog2E), s.bias);
    for_each_query(p, task % kChunks,
                   [&](int64_t batch, Int3 token) { Head<T, Real>{p, args, s, batch, head}.query_forward(token); });
  });
}

template <class T>
void backward_typed(const Problem& p, const BackwardArgs& args, const Executor& executor, char* workspace) {
  using Real = RealOf<T>;
  Arena shared_arena(workspace), counter(nullptr);
  const Shared<Real> shared(p, shared_arena);
  Scratch<T, Real>(p, counter);
  char* rest = workspace + shared_arena.used();
  const int64_t entries = bias_entries(p);
  run_on_threads(executor, int64_t{p.heads} * kChunks, rest, counter.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Scratch<T, Real> s(p, arena);
    const int head = int(task / kChunks);
    Real* dbias = p.has_bias ? shared.dbias + task * entries : nullptr;
    if (p.has_bias) pack_bias<T>(p, args.bias, head, Real(kLog2E), s.bias), clear(dbias, entries);
    for_each_query(p, task % kChunks, [&](int64_t batch, Int3 token) {
      const int64_t index = (int64_t{token.z} * p.axes[1].extent + token.y) * p.axes[2].extent + token.x;
      shared.delta[(batch * p.heads + head) * p.tokens() + index] =
          Head<T, Real>{p, args, s, batch, head}.query_backward(token, dbias);
    });
  });
  const int64_t grid_keys = p.has_window() ? p.tokens() : 0, keys = grid_keys + p.extra_keys;
  run_on_threads(executor, p.batch * p.heads_kv * keys, rest, counter.used(), [&](int64_t task, char* memory) {
    Arena arena(memory);
    Scratch<T, Real> s(p, arena);
    const int64_t key = task % keys, batch = task / keys / p.heads_kv;
    const int head_kv = int(task / keys % p.heads_kv);
    const Int3 token = key < grid_keys ? token_at(p.grid(), key) : Int3{};
    key_backward(p, args, s, shared.delta, batch, head_kv, token, key < grid_keys ? -1 : int(key - grid_keys));
  });
  if (p.has_bias && args.dbias) reduce_bias<T>(p, shared.dbias, kChunks, executor, args.dbias);
}

}  // namespace

size_t loops_workspace(const Problem& p, Pass pass, int num_threads) {
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    Arena arena(nullptr), shared(nullptr);
    Scratch<T, RealOf<T>>(p, arena);
    if (pass == Pass::backward) Shared<RealOf<T>>(p, shared);
    if (pass == Pass::forward && p.batch * p.tokens() == 0) return size_t{0};  // nothing runs
    return size_t(times(arena.used(), num_threads) + shared.used());
  });
}

void loops_forward(const Problem& p, const ForwardArgs& args, const Executor& executor, void* workspace) {
  BackwardArgs all;
  static_cast<ForwardArgs&>(all) = args;
  dispatch(p.dtype,
           [&](auto element) { forward_typed<decltype(element)>(p, all, executor, static_cast<char*>(workspace)); });
}

void loops_backward(const Problem& p, const BackwardArgs& args, const Executor& executor, void* workspace) {
  dispatch(p.dtype,
           [&](auto element) { backward_typed<decltype(element)>(p, args, executor, static_cast<char*>(workspace)); });
}

}  // namespace natten::cpu::NATTEN_ISA
