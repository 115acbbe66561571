// SPDX-License-Identifier: MIT
#include "tensors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

namespace test {
namespace {

using natten::DType;

/// The half types, by their definition and not by the compiler's, which may lack them.
struct Format {
  int mantissa_bits, exponent_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};

Format format_of(DType dtype) { return dtype == DType::f16 ? Format{10, 5} : Format{7, 8}; }

uint16_t encode_half(Format f, double x) {
  const int infinity = ((1 << f.exponent_bits) - 1) << f.mantissa_bits;
  const int sign = std::signbit(x) ? 1 << 15 : 0;
  if (std::isnan(x)) return uint16_t(infinity | 1 << (f.mantissa_bits - 1));
  if (x == 0.0) return uint16_t(sign);
  if (std::isinf(x)) return uint16_t(sign | infinity);
  const int exponent = std::max(std::ilogb(x), 1 - f.bias());
  // The mantissa with its leading one; if rounding carries it to the next power of two, the sum below is still right.
  const int mantissa = int(std::nearbyint(std::ldexp(std::abs(x), f.mantissa_bits - exponent)));
  const int64_t bits = (int64_t{exponent + f.bias() - 1} << f.mantissa_bits) + mantissa;
  return uint16_t(sign | int(std::min<int64_t>(bits, infinity)));
}

double decode_half(Format f, uint16_t bits) {
  const int exponent = bits >> f.mantissa_bits & ((1 << f.exponent_bits) - 1);
  const int fraction = bits & ((1 << f.mantissa_bits) - 1);
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << f.exponent_bits) - 1)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  const int leading = exponent ? 1 << f.mantissa_bits : 0;
  return sign * std::ldexp(leading + fraction, std::max(exponent, 1) - f.bias() - f.mantissa_bits);
}

template <typename T>
void store(std::byte* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

template <typename T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

void store_pattern(DType dtype, std::byte* p) {
  if (dtype == DType::f64) return store(p, uint64_t{0x7ff8deadbeefdead});
  if (dtype == DType::f32) return store(p, uint32_t{0x7fc0dead});
  store(p, uint16_t(dtype == DType::f16 ? 0x7e5d : 0x7fcd));
}

/// Memory order, outermost first, for each layout.
Shape strides_of(const Shape& sizes, Layout layout) {
  std::array<int, 6> order = {0, 1, 2, 3, 4, 5};
  if (layout == Layout::heads_first) order = {0, 4, 1, 2, 3, 5};
  Shape strides{};
  int64_t step = 1;
  for (int i = 5; i >= 0; --i) {
    const int axis = order[size_t(i)];
    const bool expanded =
        (layout == Layout::expanded_heads && axis == 4) || (layout == Layout::expanded_batch && axis == 0);
    strides[size_t(axis)] = expanded ? 0 : step;
    if (!expanded) step *= sizes[size_t(axis)];
    if (layout == Layout::misaligned && axis == 5) step += 1;
    if (layout == Layout::packed && axis == 4) step *= 3;
  }
  return strides;
}

}  // namespace

std::string to_string(Layout layout) {
  constexpr const char* names[] = {"contiguous",     "packed",         "heads_first",
                                   "expanded_heads", "expanded_batch", "misaligned"};
  return names[int(layout)];
}

std::string to_string(DType dtype) {
  constexpr const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[int(dtype)];
}

double round_to(DType dtype, double x) {
  if (dtype == DType::f64) return x;
  if (dtype == DType::f32) return double(float(x));
  return decode_half(format_of(dtype), encode_half(format_of(dtype), x));
}

double unit_roundoff(DType dtype) {
  const int bits = dtype == DType::f64 ? 53 : dtype == DType::f32 ? 24 : format_of(dtype).mantissa_bits + 1;
  return std::ldexp(1.0, -bits);
}

Tensor::Tensor(DType dtype, const Shape& sizes, Layout layout, int64_t guard)
    : dtype_(dtype), sizes_(sizes), strides_(strides_of(sizes, layout)) {
  origin_ = guard;
  if (layout == Layout::misaligned) origin_ += 1;
  if (layout == Layout::packed) origin_ += sizes[4] * sizes[5];
  int64_t last = -1;  // the last element, relative to the first
  if (size() > 0) {
    last = 0;
    for (size_t i = 0; i < 6; ++i) last += (sizes_[i] - 1) * strides_[i];
  }
  capacity_ = origin_ + last + 1 + guard;
  const size_t bytes = size_t(capacity_) * size_t(size_of(dtype_));
  bytes_.reset(static_cast<std::byte*>(::operator new(std::max<size_t>(bytes, 1), std::align_val_t{kAlignment})));
  owned_.assign(size_t(capacity_), false);
  for (int64_t i = 0; i < capacity_; ++i) write_pattern(i);
  for_each([&](const Shape& at) { owned_[size_t(offset(at))] = true; });
}

natten::TensorView Tensor::view() const {
  natten::TensorView view;
  if (!bytes_) return view;
  view.ptr = bytes_.get() + origin_ * size_of(dtype_);
  std::copy(strides_.begin(), strides_.end(), view.strides);
  return view;
}

int64_t Tensor::size() const {
  int64_t n = 1;
  for (const int64_t s : sizes_) n *= s;
  return n;
}

int64_t Tensor::offset(const Shape& at) const {
  int64_t element = origin_;
  for (size_t i = 0; i < 6; ++i) element += at[i] * strides_[i];
  return element;
}

double Tensor::get(const Shape& at) const {
  const std::byte* p = bytes_.get() + offset(at) * size_of(dtype_);
  if (dtype_ == DType::f64) return load<double>(p);
  if (dtype_ == DType::f32) return double(load<float>(p));
  return decode_half(format_of(dtype_), load<uint16_t>(p));
}

void Tensor::set(const Shape& at, double value) {
  std::byte* p = bytes_.get() + offset(at) * size_of(dtype_);
  if (dtype_ == DType::f64) return store(p, value);
  if (dtype_ == DType::f32) return store(p, float(value));
  store(p, encode_half(format_of(dtype_), value));
}

void Tensor::for_each(const std::function<void(const Shape&)>& visit) const {
  const int64_t n = size();
  for (int64_t i = 0; i < n; ++i) {
    Shape at{};
    int64_t rest = i;
    for (size_t axis = 6; axis-- > 0; rest /= sizes_[axis]) at[axis] = rest % sizes_[axis];
    visit(at);
  }
}

void Tensor::fill(const std::function<double()>& value) {
  for_each([&](const Shape& at) { set(at, value()); });
}

std::vector<double> Tensor::values() const {
  std::vector<double> result;
  if (!bytes_) return result;
  result.reserve(size_t(size()));
  for_each([&](const Shape& at) { result.push_back(get(at)); });
  return result;
}

void Tensor::write_pattern(int64_t element) { store_pattern(dtype_, bytes_.get() + element * size_of(dtype_)); }

void Tensor::poison() {
  for (int64_t i = 0; i < capacity_; ++i) write_pattern(i);
}

bool Tensor::guards_intact() const {
  std::byte pattern[8];
  store_pattern(dtype_, pattern);
  const size_t width = size_t(size_of(dtype_));
  for (size_t i = 0; i < size_t(capacity_); ++i)
    if (!owned_[i] && std::memcmp(bytes_.get() + i * width, pattern, width) != 0) return false;
  return true;
}

std::vector<std::byte> Tensor::snapshot() const {
  if (!bytes_) return {};
  return {bytes_.get(), bytes_.get() + size_t(capacity_) * size_t(size_of(dtype_))};
}

}  // namespace test
