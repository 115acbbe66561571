// SPDX-License-Identifier: MIT
// Times the CUDA engines' plans without torch: `natten_bench_cuda [seconds per row] [workload]`. Kernel time from
// events around back-to-back calls; buffers are rotated where they would fit in the L2. One JSON row per workload,
// pass, type and plan, with the largest difference of its results from those of the first plan measured (a sanity
// check: the tests compare with the oracle).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/element.h"
#include "cuda/launch.h"
#include "natten/attention.h"

namespace {

using natten::Axis;
using natten::DType;
using natten::Pass;
using natten::Plan;
using natten::Problem;
using natten::TensorView;

struct Workload {
  const char* name;
  int batch, heads, head_dim;
  Axis axes[3];
  bool bias = false;
  DType dtype = DType::bf16;
};

std::vector<Workload> workloads() {
  const auto axis = [](int extent, int window, int dilation = 1, int stride = 1, bool causal = false) {
    return Axis{extent, window, stride, dilation, causal};
  };
  const Axis one{};
  return {
      {"nat_tiny_s1", 128, 2, 32, {one, axis(56, 7), axis(56, 7)}},
      {"nat_tiny_s3", 128, 8, 32, {one, axis(14, 7), axis(14, 7)}},
      {"dinat_tiny_s1_d8", 128, 2, 32, {one, axis(56, 7, 8), axis(56, 7, 8)}},
      {"det_200x304_k7_d32", 8, 4, 32, {one, axis(200, 7), axis(304, 7)}},
      {"hdit_128_k7_d64", 4, 4, 64, {one, axis(128, 7), axis(128, 7)}},
      {"nat_tiny_s1_f16", 128, 2, 32, {one, axis(56, 7), axis(56, 7)}, false, DType::f16},
      {"nat_tiny_s1_f32", 128, 2, 32, {one, axis(56, 7), axis(56, 7)}, false, DType::f32},
      {"hdit_128_k7_d64_f32", 4, 4, 64, {one, axis(128, 7), axis(128, 7)}, false, DType::f32},
      {"nat_tiny_s1_causal", 128, 2, 32, {one, axis(56, 7, 1, 1, true), axis(56, 7, 1, 1, true)}},
      {"nat_tiny_s1_rpb", 128, 2, 32, {one, axis(56, 7), axis(56, 7)}, true},
      {"nat_tiny_s3_rpb", 128, 8, 32, {one, axis(14, 7), axis(14, 7)}, true},
      {"dinat_tiny_s1_d8_rpb", 128, 2, 32, {one, axis(56, 7, 8), axis(56, 7, 8)}, true},
      {"nat_tiny_s1_k13", 128, 2, 32, {one, axis(56, 13), axis(56, 13)}},
      {"nat_tiny_s1_stride2", 128, 2, 32, {one, axis(56, 7, 1, 2), axis(56, 7, 1, 2)}},
      {"3d_32_k13_d64", 1, 8, 64, {axis(32, 13), axis(32, 13), axis(32, 13)}},
      {"flux4k_na", 1, 24, 128, {one, axis(256, 80), axis(256, 80)}},
  };
}

/// Device memory of one tensor, heads last.
struct Buffer {
  TensorView view;
  size_t bytes = 0;

  Buffer(const Problem& p, int64_t heads, int64_t dim, size_t element) {
    const int64_t x = heads * dim, y = p.axes[2].extent * x, z = p.axes[1].extent * y, b = p.axes[0].extent * z;
    bytes = size_t(p.batch * b) * element;
    NATTEN_CUDA_CHECK(cudaMalloc(&view.ptr, bytes));
    const int64_t strides[6] = {b, z, y, x, dim, 1};
    std::copy_n(strides, 6, view.strides);
  }
};

struct Set {
  natten::BackwardArgs args;
  std::vector<void*> memory;
  size_t bytes = 0;

  explicit Set(const Problem& p, uint32_t seed) {
    const size_t element = natten::size_of(p.dtype);
    const auto make = [&](TensorView& view, int64_t heads, int64_t dim, size_t size) {
      Buffer buffer(p, heads, dim, size);
      view = buffer.view, bytes += buffer.bytes;
      memory.push_back(view.ptr);
      return buffer.bytes;
    };
    for (TensorView* view : {&args.q, &args.k, &args.v, &args.dout})
      fill(make(*view, p.heads, p.head_dim, element), p.dtype, seed++, *view);
    for (TensorView* view : {&args.out, &args.dq, &args.dk, &args.dv}) make(*view, p.heads, p.head_dim, element);
    make(args.lse, p.heads, 1, 4);
    if (!p.has_bias) return;
    const int64_t wx = 2 * p.axes[2].window - 1, wy = 2 * p.axes[1].window - 1, wz = 2 * p.axes[0].window - 1;
    for (TensorView* view : {&args.bias, &args.dbias}) {
      NATTEN_CUDA_CHECK(cudaMalloc(&view->ptr, size_t(wx * wy * wz) * p.heads * element));
      memory.push_back(view->ptr);
      const int64_t strides[6] = {0, wx * wy, wx, 1, wx * wy * wz, 1};
      std::copy_n(strides, 6, view->strides);
      NATTEN_CUDA_CHECK(cudaMemset(view->ptr, 0, size_t(wx * wy * wz) * p.heads * element));
    }
  }
  ~Set() {
    for (void* p : memory) cudaFree(p);
  }

 private:
  // A million random normals, repeated.
  static void fill(size_t bytes, DType dtype, uint32_t seed, const TensorView& view) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    natten::dispatch(dtype, [&](auto element) {
      std::vector<decltype(element)> pattern(std::min<size_t>(bytes / sizeof element, 1000003));
      for (auto& x : pattern) natten::from_real(normal(rng), x);
      const size_t step = pattern.size() * sizeof element;
      for (size_t at = 0; at < bytes; at += step)
        NATTEN_CUDA_CHECK(cudaMemcpy(static_cast<char*>(view.ptr) + at, pattern.data(), std::min(bytes - at, step),
                                     cudaMemcpyHostToDevice));
    });
  }
};

std::vector<float> download(const TensorView& view, const Problem& p) {
  return natten::dispatch(p.dtype, [&](auto element) {
    std::vector<decltype(element)> elements(size_t(p.batch * view.strides[0]));
    const size_t bytes = elements.size() * sizeof element;
    NATTEN_CUDA_CHECK(cudaMemcpy(elements.data(), view.ptr, bytes, cudaMemcpyDeviceToHost));
    std::vector<float> values(elements.size());
    std::transform(elements.begin(), elements.end(), values.begin(), [](auto x) { return float(natten::to_real(x)); });
    return values;
  });
}

/// Relative root mean square difference of the results of two plans.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, total = 0;
  for (size_t i = 0; i < a.size(); i += 7) {
    const double x = a[i], y = b[i];
    error += (x - y) * (x - y), total += x * x;
  }
  return std::sqrt(error / total);
}

template <class Call>
float milliseconds(Call call, double seconds) {
  cudaEvent_t begin, end;
  NATTEN_CUDA_CHECK(cudaEventCreate(&begin));
  NATTEN_CUDA_CHECK(cudaEventCreate(&end));
  const auto time = [&](int count) {
    NATTEN_CUDA_CHECK(cudaEventRecord(begin));
    for (int i = 0; i < count; ++i) call(i);
    NATTEN_CUDA_CHECK(cudaEventRecord(end));
    NATTEN_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    NATTEN_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    return ms / count;
  };
  call(0);
  const float once = time(2);
  const int count = std::clamp(int(seconds * 1000 / 5 / once), 2, 100);
  std::vector<float> runs;
  for (int i = 0; i < 5; ++i) runs.push_back(time(count));
  std::sort(runs.begin(), runs.end());
  return runs[2];
}

const char* name_of(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16"; }

void bench(const Workload& w, double seconds) {
  Problem p;
  p.dtype = w.dtype;
  p.batch = w.batch, p.heads = p.heads_kv = w.heads, p.head_dim = p.head_dim_v = w.head_dim;
  std::copy_n(w.axes, 3, p.axes);
  p.has_bias = w.bias;
  p.scale = 1 / std::sqrt(double(w.head_dim));
  std::vector<Set*> sets = {new Set(p, 1)};
  while (sets.size() * sets[0]->bytes < 400'000'000) sets.push_back(new Set(p, 1));

  for (const Pass pass : {Pass::forward, Pass::backward}) {
    std::vector<std::vector<float>> first;
    for (const Plan& plan : list_plans(p, pass, natten::DeviceKind::cuda).plans) {
      if (plan.backend == "cuda-reference") continue;
      natten::Executor executor;
      void* workspace = nullptr;
      NATTEN_CUDA_CHECK(cudaMalloc(&workspace, natten::workspace_bytes(p, pass, plan, 1) + 64));
      const auto call = [&](int i) {
        const natten::BackwardArgs& args = sets[i % sets.size()]->args;
        if (pass == Pass::forward)
          natten::forward(p, args, plan, executor, workspace);
        else
          natten::backward(p, args, plan, executor, workspace);
      };
      for (size_t i = 0; i < sets.size(); ++i) call(int(i));
      NATTEN_CUDA_CHECK(cudaDeviceSynchronize());
      const natten::BackwardArgs& a = sets[0]->args;
      std::vector<TensorView> results = {a.out};
      if (pass == Pass::backward) results = {a.dq, a.dk, a.dv};
      std::string differences;
      for (size_t i = 0; i < results.size(); ++i) {
        std::vector<float> values = download(results[i], p);
        char text[32];
        if (first.size() <= i) first.push_back(values);
        std::snprintf(text, sizeof text, "%s%.2g", i ? ", " : "", difference(first[i], values));
        differences += text;
      }
      const float ms = milliseconds(call, seconds);
      std::printf(
          "{\"workload\": \"%s\", \"pass\": \"%s\", \"dtype\": \"%s\", \"ms\": %.4f, \"plan\": \"%s\", \"rms\": "
          "[%s]}\n",
          w.name, pass == Pass::forward ? "fwd" : "bwd", name_of(w.dtype), ms, to_string(plan).c_str(),
          differences.c_str());
      std::fflush(stdout);
      NATTEN_CUDA_CHECK(cudaFree(workspace));
    }
  }
  for (Set* set : sets) delete set;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 0.2;
  try {
    for (const Workload& w : workloads())
      if (argc < 3 || std::strstr(w.name, argv[2])) bench(w, seconds);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
