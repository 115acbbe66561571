// SPDX-License-Identifier: MIT
// Unfused attention: its four products (core/backend.h), each result summed in double by the one warp that owns it.
//
//   scores         thread per slot     W = scale * X Y^T + bias
//   weigh_keys     warp per query      X = scale * W Y
//   weigh_queries  warp per key        Y = scale * W^T X
//   sum_bias       warp per entry      bias = sums of W over samples and queries
#include "cuda/launch.h"
#include "cuda/reference/kernels.h"
#include "cuda/reference/pairs.cuh"

namespace natten::cuda_reference {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kLanes;

// All slots of a window, in their order.
__device__ Box window_slots(const Problem& p) {
  return {{0, 0, 0}, {1, 1, 1}, {p.axes[0].window, p.axes[1].window, p.axes[2].window}};
}

// The slot of a key that a query sees, `keys` being the box of the latter's keys.
__device__ int64_t slot_of(const Problem& p, const Box& keys, Int3 key) {
  const Int3 at{(key.z - keys.first.z) / keys.step.z, (key.y - keys.first.y) / keys.step.y,
                (key.x - keys.first.x) / keys.step.x};
  return token_index(window_slots(p).size, at);
}

// A query or a key of the grid by its number; heads run fastest.
struct Place {
  int64_t batch;
  int head;
  Int3 token;

  Place() = default;
  __device__ Place(const Problem& p, int64_t i, int heads) {
    const int64_t row = i / heads;
    batch = row / p.tokens();
    head = int(i - row * heads);
    token = whole_grid(p).at(row - batch * p.tokens());
  }
};

template <class T>
__device__ T* row_of(const TensorView& t, int64_t batch, Int3 token, int head) {
  return pointer<T>(t) + offset(t, batch, token, head);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scores_kernel(const __grid_constant__ Problem p, const __grid_constant__ Product t) {
  const int64_t slots = num_slots(p), in_window = slots - p.extra_keys, count = p.batch * p.tokens() * p.heads * slots;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const Place at(p, i / slots, p.heads);
    const int64_t slot = i % slots;
    const int head_kv = at.head / p.heads_per_kv();
    const T *x = row_of<T>(t.queries, at.batch, at.token, at.head), *y = nullptr;
    double bias = 0;
    if (slot >= in_window) {
      y = row_of<T>(t.extra, at.batch, {0, 0, int(slot - in_window)}, head_kv);
    } else {
      const Box keys = key_box(p, at.token);
      const Int3 n = window_slots(p).at(slot);
      const Int3 key{keys.first.z + keys.step.z * n.z, keys.first.y + keys.step.y * n.y,
                     keys.first.x + keys.step.x * n.x};
      if (n.z < keys.size.z && n.y < keys.size.y && n.x < keys.size.x) y = row_of<T>(t.keys, at.batch, key, head_kv);
      if (y && t.bias.ptr)
        bias = double(to_real(pointer<T>(t.bias)[offset(t.bias, 0, bias_entry(p, at.token, key), at.head)]));
    }
    from_real(y ? t.scale * dot(x, y, t.dim) + bias : t.unused,
              row_of<T>(t.weights, at.batch, at.token, at.head)[slot]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh_keys_kernel(const __grid_constant__ Problem p, const __grid_constant__ Product t, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const Place at(p, i, p.heads);
    const Box keys = key_box(p, at.token);
    const int64_t in_window = num_slots(p) - p.extra_keys, on_grid = keys.volume(), all = on_grid + p.extra_keys;
    const int head_kv = at.head / p.heads_per_kv();
    const T* weights = row_of<T>(t.weights, at.batch, at.token, at.head);
    for (int first = 0; first < t.dim; first += kLanes * kChannels) {
      RowSum sum;
      for (int64_t begin = 0; begin < all; begin += kLanes) {
        const int64_t n = begin + lane(), extra = n - on_grid;
        const bool exists = n < all, is_extra = extra >= 0;
        const Int3 key = !exists ? Int3{0, 0, 0} : is_extra ? Int3{0, 0, int(extra)} : keys.at(n);
        const int64_t slot = is_extra ? in_window + extra : slot_of(p, keys, key);
        const double weight = exists ? double(to_real(weights[slot])) : 0;
        const T* y = exists ? row_of<T>(is_extra ? t.extra : t.keys, at.batch, key, head_kv) : nullptr;
        for (int j = 0; j < kLanes && begin + j < all; ++j)
          sum.add(__shfl_sync(kAllLanes, weight, j), shuffle(y, j), first, t.dim);
      }
      sum.store(t.scale, row_of<T>(t.queries, at.batch, at.token, at.head), first, t.dim);
    }
  }
}

// Sums over the queries of every head that reads a key; `extra` is the number of an additional key, or -1.
template <class T>
__device__ void weigh_queries_of(const Problem& p, const Product& t, const Place& key, const Box& queries, int extra,
                                 int first, RowSum& sum) {
  const int64_t in_window = num_slots(p) - p.extra_keys, per_head = queries.volume();
  const int64_t count = per_head * p.heads_per_kv();
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t i = begin + lane();
    double weight = 0;
    const T* x = nullptr;
    if (i < count) {
      const int64_t in_group = i / per_head;
      const int head = key.head * p.heads_per_kv() + int(in_group);
      const Int3 query = queries.at(i - in_group * per_head);
      const int64_t slot = extra >= 0 ? in_window + extra : slot_of(p, key_box(p, query), key.token);
      weight = double(to_real(row_of<T>(t.weights, key.batch, query, head)[slot]));
      x = row_of<T>(t.queries, key.batch, query, head);
    }
    for (int j = 0; j < kLanes && begin + j < count; ++j)
      sum.add(__shfl_sync(kAllLanes, weight, j), shuffle(x, j), first, t.dim);
  }
}

/// `additional`: the keys are the additional ones.
template <class T>
__global__ void __launch_bounds__(kThreads)
    weigh_queries_kernel(const __grid_constant__ Problem p, const __grid_constant__ Product t, int64_t count,
                         bool additional) {
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const int64_t row = i / p.heads_kv, keys = additional ? p.extra_keys : p.tokens();
    Place key;
    key.batch = row / keys, key.head = int(i - row * p.heads_kv);
    const int64_t number = row - key.batch * keys;
    key.token = additional ? Int3{0, 0, int(number)} : whole_grid(p).at(number);
    const Box queries = additional ? whole_grid(p) : query_box(p, key.token);
    for (int first = 0; first < t.dim; first += kLanes * kChannels) {
      RowSum sum;
      weigh_queries_of<T>(p, t, key, queries, additional ? int(number) : -1, first, sum);
      sum.store(t.scale, row_of<T>(additional ? t.extra : t.keys, key.batch, key.token, key.head), first, t.dim);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_bias_kernel(const __grid_constant__ Problem p, const __grid_constant__ Product t, int64_t count) {
  const Box table{{0, 0, 0}, {1, 1, 1}, bias_table(p)};
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps) {
    const int head = int(i / table.volume());
    const Int3 entry = table.at(i - head * table.volume());
    double sum = 0;
    for (int64_t n = lane(); n < p.batch * p.tokens(); n += kLanes) {
      const Place query(p, n, 1);
      const Int3 key = key_at(p, query.token, entry);
      if (key.z < 0) continue;
      const int64_t slot = slot_of(p, key_box(p, query.token), key);
      sum += double(to_real(row_of<T>(t.weights, query.batch, query.token, head)[slot]));
    }
    sum = warp_reduce(sum, [](double a, double b) { return a + b; });
    if (lane() == 0) from_real(sum, pointer<T>(t.bias)[offset(t.bias, 0, entry, head)]);
  }
}

// --- as the core calls them ---
void start(const auto& kernel, const Problem& p, const Product& t, const Executor& executor, int64_t count,
           int per_block, auto... more) {
  if (count > 0) cuda::launch(kernel, num_blocks(count, per_block), kThreads, 0, executor.stream, p, t, more...);
}

size_t workspace_bytes(const Problem&, const Plan&, int) { return 0; }

void scores(const Problem& p, const Product& t, const Plan&, const Executor& executor, void*) {
  const int64_t count = p.batch * p.tokens() * p.heads * num_slots(p);
  dispatch(p.dtype, [&](auto element) { start(scores_kernel<decltype(element)>, p, t, executor, count, kThreads); });
}

void weigh_keys(const Problem& p, const Product& t, const Plan&, const Executor& executor, void*) {
  const int64_t count = p.batch * p.tokens() * p.heads;
  dispatch(p.dtype,
           [&](auto element) { start(weigh_keys_kernel<decltype(element)>, p, t, executor, count, kWarps, count); });
}

void weigh_queries(const Problem& p, const Product& t, const Plan&, const Executor& executor, void*) {
  const int64_t keys = t.keys && p.has_window() ? p.batch * p.tokens() * p.heads_kv : 0;
  const int64_t extra = t.extra ? p.batch * p.extra_keys * p.heads_kv : 0;
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    start(weigh_queries_kernel<T>, p, t, executor, keys, kWarps, keys, false);
    start(weigh_queries_kernel<T>, p, t, executor, extra, kWarps, extra, true);
  });
}

void sum_bias(const Problem& p, const Product& t, const Plan&, const Executor& executor, void*) {
  const int64_t count = bias_table(p).volume() * p.heads;
  dispatch(p.dtype,
           [&](auto element) { start(sum_bias_kernel<decltype(element)>, p, t, executor, count, kWarps, count); });
}

void list_plans(const Problem&, PlanList& list) { list_if_usable(list); }

}  // namespace

const UnfusedKernels kUnfused{list_plans, workspace_bytes, scores, weigh_keys, weigh_queries, sum_bias};

}  // namespace natten::cuda_reference
