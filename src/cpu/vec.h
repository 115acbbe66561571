// SPDX-License-Identifier: MIT
// The vector layer: as wide as the instruction set of this translation unit, in the compiler's own vector types, so
// that arithmetic reads like arithmetic. Each kernel file is compiled once per instruction set with NATTEN_ISA naming
// its namespace; nothing in these headers may exist outside of it, or the linker could hand AVX-512 code to another
// copy.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

#include "core/element.h"

#define NATTEN_INLINE __attribute__((always_inline)) inline

namespace natten::cpu::NATTEN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

/// Vectors of any element type and lane count.
template <class T, int kCount>
struct VectorType {
  typedef T type __attribute__((vector_size(sizeof(T) * kCount)));
};

template <class Real>
inline constexpr int kLanes = kVectorBytes / int(sizeof(Real));
template <class Real>
using Vec = typename VectorType<Real, kLanes<Real>>::type;
/// Half as wide, for the last few queries of a row.
template <class Real>
using HalfVec = typename VectorType<Real, kLanes<Real> / 2>::type;

template <class V>
NATTEN_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
NATTEN_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
template <class V, class Real>
NATTEN_INLINE V broadcast(Real x) {
  return x - V{};
}

/// The value stays in a register. NOTE: without it GCC folds one load into every FMA that uses it, and a kernel that is
/// bound by loads falls from 0.98 to 0.57 of the FMA peak.
template <class V>
NATTEN_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

/// Lane-wise maximum; `b` where either is NaN.
template <class V>
NATTEN_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <class V, class M>
NATTEN_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

/// x, or 0 where x is greater; NaN stays. The exponent of a probability: lse is rounded, so it can come out above 0.
template <class V>
NATTEN_INLINE V at_most_zero(V x) {
  return V{} < x ? V{} : x;
}

/// 0, 1, 2, ... as Real.
template <class Real>
NATTEN_INLINE Vec<Real> lane_numbers() {
  return []<int... I>(std::integer_sequence<int, I...>) {
    return Vec<Real>{Real(I)...};
  }(std::make_integer_sequence<int, kLanes<Real>>());
}

template <class V>
NATTEN_INLINE auto sum_lanes(V v) {
  auto sum = v[0];
  for (int i = 1; i < int(sizeof(v) / sizeof(v[0])); ++i) sum += v[i];
  return sum;
}

// --- 2^x for x <= 0 --------------------------------------------------------------------------------------------------
// x = n + f with |f| <= 1/2; a polynomial gives 2^f, and n goes into an exponent. Adding and subtracting 1.5 * 2^23
// rounds; the same sum holds n + bias in its low bits. Below about -bias - 1/2 the result is 0, also for -infinity;
// NaN stays NaN.

template <class Real>
struct Exp2;
template <>
struct Exp2<float> {  // minimax, degree 6: 0.95 ulp
  using Int = int32_t;
  static constexpr float kCoefficients[] = {
      0x1.41d334p-13f, 0x1.5f456ap-10f, 0x1.3b2dbcp-7f, 0x1.c6aed4p-5f, 0x1.ebfbdap-3f, 0x1.62e430p-1f, 1.0f};
  static constexpr int kMantissaBits = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;
};
template <>
struct Exp2<double> {  // Taylor, degree 13: ln(2)^i / i!
  using Int = int64_t;
  static constexpr double kCoefficients[] = {1.3691488853904128e-12, 2.5678435993488206e-11,
                                             4.4455382718708116e-10, 7.0549116208011234e-09,
                                             1.0178086009239699e-07, 1.3215486790144309e-06,
                                             1.5252733804059841e-05, 1.5403530393381610e-04,
                                             1.3333558146428443e-03, 9.6181291076284772e-03,
                                             5.5504108664821580e-02, 2.4022650695910072e-01,
                                             6.9314718055994531e-01, 1.0};
  static constexpr int kMantissaBits = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
};

template <class Real>
NATTEN_INLINE Vec<Real> exp2(Vec<Real> x) {
  using E = Exp2<Real>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Real, float>) {  // rounding and scaling are instructions here
    const Vec<Real> n = _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT), r = x - n;
    Vec<Real> p = broadcast<Vec<Real>>(E::kCoefficients[0]);
    for (int i = 1; i < int(std::size(E::kCoefficients)); ++i) p = p * r + E::kCoefficients[i];
    return _mm512_maskz_scalef_ps(0xffff, p, n);
  }
#endif
  using Bits = typename VectorType<typename E::Int, kLanes<Real>>::type;
  x = max(broadcast<Vec<Real>>(Real(-E::kBias)), x);
  const Vec<Real> shifted = x + Real(E::kRound + E::kBias);
  const Vec<Real> f = x - (shifted - Real(E::kRound + E::kBias));
  Vec<Real> p = broadcast<Vec<Real>>(E::kCoefficients[0]);
  for (int i = 1; i < int(std::size(E::kCoefficients)); ++i) p = p * f + E::kCoefficients[i];
  return p * (Vec<Real>)((Bits)shifted << E::kMantissaBits);
}

// --- natural logarithm of x > 0; NaN for NaN and infinity ------------------------------------------------------------
// x = 2^n m with m in [1/sqrt 2, sqrt 2): ln m = 2 artanh(t), t = (m - 1) / (m + 1), |t| < 0.172, by its series.

template <class Real>
NATTEN_INLINE Vec<Real> log(Vec<Real> x) {
  using E = Exp2<Real>;
  using Int = typename E::Int;
  using Bits = typename VectorType<Int, kLanes<Real>>::type;
  constexpr Int kHalfRoot = std::is_same_v<Real, float> ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcd);  // 1 / sqrt 2
  constexpr Int kMantissa = (Int(1) << E::kMantissaBits) - 1;
  const Bits shifted = (Bits)x - kHalfRoot;
  const Vec<Real> n = __builtin_convertvector(shifted >> E::kMantissaBits, Vec<Real>);
  const Vec<Real> m = (Vec<Real>)((shifted & kMantissa) + kHalfRoot);
  const Vec<Real> t = (m - Real(1)) / (m + Real(1)), t2 = t * t;
  constexpr int kTerms = std::is_same_v<Real, float> ? 6 : 12;
  Vec<Real> series = broadcast<Vec<Real>>(Real(1) / (2 * kTerms - 1));
  for (int i = kTerms - 1; i > 0; --i) series = series * t2 + Real(1) / (2 * i - 1);
  return n * Real(kLn2) + (t + t) * series + (x - x);
}

// --- elements in memory ----------------------------------------------------------------------------------------------

/// kLanes elements of a tensor, as Real.
template <class Real, class T>
NATTEN_INLINE Vec<Real> load_elements(const T* p) {
  if constexpr (std::is_same_v<T, Real>) {
    return load<Vec<Real>>(p);
  } else {
    using Wide = typename VectorType<uint32_t, kLanes<Real>>::type;
    const Wide bits = __builtin_convertvector(load<typename VectorType<uint16_t, kLanes<Real>>::type>(p), Wide);
    if constexpr (std::is_same_v<T, bf16>) return (Vec<Real>)(bits << 16);
    const Wide magnitude = bits << 13 & 0x0fffe000;  // see to_real(f16)
    const Wide finite = (Wide)((Vec<Real>)magnitude * 0x1p112f);
    const Wide special = (Wide)(magnitude >= 0x0f800000) & 0x7f800000;
    return (Vec<Real>)(finite | special | (bits & 0x8000) << 16);
  }
}

/// The first `count` < kLanes elements, then zeros; reads nothing behind them.
template <class Real, class T>
NATTEN_INLINE Vec<Real> load_first(const T* p, int count) {
  alignas(kVectorBytes) T elements[kLanes<Real>] = {};
  std::memcpy(elements, p, count * sizeof(T));
  return load_elements<Real>(elements);
}

template <class Real, class T>
NATTEN_INLINE void store_elements(T* p, Vec<Real> v) {
  if constexpr (std::is_same_v<T, Real>) {
    store(p, v);
  } else {
    alignas(kVectorBytes) Real reals[kLanes<Real>];
    store(reals, v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Real>; ++i) from_real(reals[i], p[i]);
  }
}

template <class Real, class T>
NATTEN_INLINE void store_first(T* p, Vec<Real> v, int count) {
  for (int i = 0; i < count; ++i) from_real(v[i], p[i]);
}

/// Calls f(offset, lanes) for each vector of `dim` elements; `lanes` < kLanes in the last one if dim is no multiple.
template <class Real, class F>
NATTEN_INLINE void for_each_vector(int dim, F&& f) {
  int d = 0;
  for (; d + kLanes<Real> <= dim; d += kLanes<Real>) f(d, kLanes<Real>);
  if (d < dim) f(d, dim - d);
}

template <class Real, class T>
NATTEN_INLINE Vec<Real> load_up_to(const T* p, int lanes) {
  return lanes == kLanes<Real> ? load_elements<Real>(p) : load_first<Real>(p, lanes);
}
template <class Real, class T>
NATTEN_INLINE void store_up_to(T* p, Vec<Real> v, int lanes) {
  if (lanes == kLanes<Real>)
    store_elements<Real>(p, v);
  else
    store_first<Real>(p, v, lanes);
}

/// <a, b>; `a` is padded with zeros to whole vectors.
template <class Real, class T>
NATTEN_INLINE Real dot(const Real* a, const T* b, int dim) {
  Vec<Real> sum = {};
  for_each_vector<Real>(dim, [&](int d, int lanes) { sum += load<Vec<Real>>(a + d) * load_up_to<Real>(b + d, lanes); });
  return sum_lanes(sum);
}

// --- transposition ---------------------------------------------------------------------------------------------------

/// Swaps, between two rows, the lanes that differ in bit kBit of row and lane number:
///   kBit 1, rows  a0 a1 a2 a3  ->  a0 b0 a2 b2
///                 b0 b1 b2 b3      a1 b1 a3 b3
template <class Real, int kBit>
NATTEN_INLINE void swap_lanes(Vec<Real>& a, Vec<Real>& b) {
  constexpr int n = kLanes<Real>;
  [&]<int... I>(std::integer_sequence<int, I...>) {
    const Vec<Real> low = __builtin_shufflevector(a, b, ((I & kBit) ? n + I - kBit : I)...);
    b = __builtin_shufflevector(a, b, ((I & kBit) ? n + I : I + kBit)...);
    a = low;
  }(std::make_integer_sequence<int, n>());
}

template <class Real, int kBit = kLanes<Real> / 2>
NATTEN_INLINE void transpose(Vec<Real> (&rows)[kLanes<Real>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Real>; ++i)
    if (!(i & kBit)) swap_lanes<Real, kBit>(rows[i], rows[i | kBit]);
  if constexpr (kBit > 1) transpose<Real, kBit / 2>(rows);
}

}  // namespace natten::cpu::NATTEN_ISA
