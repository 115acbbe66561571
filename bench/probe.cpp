// SPDX-License-Identifier: MIT
// What the CPU benchmark measures against: the FMA peak of this processor, and a plain fp32 loop of the kind that one
// writes first. Loaded by bench/cpu.py through ctypes.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

template <int kBytes>
struct Vector {
  typedef float type __attribute__((vector_size(kBytes)));
};

// Twelve independent chains of FMAs in registers; returns flops done.
template <int kBytes>
__attribute__((always_inline)) inline double fma_chains(int64_t steps, float* sink) {
  using V = typename Vector<kBytes>::type;
  constexpr int kChains = 12;
  V acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = V{} + float(i);
  const V a = V{} + 0.999f, b = V{} + 1e-3f;
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
  for (int i = 0; i < kChains; ++i) *sink += acc[i][0];
  return 2.0 * steps * kChains * (kBytes / 4);
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) double chains_avx512(int64_t steps, float* sink) {
  return fma_chains<64>(steps, sink);
}
__attribute__((target("avx2,fma"))) double chains_avx2(int64_t steps, float* sink) {
  return fma_chains<32>(steps, sink);
}
#endif
double chains_portable(int64_t steps, float* sink) { return fma_chains<16>(steps, sink); }

double chains(int64_t steps, float* sink) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return chains_avx512(steps, sink);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return chains_avx2(steps, sink);
#endif
  return chains_portable(steps, sink);
}

}  // namespace

/// Highest rate of fp32 FMAs of one thread, in GFLOP/s, over `tries` runs of a few milliseconds.
EXPORT double probe_fma_peak(int tries) {
  double best = 0;
  volatile float keep = 0;
  for (int i = 0; i < tries; ++i) {
    float sink = 0;
    const auto begin = std::chrono::steady_clock::now();
    const double flops = chains(400000, &sink);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, flops / seconds.count() * 1e-9);
    keep = sink;
  }
  (void)keep;
  return best;
}

/// Forward of a 2-D problem [1, y, x, heads, dim], window k x k, dilation 1, stride 1, one thread, contiguous fp32.
EXPORT void probe_plain_forward(const float* q, const float* k, const float* v, float* out, int ny, int nx, int heads,
                                int dim, int window) {
  std::vector<float> p(int64_t{window} * window);
  const float scale = 1 / std::sqrt(float(dim));
  const int64_t token = int64_t{heads} * dim;
  auto start = [&](int i, int n) { return std::clamp(i - window / 2, 0, n - window); };
  for (int64_t query = 0; query < int64_t{ny} * nx * heads; ++query) {
    const int h = int(query % heads), x = int(query / heads % nx), y = int(query / heads / nx);
    const int64_t first = (int64_t{start(y, ny)} * nx + start(x, nx)) * token + h * dim;
    auto offset = [&](int i) { return first + (int64_t{i / window} * nx + i % window) * token; };
    float max = -INFINITY, sum = 0;
    for (int i = 0; i < window * window; ++i) {
      float s = 0;
      for (int d = 0; d < dim; ++d) s += q[query * dim + d] * k[offset(i) + d];
      p[i] = s * scale;
      max = std::max(max, p[i]);
    }
    for (float& x : p) sum += x = std::exp(x - max);
    for (int d = 0; d < dim; ++d) out[query * dim + d] = 0;
    for (int i = 0; i < window * window; ++i)
      for (int d = 0; d < dim; ++d) out[query * dim + d] += p[i] / sum * v[offset(i) + d];
  }
}
