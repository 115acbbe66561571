// SPDX-License-Identifier: MIT
// Tensors for tests: any element type, any layout, and guard bands. All memory that is not an element of the tensor
// (bands before and behind it, gaps between its rows) holds a NaN of a known bit pattern. An engine that reads there
// shows NaN in its results, one that writes there is caught by `guards_intact` (T-1, T-35).
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "natten/attention.h"

namespace test {

/// Sizes, strides or coordinates: [batch, z, y, x, head, channel].
using Shape = std::array<int64_t, 6>;

enum class Layout {
  contiguous,
  packed,          ///< the middle third of a packed qkv: rows of three times the length
  heads_first,     ///< [batch, head, z, y, x, channel]
  expanded_heads,  ///< one head that stands for all: stride 0
  expanded_batch,  ///< one sample that stands for all: stride 0
  misaligned,      ///< one element off alignment, rows one element apart from each other
};
std::string to_string(Layout layout);
std::string to_string(natten::DType dtype);

/// The value of an element of that type, which is nearest to `x`; ties to even.
double round_to(natten::DType dtype, double x);
/// Half the distance from 1 to the next element: 2^-24 for float.
double unit_roundoff(natten::DType dtype);

class Tensor {
 public:
  static constexpr int64_t kGuard = 64;  // elements in each band

  Tensor() = default;  // an absent tensor
  Tensor(natten::DType dtype, const Shape& sizes, Layout layout, int64_t guard = kGuard);

  explicit operator bool() const { return bytes_ != nullptr; }
  natten::TensorView view() const;
  const Shape& sizes() const { return sizes_; }
  int64_t size() const;

  double get(const Shape& at) const;
  void set(const Shape& at, double value);
  /// Calls `visit` for all coordinates in row-major order.
  void for_each(const std::function<void(const Shape&)>& visit) const;
  void fill(const std::function<double()>& value);
  /// All elements in row-major order.
  std::vector<double> values() const;

  /// Elements become NaN as well: for outputs, none of which may keep it.
  void poison();
  bool guards_intact() const;
  /// Everything, guards included.
  std::vector<std::byte> snapshot() const;

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  static constexpr size_t kAlignment = 64;

  int64_t offset(const Shape& at) const;  // in elements from the first byte
  void write_pattern(int64_t element);

  natten::DType dtype_ = natten::DType::f32;
  Shape sizes_{}, strides_{};
  int64_t origin_ = 0, capacity_ = 0;  // in elements
  std::unique_ptr<std::byte[], Free> bytes_;
  std::vector<bool> owned_;  // per element of the buffer: does it belong to the tensor?
};

}  // namespace test
