// SPDX-License-Identifier: MIT
// The oracle: plain loops over the definition, all sums in double. It runs every valid problem, and nothing in it is
// clever; every other engine is compared with it, and it is compared with a dense attention that shares none of its
// code. One task is one sample and one key/value head, so no two tasks write to the same place.
#include <algorithm>
#include <cmath>

#include "core/backend.h"
#include "core/pairs.h"
#include "reference/windows.h"

namespace natten::reference {
namespace {

constexpr double kInfinity = HUGE_VAL;

// One query of one head, and everything it attends to.
template <class T>
struct Query {
  const Problem& p;
  const ForwardArgs& args;
  int64_t batch;
  int head;
  Int3 token;

  int head_kv() const { return head / p.heads_per_kv(); }
  const T* q() const { return pointer<T>(args.q) + offset(args.q, batch, token, head); }

  // visit(logit, k, v, key token, bias index, -) for keys of the grid, visit(logit, k, v, null, -, n) for additional
  // ones.
  template <class Visit>
  void for_each(Visit visit) const {
    for_each_key(p, token, [&](Int3 key, Int3 rel, Int3) {
      const T* k = pointer<T>(args.k) + offset(args.k, batch, key, head_kv());
      const T* v = pointer<T>(args.v) + offset(args.v, batch, key, head_kv());
      const int64_t bias_offset = p.has_bias ? offset(args.bias, 0, rel, head) : 0;
      const double bias = p.has_bias ? double(to_real(pointer<T>(args.bias)[bias_offset])) : 0;
      visit(p.scale * dot(q(), k, p.head_dim) + bias, k, v, &key, rel, 0);
    });
    for (int n = 0; n < p.extra_keys; ++n) {
      const T* k = pointer<T>(args.extra_k) + offset(args.extra_k, batch, 0, 0, n, head_kv());
      const T* v = pointer<T>(args.extra_v) + offset(args.extra_v, batch, 0, 0, n, head_kv());
      visit(p.scale * dot(q(), k, p.head_dim), k, v, static_cast<const Int3*>(nullptr), Int3{}, n);
    }
  }
};

template <class T>
void forward_query(const Query<T>& query, double* sum_pv) {
  const Problem& p = query.p;
  double max = -kInfinity, sum = 0;
  query.for_each([&](double logit, auto...) { max = logit > max || logit != logit ? logit : max; });
  std::fill_n(sum_pv, p.head_dim_v, 0.0);
  query.for_each([&](double logit, const T*, const T* v, auto...) {
    const double e = logit == -kInfinity ? 0 : std::exp(logit - max);
    sum += e;
    for (int d = 0; d < p.head_dim_v; ++d) sum_pv[d] += e * double(to_real(v[d]));
  });
  T* out = pointer<T>(query.args.out) + offset(query.args.out, query.batch, query.token, query.head);
  for (int d = 0; d < p.head_dim_v; ++d) from_real(sum == 0 ? 0.0 : sum_pv[d] / sum, out[d]);
  const double lse = sum == 0 ? -kInfinity : max + std::log(sum);
  const int64_t lse_offset = offset(query.args.lse, query.batch, query.token, query.head);
  if (p.dtype == DType::f64)
    pointer<double>(query.args.lse)[lse_offset] = lse;
  else
    pointer<float>(query.args.lse)[lse_offset] = float(lse);
}

// Gradients of one key/value head of one sample, summed in double.
struct Sums {
  double *dk, *dv;              // [tokens][head_dim or head_dim_v]
  double *dextra_k, *dextra_v;  // [extra_keys][head_dim or head_dim_v]
  double* dbias;                // [heads_per_kv][bias entries]
  double* dq;                   // [head_dim], of one query at a time

  static int64_t bias_entries(const Problem& p) { return p.has_bias ? bias_table(p).volume() : 0; }
  static int64_t size(const Problem& p) {
    return (p.tokens() + p.extra_keys) * (p.head_dim + p.head_dim_v) + p.heads_per_kv() * bias_entries(p) + p.head_dim;
  }
  Sums(const Problem& p, double* memory) {
    dk = memory;
    dv = dk + p.tokens() * p.head_dim;
    dextra_k = dv + p.tokens() * p.head_dim_v;
    dextra_v = dextra_k + int64_t{p.extra_keys} * p.head_dim;
    dbias = dextra_v + int64_t{p.extra_keys} * p.head_dim_v;
    dq = dbias + p.heads_per_kv() * bias_entries(p);
  }
};

template <class T>
void backward_query(const Query<T>& query, const BackwardArgs& args, const Sums& sums) {
  const Problem& p = query.p;
  const double lse = load_sum(p, args.lse, query.batch, query.token, query.head);
  const double dlse = args.dlse ? load_sum(p, args.dlse, query.batch, query.token, query.head) : 0;
  const T* dout = pointer<T>(args.dout) + offset(args.dout, query.batch, query.token, query.head);
  const T* out = pointer<T>(args.out) + offset(args.out, query.batch, query.token, query.head);
  const double delta = dot(dout, out, p.head_dim_v) - dlse;
  const int64_t bias_base = (query.head % p.heads_per_kv()) * Sums::bias_entries(p);
  std::fill_n(sums.dq, p.head_dim, 0.0);
  query.for_each([&](double logit, const T* k, const T* v, const Int3* key, Int3 rel, int extra) {
    const double weight = probability(logit, lse);
    const double ds = weight * (dot(dout, v, p.head_dim_v) - delta);
    const int64_t row = key ? token_index(p.grid(), *key) : extra;
    double* dk = (key ? sums.dk : sums.dextra_k) + row * p.head_dim;
    double* dv = (key ? sums.dv : sums.dextra_v) + row * p.head_dim_v;
    for (int d = 0; d < p.head_dim; ++d) {
      sums.dq[d] += p.scale * ds * double(to_real(k[d]));
      dk[d] += p.scale * ds * double(to_real(query.q()[d]));
    }
    for (int d = 0; d < p.head_dim_v; ++d) dv[d] += weight * double(to_real(dout[d]));
    if (key && p.has_bias) sums.dbias[bias_base + token_index(bias_table(p), rel)] += ds;
  });
  if (!args.dq) return;
  T* dq = pointer<T>(args.dq) + offset(args.dq, query.batch, query.token, query.head);
  for (int d = 0; d < p.head_dim; ++d) from_real(sums.dq[d], dq[d]);
}

// Rounds rows of sums to the element type.
template <class T>
void store(const TensorView& to, int64_t batch, int head, Int3 grid, const double* sums, int dim) {
  if (!to) return;
  for_each_token(grid, [&](Int3 token) {
    T* row = pointer<T>(to) + offset(to, batch, token, head);
    for (int d = 0; d < dim; ++d) from_real(sums[token_index(grid, token) * dim + d], row[d]);
  });
}

template <class T>
void store_bias(const Problem& p, const TensorView& to, const double* workspace) {
  if (!to || !p.has_bias) return;
  const Int3 table = bias_table(p);
  for (int head = 0; head < p.heads; ++head)
    for_each_token(table, [&](Int3 rel) {
      const int64_t at = (head % p.heads_per_kv()) * Sums::bias_entries(p) + token_index(table, rel);
      double sum = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t task = b * p.heads_kv + head / p.heads_per_kv();
        sum += Sums(p, const_cast<double*>(workspace) + task * Sums::size(p)).dbias[at];
      }
      from_real(sum, pointer<T>(to)[offset(to, 0, rel, head)]);
    });
}

void list_plans(const Problem&, Pass, Wanted, PlanList& list) { list.plans.push_back({kBackend.name, "", {}}); }

size_t workspace_bytes(const Problem& p, Pass pass, const Plan&, int) {
  const int64_t tasks = p.batch * p.heads_kv;
  return sizeof(double) * tasks * (pass == Pass::forward ? p.head_dim_v : Sums::size(p));
}

void forward(const Problem& p, const ForwardArgs& args, const Plan&, const Executor& executor, void* workspace) {
  executor.run(p.batch * p.heads_kv, [&](int64_t task) {
    dispatch(p.dtype, [&](auto element) {
      using T = decltype(element);
      double* sum_pv = static_cast<double*>(workspace) + task * p.head_dim_v;
      for (int i = 0; i < p.heads_per_kv(); ++i)
        for_each_token(p.grid(), [&](Int3 token) {
          const int head = int(task % p.heads_kv) * p.heads_per_kv() + i;
          forward_query(Query<T>{p, args, task / p.heads_kv, head, token}, sum_pv);
        });
    });
  });
}

void backward(const Problem& p, const BackwardArgs& args, const Plan&, const Executor& executor, void* workspace) {
  double* memory = static_cast<double*>(workspace);
  executor.run(p.batch * p.heads_kv, [&](int64_t task) {
    dispatch(p.dtype, [&](auto element) {
      using T = decltype(element);
      const int64_t batch = task / p.heads_kv;
      const int head_kv = int(task % p.heads_kv);
      const Sums sums(p, memory + task * Sums::size(p));
      std::fill_n(sums.dk, Sums::size(p), 0.0);
      for (int i = 0; i < p.heads_per_kv(); ++i)
        for_each_token(p.grid(), [&](Int3 token) {
          backward_query(Query<T>{p, args, batch, head_kv * p.heads_per_kv() + i, token}, args, sums);
        });
      const Int3 grid = p.has_window() ? p.grid() : Int3{0, 0, 0}, extra{1, 1, p.extra_keys};
      store<T>(args.dk, batch, head_kv, grid, sums.dk, p.head_dim);
      store<T>(args.dv, batch, head_kv, grid, sums.dv, p.head_dim_v);
      store<T>(args.dextra_k, batch, head_kv, extra, sums.dextra_k, p.head_dim);
      store<T>(args.dextra_v, batch, head_kv, extra, sums.dextra_v, p.head_dim_v);
    });
  });
  dispatch(p.dtype, [&](auto element) { store_bias<decltype(element)>(p, args.dbias, memory); });
}

}  // namespace

const Backend kBackend{"reference", DeviceKind::cpu, list_plans, workspace_bytes, forward, backward, &kUnfused};

}  // namespace natten::reference
