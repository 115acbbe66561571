// SPDX-License-Identifier: MIT
// What surrounds the backward kernels: one pass over dout and out before, one over the sums for the bias after them.
// They wait for memory, so the element type is a branch at run time.
#include "core/element.h"
#include "cuda/launch.h"
#include "cuda/portable/boxes.h"
#include "cuda/ptx/ldmatrix.cuh"

namespace natten::cuda_portable {
constexpr int kThreadsPerRow = 8;

template <class F>
__device__ __forceinline__ auto by_element(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  return dtype == DType::bf16 ? f(bf16{}) : f(f16{});
}

template <class T>
__device__ float partial_dot(const T* a, const T* b, int dim, bool vector, int part) {
  constexpr int kPerLoad = 16 / sizeof(T);
  float sum = 0;
  for (int first = part * kPerLoad; first < dim; first += kThreadsPerRow * kPerLoad) {
    T x[kPerLoad], y[kPerLoad];
    if (vector) {
      const uint4 words_a = ptx::load_global_128(a + first), words_b = ptx::load_global_128(b + first);
      memcpy(x, &words_a, 16), memcpy(y, &words_b, 16);
    }
#pragma unroll
    for (int i = 0; i < kPerLoad; ++i) {
      if (!vector && first + i >= dim) break;
      sum = fmaf(to_real(vector ? x[i] : a[first + i]), to_real(vector ? y[i] : b[first + i]), sum);
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) row_stats_kernel(const __grid_constant__ BoxesParams p, int64_t num_rows) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kThreadsPerRow;
  const int part = threadIdx.x % kThreadsPerRow;
  if (row - row % 4 >= num_rows) return;  // whole warps: their threads sum together
  const Int3 grid = p.problem.grid();
  int64_t n = row < num_rows ? row : num_rows - 1;
  const auto digit = [&](int base) {
    const int64_t q = n / base;
    const int r = int(n - q * base);
    n = q;
    return r;
  };
  const int head = digit(p.problem.heads), x = digit(grid.x), y = digit(grid.y), z = digit(grid.z);
  const int64_t batch = n;
  float sum = by_element(p.problem.dtype, [&](auto element) {
    using T = decltype(element);
    const T* dout = pointer<T>(p.dout.view) + offset(p.dout.view, batch, z, y, x, head);
    const T* out = pointer<T>(p.out.view) + offset(p.out.view, batch, z, y, x, head);
    return partial_dot(dout, out, p.dout.dim, p.dout.vector && p.out.vector, part);
  });
#pragma unroll
  for (int lanes = 1; lanes < kThreadsPerRow; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (part != 0 || row >= num_rows) return;
  const float lse = pointer<float>(p.lse)[offset(p.lse, batch, z, y, x, head)];
  const float dlse = p.dlse.ptr ? pointer<float>(p.dlse)[offset(p.dlse, batch, z, y, x, head)] : 0.0f;
  pointer<RowStats>(p.stats)[offset(p.stats, batch, z, y, x, head)] = {
      lse == -INFINITY ? INFINITY : lse * 1.44269504088896341f, sum - dlse};
}

__global__ void reduce_bias_kernel(const __grid_constant__ BoxesParams p, const TensorView dbias) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= int64_t{p.problem.heads} * p.bias_entries) return;
  const int head = int(index / p.bias_entries), entry = int(index % p.bias_entries);
  const int tables = p.bias_pieces * (kThreads / 32);
  const float* sums = p.bias_sums + int64_t{head} * tables * p.bias_entries + entry;
  double total = 0;
  for (int i = 0; i < tables; ++i) total += sums[int64_t{i} * p.bias_entries];
  const int width = 2 * p.problem.axes[2].window - 1, height = 2 * p.problem.axes[1].window - 1;
  const int64_t at = offset(dbias, 0, entry / width / height, entry / width % height, entry % width, head);
  by_element(p.problem.dtype, [&](auto element) { from_real(float(total), pointer<decltype(element)>(dbias)[at]); });
}

void launch_row_stats(const BoxesParams& params, void* stream) {
  const int64_t rows = params.problem.batch * params.problem.tokens() * params.problem.heads;
  const int64_t blocks = (rows * kThreadsPerRow + kThreads - 1) / kThreads;
  cuda::launch(row_stats_kernel, unsigned(blocks), kThreads, 0, stream, params, rows);
}

void launch_reduce_bias(const BoxesParams& params, const TensorView& dbias, void* stream) {
  const int64_t entries = int64_t{params.problem.heads} * params.bias_entries;
  const int64_t blocks = (entries + kThreads - 1) / kThreads;
  cuda::launch(reduce_bias_kernel, unsigned(blocks), kThreads, 0, stream, params, dbias);
}

}  // namespace natten::cuda_portable
