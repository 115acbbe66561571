// SPDX-License-Identifier: MIT
// The one place where a problem is checked. A message names the axis, the numbers and the remedy.
#include "natten/problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "natten/error.h"
#include "natten/unfused.h"

namespace natten {
namespace {

// Sums of a few extents and windows must fit in an int, and so must products of head_dim and a few.
constexpr int kMaxExtent = 1 << 28;
constexpr int kMaxHeads = 1 << 20;
constexpr double kMaxScale = 1e38;  // times log2(e), it must be a float
// Elements of a tensor and query-key pairs of a problem must be countable with room to spare.
constexpr double kMaxCount = double(std::numeric_limits<int64_t>::max()) / 16;

[[noreturn]] void fail(const std::string& sentence) { throw Error(ErrorKind::invalid_argument, sentence); }

std::string str(int64_t n) { return std::to_string(n); }

void validate_axis(const Axis& a, const std::string& axis, bool oversize) {
  if (a.extent < 0 || a.extent > kMaxExtent)
    fail("axis " + axis + " has " + str(a.extent) + " tokens, but an axis must have 0 to " + str(kMaxExtent));
  if (a.window < 0 || a.window > kMaxExtent)
    fail("kernel_size " + str(a.window) + " on axis " + axis + " must be at least 1 and at most " + str(kMaxExtent));
  if (a.dilation < 1 || a.dilation > kMaxExtent)
    fail("dilation " + str(a.dilation) + " on axis " + axis + " must be at least 1 and at most " + str(kMaxExtent));
  if (a.stride < 1 || (a.window > 0 && a.stride > a.window))
    fail("stride " + str(a.stride) + " on axis " + axis + " must be at least 1 and at most kernel_size " +
         str(a.window));
  const int64_t reach = int64_t{a.window} * a.dilation;
  if (!oversize && reach > a.extent)
    fail("kernel_size " + str(a.window) + " with dilation " + str(a.dilation) + " needs " + str(reach) +
         " tokens on axis " + axis + ", but the grid has " + str(a.extent) +
         " there: choose a smaller kernel_size or dilation, or drop oversize='error'");
}

void validate_count(double count, const char* what) {
  if (count > kMaxCount)
    fail(std::string(what) + " of this size cannot be counted in 64 bits: use a smaller batch, grid or kernel_size");
}

void validate_counts(const Problem& p) {
  const double batch = double(std::max<int64_t>(p.batch, 1)),
               width = double(p.heads) * std::max(p.head_dim, p.head_dim_v);
  double tokens = 1, pairs = 1, bias = p.heads;
  for (const Axis& a : p.axes) {
    tokens *= std::max(a.extent, 1);
    pairs *= double(std::max(a.extent, 1)) * std::max(std::min(a.window, a.extent), 1);
    bias *= 2.0 * std::max(a.window, 1);
  }
  validate_count(batch * tokens * width, "a tensor");
  validate_count(batch * p.extra_keys * width, "a tensor of additional keys");
  validate_count(pairs + tokens * p.extra_keys, "the query-key pairs of a problem");
  // The backward pass sums a table per piece of work, of which there are at most as many as queries.
  if (p.has_bias) validate_count(bias * std::max(batch * tokens, 1048576.0), "a relative position bias");
}

}  // namespace

void validate(const Problem& p) {
  if (p.batch < 0) fail("batch " + str(p.batch) + " must not be negative");
  if (p.heads < 1 || p.heads_kv < 1 || p.heads > kMaxHeads)
    fail("heads " + str(p.heads) + " and key/value heads " + str(p.heads_kv) + " must be at least 1 and at most " +
         str(kMaxHeads));
  if (p.heads % p.heads_kv != 0)
    fail("heads " + str(p.heads) + " must be a multiple of key/value heads " + str(p.heads_kv) +
         ": repeat or drop key/value heads");
  if (p.head_dim < 1 || p.head_dim_v < 1 || p.head_dim > kMaxHeads || p.head_dim_v > kMaxHeads)
    fail("head_dim " + str(p.head_dim) + " and the values' head_dim " + str(p.head_dim_v) +
         " must be at least 1 and at most " + str(kMaxHeads));
  if (p.extra_keys < 0 || p.extra_keys > kMaxExtent)
    fail("additional keys must number 0 to " + str(kMaxExtent) + ", not " + str(p.extra_keys));
  if (!std::isfinite(p.scale) || (p.dtype != DType::f64 && std::abs(p.scale) > kMaxScale))
    fail("scale " + std::to_string(p.scale) + " must be a finite number, and at most 1e38 unless tensors are float64");
  const char* names[3] = {"z (first of three)", "y (second to last)", "x (last)"};
  for (int i = 0; i < 3; ++i) validate_axis(p.axes[i], names[i], p.oversize);
  if (!p.has_window() && p.extra_keys == 0) fail("kernel_size 0 leaves no keys: give additional keys or a kernel_size");
  if (!p.has_window() && p.has_bias)
    fail("kernel_size 0 has no relative positions: drop the bias or give a kernel_size");
  validate_counts(p);
}

void validate_unfused(const Problem& p) {
  validate(p);
  double slots = p.has_window() ? 1 : 0;
  for (const Axis& a : p.axes) slots *= a.window;
  validate_count(double(std::max<int64_t>(p.batch, 1)) * double(std::max<int64_t>(p.tokens(), 1)) * p.heads *
                     (slots + p.extra_keys),
                 "an attention tensor");
}

int64_t num_pairs(const Problem& p) {
  int64_t pairs = p.has_window() ? 1 : 0;
  for (const Axis& a : p.axes) pairs *= p.has_window() ? num_pairs(a) : 1;
  return pairs + p.tokens() * p.extra_keys;
}

double approximate_work(const Problem& p) {
  double keys = p.has_window() ? 1 : 0;
  for (const Axis& a : p.axes) keys *= std::min(a.window, a.extent);
  return double(p.batch) * p.heads * double(p.tokens()) * (p.head_dim + p.head_dim_v) * (keys + p.extra_keys);
}

}  // namespace natten
