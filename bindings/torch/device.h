// SPDX-License-Identifier: MIT
// Where a call runs. For CUDA tensors: their device, torch's current stream on it, memory from torch's allocator, which
// knows streams and graph capture. For CPU tensors there is nothing to do.
#pragma once
#include <cstddef>
#include <optional>

#include "natten/attention.h"
#include "torch_stable.h"

namespace natten::binding {

/// While it lives, the device of `tensor` is the current one.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;

  bool is_cuda() const { return guard_ != nullptr; }
  DeviceKind kind() const { return is_cuda() ? DeviceKind::cuda : DeviceKind::cpu; }
  /// torch's current stream; CUDA tensors only.
  Executor stream_executor() const;
  /// Uninitialised, on the device; none for 0 bytes. It may be freed as soon as its last kernel has been launched.
  std::optional<torch::stable::Tensor> allocate(size_t bytes) const;

 private:
  torch::stable::Device device_;
  DeviceGuardHandle guard_ = nullptr;
};

/// `t`, or a contiguous copy if its last stride is not 1 (the gradient of a sum, a permuted head_dim).
torch::stable::Tensor with_unit_last_stride(const torch::stable::Tensor& t);

}  // namespace natten::binding
