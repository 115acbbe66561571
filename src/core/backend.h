// SPDX-License-Identifier: MIT
// What a folder under src/ offers to the core. The one list of backends stands below.
#pragma once
#include <cstddef>

#include "natten/packed.h"
#include "natten/unfused.h"

namespace natten {

/// One product of unfused attention: W is an attention tensor, X a tensor of queries, Y one of keys and, behind them,
/// additional keys; X and Y have `dim` channels. Which one is written depends on the product.
struct Product {
  int dim;
  double scale;
  TensorView weights;      ///< W
  TensorView queries;      ///< X
  TensorView keys, extra;  ///< Y
  TensorView bias;         ///< may be null
  double unused = 0;       ///< what slots without a key get
};

struct UnfusedKernels {
  void (*list_plans)(const Problem&, PlanList&);
  size_t (*workspace_bytes)(const Problem&, const Plan&, int num_threads);
  using Run = void (*)(const Problem&, const Product&, const Plan&, const Executor&, void* workspace);
  Run scores;         ///< W = scale * X Y^T + bias
  Run weigh_keys;     ///< X = scale * W Y
  Run weigh_queries;  ///< Y = scale * W^T X; a null `keys` or `extra` is skipped
  Run sum_bias;       ///< bias = sums of W over samples and queries
};

/// Samples of packed calls whose plans are of this backend. The forward pass needs the workspace of a sample, no more.
struct PackedKernels {
  size_t (*workspace_bytes)(std::span<const BackwardSample>);
  void (*forward)(std::span<const ForwardSample>, const Executor&, void* workspace);
  void (*backward)(std::span<const BackwardSample>, const Executor&, void* workspace);
};

/// Which plans a call wants. To find the best one is part of every call; tiles of the others need not be worked out.
enum class Wanted { best, all };

struct Backend {
  const char* name;
  DeviceKind device;
  /// Appends the plans for a valid problem, best first, and a rejection for each kernel that cannot run it. May end
  /// after the first plan if only the best one is wanted.
  void (*list_plans)(const Problem&, Pass, Wanted, PlanList&);
  size_t (*workspace_bytes)(const Problem&, Pass, const Plan&, int num_threads);
  void (*forward)(const Problem&, const ForwardArgs&, const Plan&, const Executor&, void* workspace);
  void (*backward)(const Problem&, const BackwardArgs&, const Plan&, const Executor&, void* workspace);
  const UnfusedKernels* unfused = nullptr;  ///< null: this backend has none
  const PackedKernels* packed = nullptr;    ///< null: one sample after the other
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
namespace cuda_reference {
extern const Backend kBackend;
}

/// All backends of this build, best first.
inline constexpr const Backend* kBackends[] = {
#ifndef NATTEN_CUDA_EMULATION  // see tests/cpp/cuda
    &cpu::kBackend,
    &reference::kBackend,
#endif
#ifdef NATTEN_CUDA
    &cuda_portable::kBackend,
    &cuda_reference::kBackend,
#endif
};

/// The backend that a plan names.
const Backend& backend_of(const Plan& plan);

}  // namespace natten
