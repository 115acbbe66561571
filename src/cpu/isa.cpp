// SPDX-License-Identifier: MIT
// Looks at the processor once.
#include "cpu/isa.h"

#include <vector>

#include "cpu/kernels.h"

namespace natten::cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif
namespace portable {
extern const Kernels kKernels;
}

std::span<const Isa> isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> list;
#if defined(__x86_64__)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
    if (has_avx2 && has_avx512) list.push_back(Isa::avx512);
    if (has_avx2) list.push_back(Isa::avx2);
#endif
    list.push_back(Isa::portable);
    return list;
  }();
  return found;
}

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return avx512::kKernels;
  if (isa == Isa::avx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace natten::cpu
