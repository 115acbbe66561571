// SPDX-License-Identifier: MIT
// The products of unfused attention for any problem. Each is one of two inner loops over a list of rows, which are the
// keys of a query or the queries of a key: dot products, a vector of rows at a time, or a weighted sum.
#include "cpu/micro.h"
#include "cpu/runs.h"
#include "cpu/unfused.h"

namespace natten::cpu::NATTEN_ISA {
namespace {

// --- inner loops -----------------------------------------------------------------------------------------------------

/// Lane l of the result is the sum of all lanes of v[l]: half as many vectors in each step.
template <class Real, int kBit = kLanes<Real> / 2>
NATTEN_INLINE Vec<Real> sum_each(Vec<Real> (&v)[kLanes<Real>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kBit; ++i) {
    swap_lanes<Real, kBit>(v[i], v[i + kBit]);
    v[i] += v[i + kBit];
  }
  if constexpr (kBit > 1)
    return sum_each<Real, kBit / 2>(v);
  else
    return v[0];
}

/// <q, rows[l]> in lane l; q is padded with zeros to whole vectors.
template <class Real, class T>
NATTEN_INLINE Vec<Real> dots(const Real* q, const T* const* rows, int dim) {
  Vec<Real> acc[kLanes<Real>] = {};
  for_each_vector<Real>(dim, [&](int d, int lanes) {
    const Vec<Real> x = load<Vec<Real>>(q + d);
    if (lanes == kLanes<Real>) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes<Real>; ++l) acc[l] += load_elements<Real>(rows[l] + d) * x;
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes<Real>; ++l) acc[l] += load_first<Real>(rows[l] + d, lanes) * x;
    }
  });
  return sum_each<Real>(acc);
}

/// to[channel] += sum over i of weights[i] * rows[i][channel], for kVectors vectors of channels from `d` on.
template <int kVectors, class Real, class T>
NATTEN_INLINE void add_rows_block(const Real* weights, const T* const* rows, int count, int d, Real* to) {
  Vec<Real> acc[2][kVectors] = {};  // two chains, for an FMA takes four cycles
  int i = 0;
  for (; i + 2 <= count; i += 2)
#pragma GCC unroll 2
    for (int chain = 0; chain < 2; ++chain)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        acc[chain][v] += load_elements<Real>(rows[i + chain] + d + v * kLanes<Real>) * weights[i + chain];
  if (i < count)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[0][v] += load_elements<Real>(rows[i] + d + v * kLanes<Real>) * weights[i];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    Real* at = to + d + v * kLanes<Real>;
    store(at, load<Vec<Real>>(at) + (acc[0][v] + acc[1][v]));
  }
}

template <class Real, class T>
NATTEN_INLINE void add_rows(const Real* weights, const T* const* rows, int count, int dim, Real* to) {
  for_each_vector_block(dim / kLanes<Real>, [&](int vector, auto vectors) {
    add_rows_block<vectors>(weights, rows, count, vector * kLanes<Real>, to);
  });
  const int d = dim / kLanes<Real> * kLanes<Real>;
  if (d == dim) return;
  Vec<Real> acc = load<Vec<Real>>(to + d);
  for (int i = 0; i < count; ++i) acc += load_first<Real>(rows[i] + d, dim - d) * weights[i];
  store(to + d, acc);
}

// --- one thread's memory ---------------------------------------------------------------------------------------------

/// Rows with their weights, and their sum; a full list is added to the sum.
template <class T, class Real>
struct RowList {
  static constexpr int kCapacity = 256;
  int dim, count = 0;
  const T** rows;
  Real *weights, *sum;

  RowList(int dim, Arena& arena) : dim(dim) {
    rows = arena.take<const T*>(kCapacity);
    weights = arena.take<Real>(kCapacity);
    sum = arena.take<Real>(whole_vectors<Real>(dim));
  }
  NATTEN_INLINE void push(Real weight, const T* row) {
    if (count == kCapacity) flush();
    rows[count] = row;
    weights[count++] = weight;
  }
  void flush() {
    add_rows(weights, rows, count, dim, sum);
    count = 0;
  }
  /// Writes the sum, and begins a new one.
  void finish(Real scale, T* to) {
    flush();
    for_each_vector<Real>(
        dim, [&](int d, int lanes) { store_up_to<Real>(to + d, load<Vec<Real>>(sum + d) * scale, lanes); });
    clear(sum, whole_vectors<Real>(dim));
  }
};

template <class T, class Real>
struct Scratch {
  const T** rows;  // [capacity]
  Real* logits;    // [capacity]
  Real* query;
  Real* bias;
  int* first_key;  // [x extent]: where the window of a query begins along x
  RowList<T, Real> list;

  static int64_t capacity(const Problem& p) { return most_slots(p) + kLanes<Real>; }
  static Scratch make(const Problem& p, int dim, Arena& arena) {
    return {arena.take<const T*>(capacity(p)),          arena.take<Real>(capacity(p)),
            arena.take<Real>(whole_vectors<Real>(dim)), arena.take<Real>(bias_entries(p)),
            arena.take<int>(p.axes[2].extent),          RowList<T, Real>(dim, arena)};
  }
};

// --- one query or one key --------------------------------------------------------------------------------------------

template <class T, class Real>
struct Head {
  const Problem& p;
  const Product& t;
  Scratch<T, Real>& s;
  int64_t batch;
  int head;

  int head_kv() const { return head / p.heads_per_kv(); }
  T* row(const TensorView& view, Int3 token, int of_head) const {
    return pointer<T>(view) + offset(view, batch, token, of_head);
  }
  const T* extra(int n) const { return row(t.extra, {0, 0, n}, head_kv()); }
  int64_t key_step() const { return t.keys.strides[3] * p.axes[2].dilation; }
  int64_t window_slots() const { return num_slots(p) - p.extra_keys; }

  void scores(Int3 token) const;
  void weigh_keys(Int3 token) const;
  void push_queries(Int3 key) const;
  void push_queries_of_extra(int n) const;
};

template <class T, class Real>
void Head<T, Real>::scores(Int3 token) const {
  int64_t n = 0;
  for_each_key_run(p, token, [&](const Run& run) {
    const T* key = row(t.keys, run.token, head_kv());
    for (int i = 0; i < run.count; ++i, key += key_step()) s.rows[n++] = key;
  });
  for (int i = 0; i < p.extra_keys; ++i) s.rows[n++] = extra(i);
  for (int i = 1; i < kLanes<Real>; ++i) s.rows[n + i - 1] = n > 0 ? s.rows[n - 1] : nullptr;
  pack_token(row(t.queries, token, head), t.dim, s.query);
  for (int d = 0; d < t.dim; ++d) s.query[d] *= Real(t.scale);
  for (int64_t i = 0; i < n; i += kLanes<Real>) store(s.logits + i, dots(s.query, s.rows + i, t.dim));

  T* to = row(t.weights, token, head);
  const int64_t slots = num_slots(p);
  if (n < slots)
    for (int64_t i = 0; i < slots; ++i) from_real(Real(t.unused), to[i]);
  Real* logit = s.logits;
  for_each_key_run(p, token, [&](const Run& run) {
    if (t.bias)
      for (int i = 0; i < run.count; ++i) logit[i] += s.bias[run.bias_entry + i];
    if (n < slots)
      for (int i = 0; i < run.count; ++i) from_real(logit[i], to[run.slot + i]);
    logit += run.count;
  });
  if (n < slots)
    for (int i = 0; i < p.extra_keys; ++i) from_real(logit[i], to[window_slots() + i]);
  else
    for (int64_t i = 0; i < n; i += kLanes<Real>)
      store_up_to<Real>(to + i, load<Vec<Real>>(s.logits + i), n - i < kLanes<Real> ? int(n - i) : kLanes<Real>);
}

template <class T, class Real>
void Head<T, Real>::weigh_keys(Int3 token) const {
  const T* weights = row(t.weights, token, head);
  for_each_key_run(p, token, [&](const Run& run) {
    const T* key = row(t.keys, run.token, head_kv());
    for (int i = 0; i < run.count; ++i, key += key_step()) s.list.push(Real(to_real(weights[run.slot + i])), key);
  });
  for (int i = 0; i < p.extra_keys; ++i) s.list.push(Real(to_real(weights[window_slots() + i])), extra(i));
  s.list.finish(Real(t.scale), row(t.queries, token, head));
}

/// All queries that see a key of the grid, with what they weigh it by.
template <class T, class Real>
void Head<T, Real>::push_queries(Int3 key) const {
  const Axis& x = p.axes[2];
  const int position = key.x / x.dilation;
  for_each_run(p, key, queries_of, true, [&](const Run& run) {
    const T *query = row(t.queries, run.token, head), *weights = row(t.weights, run.token, head) + run.slot + position;
    const int64_t query_step = t.queries.strides[3] * x.dilation, weight_step = t.weights.strides[3] * x.dilation;
    const int* first_key = s.first_key + run.token.x;
    for (int i = 0; i < run.count; ++i, query += query_step, weights += weight_step)
      s.list.push(Real(to_real(weights[-first_key[int64_t{i} * x.dilation]])), query);
  });
}

template <class T, class Real>
void Head<T, Real>::push_queries_of_extra(int n) const {
  for (int64_t i = 0; i < p.tokens(); ++i) {
    const Int3 token = token_at(p.grid(), i);
    s.list.push(Real(to_real(row(t.weights, token, head)[window_slots() + n])), row(t.queries, token, head));
  }
}

// --- products --------------------------------------------------------------------------------------------------------

/// Calls work(T{}, task, memory of its thread) for `count` tasks.
template <class Work>
void for_each_task(const Problem& p, const Product& t, int64_t count, const Executor& executor, char* workspace,
                   Work&& work) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    using S = Scratch<T, RealOf<T>>;
    Arena counter(nullptr);
    S::make(p, t.dim, counter);
    run_on_threads(executor, count, workspace, counter.used(), [&](int64_t task, char* memory) {
      Arena arena(memory);
      S s = S::make(p, t.dim, arena);
      clear(s.list.sum, whole_vectors<RealOf<T>>(t.dim));
      work(s, task);
    });
  });
}

template <class T, class Real>
void weigh_queries_of_keys(const Problem& p, const Product& t, Scratch<T, Real>& s, int64_t batch, int head_kv,
                           int64_t chunk) {
  for (int x = 0; x < p.axes[2].extent; ++x) {
    const Place place = place_of(p.axes[2], x);
    s.first_key[x] = key_span(place.group, place.position).begin;
  }
  const int64_t on_grid = p.has_window() ? p.tokens() : 0, all = on_grid + p.extra_keys;
  for (int64_t i = all * chunk / kChunks; i < all * (chunk + 1) / kChunks; ++i) {
    const bool extra = i >= on_grid;
    if (!(extra ? t.extra : t.keys)) continue;
    for (int h = 0; h < p.heads_per_kv(); ++h) {
      const Head<T, Real> head{p, t, s, batch, head_kv * p.heads_per_kv() + h};
      if (extra)
        head.push_queries_of_extra(int(i - on_grid));
      else
        head.push_queries(token_at(p.grid(), i));
    }
    const Head<T, Real> head{p, t, s, batch, head_kv * p.heads_per_kv()};
    s.list.finish(Real(t.scale), extra ? head.row(t.extra, {0, 0, int(i - on_grid)}, head_kv)
                                       : head.row(t.keys, token_at(p.grid(), i), head_kv));
  }
}

}  // namespace

size_t unfused_loops_workspace(const Problem& p, int num_threads) {
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    Arena arena(nullptr), shared(nullptr);
    Scratch<T, RealOf<T>>::make(p, p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v, arena);
    shared.take<RealOf<T>>(int64_t{p.heads} * kChunks * bias_entries(p));
    return size_t(times(arena.used(), num_threads) + shared.used());
  });
}

void unfused_loops_scores(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  for_each_task(p, t, int64_t{p.heads} * kChunks, executor, static_cast<char*>(workspace),
                [&]<class T, class Real>(Scratch<T, Real>& s, int64_t task) {
                  const int head = int(task / kChunks);
                  if (t.bias) pack_bias<T>(p, t.bias, head, Real(1), s.bias);
                  for_each_query(p, task % kChunks,
                                 [&](int64_t batch, Int3 token) { Head<T, Real>{p, t, s, batch, head}.scores(token); });
                });
}

void unfused_loops_weigh_keys(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  for_each_task(p, t, int64_t{p.heads} * kChunks, executor, static_cast<char*>(workspace),
                [&]<class T, class Real>(Scratch<T, Real>& s, int64_t task) {
                  for_each_query(p, task % kChunks, [&](int64_t batch, Int3 token) {
                    Head<T, Real>{p, t, s, batch, int(task / kChunks)}.weigh_keys(token);
                  });
                });
}

void unfused_loops_weigh_queries(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  for_each_task(p, t, p.batch * p.heads_kv * kChunks, executor, static_cast<char*>(workspace),
                [&]<class T, class Real>(Scratch<T, Real>& s, int64_t task) {
                  const int64_t plane = task / kChunks;
                  weigh_queries_of_keys(p, t, s, plane / p.heads_kv, int(plane % p.heads_kv), task % kChunks);
                });
}

void unfused_loops_sum_bias(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    using Real = RealOf<T>;
    Real* partial = static_cast<Real*>(workspace);
    const int64_t entries = bias_entries(p);
    executor.run(int64_t{p.heads} * kChunks, [&](int64_t task) {
      Real* sums = partial + task * entries;
      clear(sums, entries);
      for_each_query(p, task % kChunks, [&](int64_t batch, Int3 token) {
        const T* weights = pointer<T>(t.weights) + offset(t.weights, batch, token, task / kChunks);
        for_each_key_run(p, token, [&](const Run& run) {
          for (int i = 0; i < run.count; ++i) sums[run.bias_entry + i] += Real(to_real(weights[run.slot + i]));
        });
      });
    });
    reduce_bias<T>(p, partial, kChunks, executor, t.bias);
  });
}

}  // namespace natten::cpu::NATTEN_ISA
