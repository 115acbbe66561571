// SPDX-License-Identifier: MIT
// From run-time element types and sizes to instances of the "boxes" kernels.
#pragma once
#include <type_traits>

#include "core/element.h"
#include "cuda/portable/boxes.h"

namespace natten::cuda_portable {

/// Calls f(element, head dim bucket) with the types that a problem's kernel is compiled for.
template <class F>
void dispatch_kernel(const BoxesParams& p, F&& f) {
  const int dim = bucket(p.problem);
  const auto middle = [&](auto element) {
    if (dim == 64) return f(element, std::integral_constant<int, 64>{});
    return f(element, std::integral_constant<int, 128>{});
  };
  const auto by_dim = [&](auto element) {
    if (dim == 32) return f(element, std::integral_constant<int, 32>{});
    if (dim == 256) return f(element, std::integral_constant<int, 256>{});
    return middle(element);
  };
  if (p.problem.dtype == DType::f32) return middle(float{});
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

}  // namespace natten::cuda_portable
