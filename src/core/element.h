// SPDX-License-Identifier: MIT
// Elements in memory: the 16-bit types that C++20 lacks, and addresses of tokens. Used by every CPU engine, so
// everything here is always inlined (see NATTEN_HD in neighborhood.h).
#pragma once
#include <cstdint>
#include <cstring>

#include "natten/attention.h"

namespace natten {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace detail {
template <class To, class From>
NATTEN_HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace detail

NATTEN_HD float to_real(float x) { return x; }
NATTEN_HD double to_real(double x) { return x; }
NATTEN_HD float to_real(bf16 x) { return detail::bit_cast<float>(uint32_t{x.bits} << 16); }
NATTEN_HD float to_real(f16 x) {
  // Exponent and mantissa move to their places in a float; a multiplication by 2^112 mends the exponent's bias and
  // makes normal floats of subnormal halves. The largest exponent means infinity or NaN in both types.
  const uint32_t magnitude = uint32_t{x.bits} << 13 & 0x0fffe000;
  const float finite = detail::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  return detail::bit_cast<float>(detail::bit_cast<uint32_t>(finite) | special | (uint32_t{x.bits} & 0x8000) << 16);
}

NATTEN_HD void from_real(float x, float& out) { out = x; }
NATTEN_HD void from_real(double x, double& out) { out = x; }
NATTEN_HD void from_real(float x, bf16& out) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  out.bits = uint16_t((x != x ? bits | 0x400000 : rounded) >> 16);
}
NATTEN_HD void from_real(float x, f16& out) {
  const uint32_t bits = detail::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: an addition of 0.5 leaves the rounded mantissa in the low bits
    half = detail::bit_cast<uint32_t>(detail::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}
NATTEN_HD void from_real(double x, bf16& out) { from_real(float(x), out); }
NATTEN_HD void from_real(double x, f16& out) { from_real(float(x), out); }
NATTEN_HD void from_real(double x, float& out) { out = float(x); }

/// Element offset of a token of one head.
NATTEN_HD int64_t offset(const TensorView& t, int64_t batch, int64_t z, int64_t y, int64_t x, int64_t head) {
  return batch * t.strides[0] + z * t.strides[1] + y * t.strides[2] + x * t.strides[3] + head * t.strides[4];
}
NATTEN_HD int64_t offset(const TensorView& t, int64_t batch, Int3 token, int64_t head) {
  return offset(t, batch, token.z, token.y, token.x, head);
}

template <class T>
NATTEN_HD T* pointer(const TensorView& t) {
  return static_cast<T*>(t.ptr);
}

/// Calls `f`, a host function, with a value of the C++ type that a DType names.
template <class F>
__attribute__((always_inline)) inline auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    default:
      return f(f16{});
  }
}

}  // namespace natten
