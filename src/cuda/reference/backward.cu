// SPDX-License-Identifier: MIT
// Backward, without atomics: every gradient is summed by the one warp or block that owns it, over the exact inverse of
// the windows, so repetitions give the same bits.
//
//   delta     thread per query           rowsum(dO * O) - dlse, for the kernels below
//   dq        warp per query             over its keys
//   dk, dv    warp per key               over the queries that see it
//   the same  block per additional key   over all queries
//   dbias     block per entry            over all queries whose window holds the entry's key
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

// A key as the owner of two gradients: its rows, null where they are not wanted, and who sees it.
template <class T>
struct OwnedKey {
  int64_t batch;
  int head_kv;
  Int3 token;  // meaningless for an additional key
  bool extra;
  Key<T> rows;
  T *dk, *dv;
  Box queries;  // of each head that reads this key
};

// The gradients of a key, channels from `first` on, over every `num_warps`-th 32 of the queries that see it.
template <class T>
__device__ void sum_key(const Problem& p, const BackwardArgs& args, const double* deltas, const OwnedKey<T>& key,
                        int warp, int num_warps, int first, RowSum& dk, RowSum& dv) {
  const int64_t per_head = key.queries.volume(), count = per_head * p.heads_per_kv();
  for (int64_t begin = int64_t{warp} * kLanes; begin < count; begin += int64_t{num_warps} * kLanes) {
    const int64_t i = begin + lane();
    typename GradQuery<T>::Weights weights{};
    const T *q = nullptr, *dout = nullptr;
    if (i < count) {
      const int64_t in_group = i / per_head;
      const int head = key.head_kv * p.heads_per_kv() + int(in_group);
      const Int3 token = key.queries.at(i - in_group * per_head);
      const GradQuery<T> query(p, args, deltas, key.batch, head, token);
      weights = query.weights(key.extra ? key.rows : key_of<T>(p, args, key.batch, head, token, key.token));
      q = query.q, dout = query.dout;
    }
    for (int j = 0; j < kLanes && begin + j < count; ++j) {
      dk.add(__shfl_sync(kAllLanes, weights.ds, j), shuffle(q, j), first, p.head_dim);
      dv.add(__shfl_sync(kAllLanes, weights.p, j), shuffle(dout, j), first, p.head_dim_v);
    }
  }
}

template <class T>
__device__ void store_key(const Problem& p, const OwnedKey<T>& key, int first, const RowSum& dk, const RowSum& dv) {
  if (key.dk) dk.store(p.scale, key.dk, first, p.head_dim);
  if (key.dv) dv.store(1.0, key.dv, first, p.head_dim_v);
}

inline __device__ int widest(const Problem& p) { return p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v; }

template <class T>
__device__ T* row_or_null(const TensorView& t, int64_t at) {
  return t.ptr ? pointer<T>(t) + at : nullptr;
}

// --- kernels ----------------------------------------------------------------------------------------------------------
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
    dkv_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, const double* deltas) {
  const int64_t count = p.batch * p.tokens() * p.heads_kv;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const int64_t row = i / p.heads_kv, batch = row / p.tokens();
    const int head_kv = int(i - row * p.heads_kv);
    const Int3 token = whole_grid(p).at(row - batch * p.tokens());
    const OwnedKey<T> key{batch,
                          head_kv,
                          token,
                          false,
                          {},
                          row_or_null<T>(args.dk, offset(args.dk, batch, token, head_kv)),
                          row_or_null<T>(args.dv, offset(args.dv, batch, token, head_kv)),
                          query_box(p, token)};
    for (int first = 0; first < widest(p); first += kLanes * kChannels) {
      RowSum dk, dv;
      sum_key(p, args, deltas, key, 0, 1, first, dk, dv);
      store_key(p, key, first, dk, dv);
    }
  }
}

// Adds up the sums of all warps, in their order, in the first one.
__device__ void join_warps(RowSum& sum, double (*shared)[kChannels][kLanes]) {
  const int warp = threadIdx.x / kLanes;
  __syncthreads();
  for (int c = 0; c < kChannels; ++c) shared[warp][c][lane()] = sum.sum[c];
  __syncthreads();
  for (int w = 1; warp == 0 && w < kWarps; ++w)
    for (int c = 0; c < kChannels; ++c) sum.sum[c] += shared[w][c][lane()];
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dextra_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, const double* deltas) {
  __shared__ double shared[kWarps][kChannels][kLanes];
  const int64_t count = p.batch * p.extra_keys * p.heads_kv;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t row = i / p.heads_kv, batch = row / p.extra_keys, n = row - batch * p.extra_keys;
    const int head_kv = int(i - row * p.heads_kv);
    const OwnedKey<T> key{batch,
                          head_kv,
                          {},
                          true,
                          extra_key_of<T>(args, batch, head_kv, n),
                          row_or_null<T>(args.dextra_k, offset(args.dextra_k, batch, 0, 0, n, head_kv)),
                          row_or_null<T>(args.dextra_v, offset(args.dextra_v, batch, 0, 0, n, head_kv)),
                          whole_grid(p)};
    for (int first = 0; first < widest(p); first += kLanes * kChannels) {
      RowSum dk, dv;
      sum_key(p, args, deltas, key, threadIdx.x / kLanes, kWarps, first, dk, dv);
      join_warps(dk, shared);
      join_warps(dv, shared);
      if (threadIdx.x < kLanes) store_key(p, key, first, dk, dv);
    }
  }
}

// The token of the key that a query meets at an entry of the bias table, or -1 if its window does not hold it.
inline __device__ int key_at(const Axis& a, int query, int entry) {
  const AxisKeys axis = axis_keys(a, query);
  const int position = axis.position + entry - bias_index(a, 0, 0);
  return axis.keys.contains(position) ? axis.residue + a.dilation * position : -1;
}

template <class T>
__device__ double sum_bias(const Problem& p, const BackwardArgs& args, const double* deltas, int head, Int3 entry) {
  double sum = 0;
  const int64_t count = p.batch * p.tokens();
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t batch = i / p.tokens();
    const Int3 token = whole_grid(p).at(i - batch * p.tokens());
    const Int3 key{key_at(p.axes[0], token.z, entry.z), key_at(p.axes[1], token.y, entry.y),
                   key_at(p.axes[2], token.x, entry.x)};
    if (key.z < 0 || key.y < 0 || key.x < 0) continue;
    const GradQuery<T> query(p, args, deltas, batch, head, token);
    sum += query.weights(key_of<T>(p, args, batch, head, token, key)).ds;
  }
  return warp_reduce(sum, [](double a, double b) { return a + b; });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    dbias_kernel(const __grid_constant__ Problem p, const __grid_constant__ BackwardArgs args, const double* deltas) {
  __shared__ double of_warp[kWarps];
  const Box table{{0, 0, 0}, {1, 1, 1}, bias_table(p)};
  for (int64_t i = blockIdx.x; i < table.volume() * p.heads; i += gridDim.x) {
    const int head = int(i / table.volume());
    const Int3 entry = table.at(i - head * table.volume());
    const double sum = sum_bias<T>(p, args, deltas, head, entry);
    __syncthreads();
    if (lane() == 0) of_warp[threadIdx.x / kLanes] = sum;
    __syncthreads();
    if (threadIdx.x > 0) continue;
    double total = 0;
    for (double x : of_warp) total += x;
    from_real(total, pointer<T>(args.dbias)[offset(args.dbias, 0, entry, head)]);
  }
}

template <class T>
void launch(const Problem& p, const BackwardArgs& args, double* deltas, cudaStream_t stream) {
  const auto start = [&](auto kernel, int64_t items, int per_block) {
    if (items == 0) return;
    kernel<<<num_blocks(items, per_block), kThreads, 0, stream>>>(p, args, deltas);
    NATTEN_CUDA_CHECK(cudaGetLastError());
  };
  const int64_t rows = p.batch * p.tokens();
  start(delta_kernel<T>, rows * p.heads, kThreads);
  if (args.dq) start(dq_kernel<T>, rows * p.heads, kWarps);
  if (p.has_window() && (args.dk || args.dv)) start(dkv_kernel<T>, rows * p.heads_kv, kWarps);
  if (args.dextra_k || args.dextra_v) start(dextra_kernel<T>, p.batch * p.extra_keys * p.heads_kv, 1);
  if (p.has_bias && args.dbias) start(dbias_kernel<T>, bias_table(p).volume() * p.heads, 1);
}

}  // namespace

void backward(const Problem& p, const BackwardArgs& args, double* delta, void* stream) {
  dispatch(p.dtype,
           [&](auto element) { launch<decltype(element)>(p, args, delta, static_cast<cudaStream_t>(stream)); });
}

}  // namespace natten::cuda_reference
