// SPDX-License-Identifier: MIT
// Forward: one warp per query. The largest logit first, then weights and sums; logits are computed again for each block
// of channels, which costs time only for values wider than 128.
#include "cuda/launch.h"
#include "cuda/reference/kernels.h"
#include "cuda/reference/pairs.cuh"

namespace natten::cuda_reference {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ double largest_logit(const Query<T>& query, const Keys<T>& keys) {
  double max = -HUGE_VAL;
  for (int64_t i = lane(); i < keys.size(); i += kLanes) max = max_or_nan(query.logit(keys[i]), max);
  return warp_reduce(max, [](double a, double b) { return max_or_nan(a, b); });
}

// Sums the channels from `first` on and returns the sum of all weights.
template <class T>
__device__ double sum_values(const Query<T>& query, const Keys<T>& keys, double max, int first, RowSum& out) {
  double sum = 0;
  for (int64_t begin = 0; begin < keys.size(); begin += kLanes) {
    const int64_t i = begin + lane();
    const Key<T> key = i < keys.size() ? keys[i] : Key<T>{};
    const double logit = i < keys.size() ? query.logit(key) : -HUGE_VAL;
    const double weight = logit == -HUGE_VAL ? 0 : exp(logit - max);
    sum += weight;
    for (int j = 0; j < kLanes && begin + j < keys.size(); ++j)
      out.add(__shfl_sync(kAllLanes, weight, j), shuffle(key.v, j), first, query.p.head_dim_v);
  }
  return warp_reduce(sum, [](double a, double b) { return a + b; });
}

template <class T>
__device__ void forward_query(const Query<T>& query) {
  const Problem& p = query.p;
  const Keys<T> keys(query);
  const double max = largest_logit(query, keys);
  for (int first = 0; first < p.head_dim_v; first += kLanes * kChannels) {
    RowSum out;
    const double sum = sum_values(query, keys, max, first, out);
    if (sum == 0) out = RowSum{};  // every key is masked by its bias: not even a NaN among the values counts
    out.store(sum == 0 ? 0.0 : 1 / sum, query.template row<T>(query.args.out), first, p.head_dim_v);
    if (first > 0 || lane() != 0) continue;
    const double lse = sum == 0 ? -HUGE_VAL : max + log(sum);
    if (p.dtype == DType::f64)
      *query.template row<double>(query.args.lse) = lse;
    else
      *query.template row<float>(query.args.lse) = float(lse);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const __grid_constant__ Problem p, const __grid_constant__ ForwardArgs args) {
  constexpr int kWarps = kThreads / kLanes;
  const int64_t count = p.batch * p.tokens() * p.heads;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kLanes; i < count; i += int64_t{gridDim.x} * kWarps)
    forward_query(Query<T>::number(p, args, i));
}

}  // namespace

void forward(const Problem& p, const ForwardArgs& args, void* stream) {
  const int blocks = num_blocks(p.batch * p.tokens() * p.heads, kThreads / kLanes);
  dispatch(p.dtype, [&](auto element) {
    cuda::launch(forward_kernel<decltype(element)>, blocks, kThreads, 0, stream, p, args);
  });
}

}  // namespace natten::cuda_reference
