// SPDX-License-Identifier: MIT
// From run-time element types and sizes to instances of the "window" kernels, and their launch.
#pragma once
#include <type_traits>

#include "core/element.h"
#include "cuda/launch.h"
#include "cuda/portable/window.h"

namespace natten::cuda_portable {

/// Calls f(element, channels); the host accepts only these.
template <class F>
void dispatch_window(DType dtype, int head_dim, F&& f) {
  const auto by_dim = [&](auto element) {
    if (channel_bucket(head_dim) == 32) return f(element, std::integral_constant<int, 32>{});
    f(element, std::integral_constant<int, 64>{});
  };
  if (dtype == DType::bf16) return by_dim(bf16{});
  by_dim(f16{});
}

inline void launch_window(void (*kernel)(WindowParams), const WindowParams& p, size_t shared_bytes, void* stream,
                          cuda::Start start = cuda::Start::after_previous) {
  cuda::launch(kernel, unsigned(p.grid), unsigned(p.threads()), shared_bytes, stream, start, p);
}

}  // namespace natten::cuda_portable
