// SPDX-License-Identifier: MIT
// One query of one head and everything that it attends to, as the lanes of a warp see it, and what warps do together.
// A warp takes 32 pairs at a time: each lane weighs its own pair, then all lanes add the 32 rows, a channel per lane.
#pragma once
#include "core/pairs.h"
#include "cuda/reference/window.cuh"

namespace natten::cuda_reference {

constexpr int kLanes = 32;
constexpr int kChannels = 4;  // of a row that a lane sums at once
constexpr unsigned kAllLanes = 0xffffffff;

inline __device__ int lane() { return int(threadIdx.x % kLanes); }

/// NaN wins, so that a query that sees one has it in its lse.
inline __device__ double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }

template <class F>
__device__ double warp_reduce(double x, F&& f) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x = f(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

template <class T>
__device__ const T* shuffle(const T* pointer, int from) {
  return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), from));
}

/// Channels `first` + lane, + 32, ... of a sum of weighted rows.
struct RowSum {
  double sum[kChannels] = {};

  template <class T>
  __device__ void add(double weight, const T* row, int first, int dim) {
    for (int c = 0, d = first + lane(); c < kChannels; ++c, d += kLanes)
      if (d < dim) sum[c] += weight * double(to_real(row[d]));
  }
  template <class T>
  __device__ void store(double factor, T* row, int first, int dim) const {
    for (int c = 0, d = first + lane(); c < kChannels; ++c, d += kLanes)
      if (d < dim) from_real(factor * sum[c], row[d]);
  }
};

template <class T>
struct Key {
  const T *k = nullptr, *v = nullptr;
  double bias = 0;
};

/// A key of the grid, as a query sees it.
template <class T>
__device__ Key<T> key_of(const Problem& p, const ForwardArgs& args, int64_t batch, int head, Int3 query, Int3 key) {
  const int head_kv = head / p.heads_per_kv();
  Key<T> found{pointer<T>(args.k) + offset(args.k, batch, key, head_kv),
               pointer<T>(args.v) + offset(args.v, batch, key, head_kv)};
  if (p.has_bias)
    found.bias = double(to_real(pointer<T>(args.bias)[offset(args.bias, 0, bias_entry(p, query, key), head)]));
  return found;
}

template <class T>
__device__ Key<T> extra_key_of(const ForwardArgs& args, int64_t batch, int head_kv, int64_t n) {
  return {pointer<T>(args.extra_k) + offset(args.extra_k, batch, 0, 0, n, head_kv),
          pointer<T>(args.extra_v) + offset(args.extra_v, batch, 0, 0, n, head_kv)};
}

template <class T>
struct Query {
  const Problem& p;
  const ForwardArgs& args;
  int64_t batch;
  int head;
  Int3 token;
  const T* q;

  __device__ Query(const Problem& p, const ForwardArgs& args, int64_t batch, int head, Int3 token)
      : p(p), args(args), batch(batch), head(head), token(token) {
    q = pointer<T>(args.q) + offset(args.q, batch, token, head);
  }
  /// Query number i of the problem, heads running fastest.
  __device__ static Query number(const Problem& p, const ForwardArgs& args, int64_t i) {
    const int64_t row = i / p.heads, batch = row / p.tokens();
    return {p, args, batch, int(i - row * p.heads), whole_grid(p).at(row - batch * p.tokens())};
  }
  __device__ double logit(const Key<T>& key) const { return p.scale * dot(q, key.k, p.head_dim) + key.bias; }
  template <class U>
  __device__ U* row(const TensorView& t) const {
    return pointer<U>(t) + offset(t, batch, token, head);
  }
};

/// All keys of a query: those of its window, then the additional ones.
template <class T>
struct Keys {
  const Query<T>& query;
  Box window;

  __device__ explicit Keys(const Query<T>& query) : query(query), window(key_box(query.p, query.token)) {}
  __device__ int64_t size() const { return window.volume() + query.p.extra_keys; }
  __device__ Key<T> operator[](int64_t i) const {
    const int64_t extra = i - window.volume();
    if (extra >= 0) return extra_key_of<T>(query.args, query.batch, query.head / query.p.heads_per_kv(), extra);
    return key_of<T>(query.p, query.args, query.batch, query.head, query.token, window.at(i));
  }
};

}  // namespace natten::cuda_reference
