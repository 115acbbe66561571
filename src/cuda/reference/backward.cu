// SPDX-License-Identifier: MIT
// Backward, without atomics or shared memory: every gradient is summed by the one warp that owns it, over the exact
// inverse of the windows, so repetitions give the same bits.
//
//   delta     thread per query     rowsum(dO * O) - dlse, for the kernels below
//   dq        warp per query       over its keys
//   dk, dv    warp per key         over the queries that see it; those of an additional key are all
//   dbias     warp per entry       over the queries whose window holds the entry's key
#include "cuda/launch.h"
#include "cuda/reference/kernels.h"
#include "cuda/reference/pairs.cuh"

namespace natten::cuda_reference {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;

// A query with what the backward pass knows of it.
template <class T>
struct GradQuery : Query<T> {
  const T* dout;
  double lse, delta;

  struct Weights {
    double p, ds;
  };

  __device__ GradQuery(const Problem& p, const BackwardArgs& args, const double* deltas, int64_t batch, int head,
                       Int3 token)
      : Query<T>(p, args, batch, head, token) {
    dout = this->template row<T>(args.dout);
    lse = load_sum(p, args.lse, batch, token, head);
    delta = deltas[(batch * p.tokens() + token_index(p.grid(), token)) * p.heads + head];
  }
  __device__ Weights weights(const Key<T>& key) const {
    const double weight = probability(this->logit(key), lse);
    return {weight, weight * (dot(dout, key.v, this->p.head_dim_v) - delta)};
  }
};

template <class T>
__device__ void dq_of(const GradQuery<T>& query, T* dq) {
  const Problem& p = query.p;
  const Keys<T> keys(query);
  for (int first = 0; first < p.head_dim; first += kLanes * kChannels) {
    RowSum sum;
    for (int64_t begin = 0; begin < keys.size(); begin += kLanes) {
      const int64_t i = begin + lane();
      const Key<T> key = i < keys.size() ? keys[i] : Key<T>{};
      const double ds = i < keys.size() ? query.weights(key).ds : 0;
      for (int j = 0; j < kLanes && begin + j < keys.size(); ++j)
        sum.add(__shfl_sync(kAllLanes, ds, j), shuffle(key.k, j), first, p.head_dim);
    }
    sum.store(p.scale, dq, first, p.head_dim);
  }
}

// A key as the owner of two gradients: its own rows if it is an additional one, and who sees it.
template <class T>
struct OwnedKey {
  int64_t batch;
  int head_kv;
  Int3 token;  // of a key of the grid
  Key<T> extra;
  T *dk, *dv;   // null where not wanted
  Box queries;  // of each head that reads this key

  // Keys of the grid come first, then additional ones; heads run fastest.
  __device__ static OwnedKey number(const Problem& p, const BackwardArgs& args, int64_t i) {
    const int64_t on_grid = p.has_window() ? p.batch * p.tokens() : 0;
    const int64_t row = i / p.heads_kv, extra = row - on_grid;
    OwnedKey key{};
    key.head_kv = int(i - row * p.heads_kv);
    if (extra < 0) {
      key.batch = row / p.tokens();
      key.token = whole_grid(p).at(row - key.batch * p.tokens());
      key.queries = query_box(p, key.token);
      key.dk = row_or_null(args.dk, offset(args.dk, key.batch, key.token, key.head_kv));
      key.dv = row_or_null(args.dv, offset(args.dv, key.batch, key.token, key.head_kv));
    } else {
      key.batch = extra / p.extra_keys;
      const int64_t n = extra - key.batch * p.extra_keys;
      key.extra = extra_key_of<T>(args, key.batch, key.head_kv, n);
      key.queries = whole_grid(p);
      key.dk = row_or_null(args.dextra_k, offset(args.dextra_k, key.batch, 0, 0, n, key.head_kv));
      key.dv = row_or_null(args.dextra_v, offset(args.dextra_v, key.batch, 0, 0, n, key.head_kv));
    }
    return key;
  }
  __device__ static T* row_or_null(const TensorView& t, int64_t at) { return t.ptr ? pointer<T>(t) + at : nullptr; }
};

// The gradients of a key, channels from `first` on.
template <class T>
__device__ void sum_key(const Problem& p, const BackwardArgs& args, const double* deltas, const OwnedKey<T>& key,
                        int first, RowSum& dk, RowSum& dv) {
  const int64_t per_head = key.queries.volume(), count = per_head * p.heads_per_kv();
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t i = begin + lane();
    typename GradQuery<T>::Weights weights{};
    const T *q = nullptr, *dout = nullptr;
    if (i < count) {
      const int64_t in_group = i / per_head;
      const int head = key.head_kv * p.heads_per_kv() + int(in_group);
      const GradQuery<T> query(p, args, deltas, key.batch, head, key.queries.at(i - in_group * per_head));
      weights = query.weights(key.extra.k ? key.extra : key_of<T>(p, args, key.batch, head, query.token, key.token));
      q = query.q, dout = query.dout;
    }
    for (int j = 0; j < kLanes && begin + j < count; ++j) {
      dk.add(__shfl_sync(kAllLanes, weights.ds, j), shuffle(q, j), first, p.head_dim);
      dv.add(__shfl_sync(kAllLanes, weights.p, j), shuffle(dout, j), first, p.head_dim_v);
    }
  }
}

template <class T>
__device__ double sum_bias(const Problem& p, const BackwardArgs& args, const double* deltas, int head, Int3 entry) {
  double sum = 0;
  const int64_t count = p.batch * p.tokens();
  for (int64_t i = lane(); i < count; i += kLanes) {
    const int64_t batch = i / p.tokens();
    const Int3 token = whole_grid(p).at(i - batch * p.tokens());
    const Int3 key = key_at(p, token, entry);
    if (key.z < 0) continue;
    const GradQuery<T> query(p, args, deltas, batch, head, token);
    sum += query.weights(key_of<T>(p, args, batch, head, token, key)).ds;
  }
  return warp_reduce(sum, [](double a, double b) { return a + b; });
}

// --- kernels ---
template <class T>
__global__ void __launch_bounds__(kThreads)
    delta_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, double* deltas) {
  const int64_t count = p.batch * p.tokens() * p.heads;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const auto query = Query<T>::number(p, args, i);
    const double dlse = args.dlse.ptr ? load_sum(p, args.dlse, query.batch, query.token, query.head) : 0;
    const T *dout = query.template row<T>(args.dout), *out = query.template row<T>(args.out);
    deltas[i] = dot(dout, out, p.head_dim_v) - dlse;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dq_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, const double* deltas) {
  const int64_t count = p.batch * p.tokens() * p.heads;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const auto at = Query<T>::number(p, args, i);
    dq_of(GradQuery<T>(p, args, deltas, at.batch, at.head, at.token), at.template row<T>(args.dq));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dkv_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, const double* deltas,
               int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const auto key = OwnedKey<T>::number(p, args, i);
    if (!key.dk && !key.dv) continue;
    for (int first = 0; first < p.head_dim || first < p.head_dim_v; first += kLanes * kChannels) {
      RowSum dk, dv;
      sum_key(p, args, deltas, key, first, dk, dv);
      if (key.dk) dk.store(p.scale, key.dk, first, p.head_dim);
      if (key.dv) dv.store(1.0, key.dv, first, p.head_dim_v);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dbias_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, const double* deltas) {
  const Box table{{0, 0, 0}, {1, 1, 1}, bias_table(p)};
  const int64_t count = table.volume() * p.heads;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const int head = int(i / table.volume());
    const Int3 entry = table.at(i - head * table.volume());
    const double sum = sum_bias<T>(p, args, deltas, head, entry);
    if (lane() == 0) from_real(sum, pointer<T>(args.dbias)[offset(args.dbias, 0, entry, head)]);
  }
}

template <class T>
void launch_all(const Problem& p, const BackwardArgs& args, double* deltas, void* stream) {
  const auto start = [&](auto kernel, int64_t items, int per_block, auto... more) {
    if (items > 0) cuda::launch(kernel, num_blocks(items, per_block), kThreads, 0, stream, p, args, deltas, more...);
  };
  const int64_t tokens = p.batch * p.tokens(), queries = tokens * p.heads;
  const int64_t keys = ((p.has_window() ? tokens : 0) + p.batch * p.extra_keys) * p.heads_kv;
  start(delta_kernel<T>, queries, kThreads);
  if (args.dq) start(dq_kernel<T>, queries, kWarps);
  start(dkv_kernel<T>, keys, kWarps, keys);
  if (p.has_bias && args.dbias) start(dbias_kernel<T>, bias_table(p).volume() * p.heads, kWarps);
}

}  // namespace

void backward(const Problem& p, const BackwardArgs& args, double* delta, void* stream) {
  dispatch(p.dtype, [&](auto element) { launch_all<decltype(element)>(p, args, delta, stream); });
}

}  // namespace natten::cuda_reference
