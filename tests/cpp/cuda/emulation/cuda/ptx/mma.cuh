// SPDX-License-Identifier: MIT
// src/cuda/ptx/mma.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

#include "core/element.h"

namespace natten::ptx {

namespace detail {
template <class T>
struct MmaLane {
  float d[4], c[4];
  uint32_t a[4], b[2];
};
template <class T>
float half_of(uint32_t word, int i) {
  return to_real(T{uint16_t(word >> 16 * i)});
}
/// rows x kDepth times kDepth x 8
template <class T, int kDepth>
void complete_mma(void* const* lanes) {
  float a[16][16], b[16][8];
  const auto lane = [&](int i) -> MmaLane<T>& { return *static_cast<MmaLane<T>*>(lanes[i]); };
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 2; ++e) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < kDepth / 4; ++r) a[g + r % 2 * 8][2 * t + e + r / 2 * 8] = half_of<T>(lane(l).a[r], e);
      for (int r = 0; r < kDepth / 8; ++r) b[2 * t + e + 8 * r][g] = half_of<T>(lane(l).b[r], e);
    }
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      float sum = lane(l).c[e];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      lane(l).d[e] = sum;
    }
}

struct Tf32Lane {
  float d[4];
  uint32_t a[4], b[2];
};
inline double tf32(uint32_t word) { return __uint_as_float(word & 0xffffe000); }
/// Terms are cut off two bits behind the last one that a float of the largest term's size has, and their sum at its own
/// last bit (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330).
inline float cut_off_sum(const double (&terms)[9]) {
  double largest = 0, sum = 0;
  for (const double x : terms) largest = std::max(largest, std::abs(x));  // std::max(x, NaN) is x
  for (const double x : terms) sum += x;
  if (largest == 0 || !std::isfinite(sum)) return float(sum);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 25);
  sum = 0;
  for (const double x : terms) sum += std::trunc(x / unit) * unit;
  const float nearest = float(sum);
  return std::abs(double(nearest)) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}
inline void complete_tf32(void* const* lanes) {
  const auto lane = [&](int i) -> Tf32Lane& { return *static_cast<Tf32Lane*>(lanes[i]); };
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      const int row = l / 4 + e / 2 * 8, column = l % 4 * 2 + e % 2;
      double terms[9] = {0, 0, 0, 0, 0, 0, 0, 0, lane(l).d[e]};
      for (int k = 0; k < 8; ++k)
        terms[k] = tf32(lane(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]) * tf32(lane(column * 4 + k % 4).b[k / 4]);
      lane(l).d[e] = cut_off_sum(terms);
    }
}
}  // namespace detail

inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  detail::Tf32Lane lane{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::warp_barrier(&lane, detail::complete_tf32);
  for (int e = 0; e < 4; ++e) d[e] = lane.d[e];
}

template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  detail::MmaLane<T> lane{{}, {c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::warp_barrier(&lane, detail::complete_mma<T, 16>);
  for (int e = 0; e < 4; ++e) d[e] = lane.d[e];
}
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_16816<T>(d, a, b0, b1, d);
}
template <class T>
void mma_1688(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, const float (&c)[4]) {
  detail::MmaLane<T> lane{{}, {c[0], c[1], c[2], c[3]}, {a0, a1, 0, 0}, {b, 0}};
  emulation::warp_barrier(&lane, detail::complete_mma<T, 8>);
  for (int e = 0; e < 4; ++e) d[e] = lane.d[e];
}

template <class T>
uint32_t pack(float low, float high) {
  T a, b;
  from_real(low, a), from_real(high, b);
  return a.bits | uint32_t{b.bits} << 16;
}

template <class T>
uint16_t round_to(float x) {
  T a;
  from_real(x, a);
  return a.bits;
}

inline uint32_t opaque(uint32_t x, uint32_t zero) { return x ^ zero; }
inline uint32_t masked(uint32_t x, uint32_t mask) { return x & mask; }
template <class T>
inline T* opaque(T* p) {
  return p;
}
inline const char* offset(const char* p, uint32_t n, uint32_t bytes) { return p + uint64_t{n} * bytes; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1 / x; }

}  // namespace natten::ptx
