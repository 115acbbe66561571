// SPDX-License-Identifier: MIT
// What a folder under src/ offers to the core. The one list of backends stands below.
#pragma once
#include <cstddef>

#include "natten/attention.h"

namespace natten {

struct Backend {
  const char* name;
  DeviceKind device;
  /// Appends the plans for a valid problem, best first, and a rejection for each kernel that cannot run it.
  void (*list_plans)(const Problem&, Pass, PlanList&);
  size_t (*workspace_bytes)(const Problem&, Pass, const Plan&, int num_threads);
  void (*forward)(const Problem&, const ForwardArgs&, const Plan&, const Executor&, void* workspace);
  void (*backward)(const Problem&, const BackwardArgs&, const Plan&, const Executor&, void* workspace);
};

namespace reference {
extern const Backend kBackend;
}
namespace cpu {
extern const Backend kBackend;
}
namespace cuda_portable {
extern const Backend kBackend;
}

/// All backends of this build, best first.
inline constexpr const Backend* kBackends[] = {
#ifdef NATTEN_CUDA_EMULATION
    &cuda_portable::kBackend,  // tests/cpp/cuda
#else
    &cpu::kBackend,
    &reference::kBackend,
#endif
};

}  // namespace natten
