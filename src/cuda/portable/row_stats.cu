// SPDX-License-Identifier: MIT
// What surrounds the backward kernels: one pass over dout and out before, one over the sums for the bias after them.
// They wait for memory, so the element type is a branch at run time.
#include "core/element.h"
#include "cuda/launch.h"
#include "cuda/portable/boxes.h"
#include "cuda/ptx/ldmatrix.cuh"

namespace natten::cuda_portable {
constexpr int kThreadsPerRow = 8;
constexpr int kReduceThreads = 512;

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

/// Of 32 entries, whose tables are shared out to the warps of a block; the order of additions is always the same.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_bias_kernel(const __grid_constant__ Problem p, const float* sums, int tables, const TensorView dbias) {
  extern __shared__ __align__(128) unsigned char smem[];
  double* of_warps = reinterpret_cast<double*>(smem);
  const int width = 2 * p.axes[2].window - 1, height = 2 * p.axes[1].window - 1;
  const int64_t entries = int64_t{2 * p.axes[0].window - 1} * height * width;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t index = int64_t{blockIdx.x} * 32 + lane;
  const bool exists = index < p.heads * entries;
  const int head = int(index / entries), entry = int(index % entries);
  const float* first = sums + int64_t{head} * tables * entries + entry;
  double total = 0;
#pragma unroll 8
  for (int i = warp; i < (exists ? tables : 0); i += kReduceThreads / 32) total += first[i * entries];
  of_warps[threadIdx.x] = total;
  __syncthreads();
  if (warp > 0 || !exists) return;
  for (int i = 1; i < kReduceThreads / 32; ++i) total += of_warps[i * 32 + lane];
  const int64_t at = offset(dbias, 0, entry / width / height, entry / width % height, entry % width, head);
  by_element(p.dtype, [&](auto element) { from_real(float(total), pointer<decltype(element)>(dbias)[at]); });
}

void launch_row_stats(const BoxesParams& params, void* stream) {
  const int64_t rows = params.problem.batch * params.problem.tokens() * params.problem.heads;
  const int64_t blocks = (rows * kThreadsPerRow + kThreads - 1) / kThreads;
  cuda::launch(row_stats_kernel, unsigned(blocks), kThreads, 0, stream, params, rows);
}

void launch_reduce_bias(const Problem& p, const float* sums, int tables, const TensorView& dbias, void* stream) {
  int64_t entries = p.heads;
  for (const Axis& a : p.axes) entries *= 2 * int64_t{a.window} - 1;
  cuda::launch(reduce_bias_kernel, unsigned((entries + 31) / 32), kReduceThreads, kReduceThreads * sizeof(double),
               stream, p, sums, tables, dbias);
}

}  // namespace natten::cuda_portable
