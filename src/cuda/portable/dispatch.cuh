// SPDX-License-Identifier: MIT
// From run-time element types and sizes to kernel instances, and their launch.
#pragma once
#include <algorithm>
#include <type_traits>

#include "core/element.h"
#include "cuda/launch.h"
#include "cuda/portable/boxes.h"

namespace natten::cuda_portable {

/// Calls f(element, head dim bucket) with the types that a problem's kernel is compiled for.
template <class F>
void dispatch_kernel(const BoxesParams& p, F&& f) {
  const int dim = std::max(p.problem.head_dim, p.problem.head_dim_v);
  const auto by_dim = [&](auto element) {
    if (dim <= 32) return f(element, std::integral_constant<int, 32>{});
    if (dim <= 64) return f(element, std::integral_constant<int, 64>{});
    if (dim <= 128) return f(element, std::integral_constant<int, 128>{});
    return f(element, std::integral_constant<int, 256>{});
  };
  return p.problem.dtype == DType::bf16 ? by_dim(bf16{}) : by_dim(f16{});
}

/// Calls f(element, head dim bucket up to kMost) for kernels of the unfused operators.
template <int kMost, class F>
void dispatch_unfused(DType dtype, int dim, F&& f) {
  const auto by_dim = [&](auto element) {
    if (dim <= 32) return f(element, std::integral_constant<int, 32>{});
    if (dim <= 64 || kMost == 64) return f(element, std::integral_constant<int, 64>{});
    f(element, std::integral_constant<int, kMost>{});
  };
  if (dtype == DType::bf16) return by_dim(bf16{});
  by_dim(f16{});
}

/// One kernel on `stream`, with kThreads threads per block.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    NATTEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cuda::launch(kernel, grid, kThreads, shared_bytes, stream, arguments...);
}

}  // namespace natten::cuda_portable
