// SPDX-License-Identifier: MIT
// Division of non-negative ints by a number known only at run time: a multiplication and a shift.
#pragma once
#include <cstdint>

#include "natten/neighborhood.h"

namespace natten {

struct FastDiv {
  uint32_t divisor = 1, multiplier = 0, shift = 0;

  FastDiv() = default;
  /// 1 <= d < 2^31. With l = ceil(log2(d)), multiplier = ceil(2^(31 + l) / d) is exact for every n < 2^31.
  NATTEN_HD explicit FastDiv(int d) : divisor(uint32_t(d)) {
    if (d <= 1) return;
    uint32_t log2 = 0;
    while ((uint64_t{1} << log2) < divisor) ++log2;
    multiplier = uint32_t(((uint64_t{1} << (31 + log2)) + divisor - 1) / divisor);
    shift = log2 - 1;
  }

  NATTEN_HD int quotient(int n) const {
    return divisor == 1 ? n : int(uint32_t(uint64_t{uint32_t(n)} * multiplier >> 32) >> shift);
  }
  /// n / d, and n becomes n % d
  NATTEN_HD int split(int& n) const {
    const int q = quotient(n);
    n -= q * int(divisor);
    return q;
  }
};

}  // namespace natten
