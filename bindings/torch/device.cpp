// SPDX-License-Identifier: MIT
#include "device.h"

#include <dlfcn.h>

#include "natten/error.h"

namespace natten::binding {
namespace {

using torch::stable::Tensor;

// NOTE: this function lives in libtorch_cuda.so, which this library must not need. A CUDA tensor exists when somebody
// asks, so torch has loaded it by then.
void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0)
    throw Error(ErrorKind::cuda, "torch does not tell its current CUDA stream: libtorch_cuda.so lacks the function");
  return stream;
}

}  // namespace

DeviceScope::DeviceScope(const Tensor& tensor) : device_(tensor.device()) {
  static const int32_t cuda = aoti_torch_device_type_cuda();
  if (device_.type == cuda) TORCH_SUBSET_CALL(aoti_torch_create_device_guard(device_.index, &guard_));
}

DeviceScope::~DeviceScope() {
  if (guard_) aoti_torch_delete_device_guard(guard_);
}

Executor DeviceScope::stream_executor() const { return {1, {}, current_stream(device_.index)}; }

std::optional<Tensor> DeviceScope::allocate(size_t bytes) const {
  if (bytes == 0) return std::nullopt;
  const int64_t size = int64_t(bytes);
  return torch::stable::empty_strided_contiguous({&size, 1}, aoti_torch_dtype_uint8(), device_);
}

Tensor with_unit_last_stride(const Tensor& t) {
  const int64_t rank = t.dim();
  if (rank == 0 || t.strides()[rank - 1] == 1 || t.size(rank - 1) <= 1) return t;
  std::vector<int64_t> sizes(rank);
  for (int64_t d = 0; d < rank; ++d) sizes[d] = t.size(d);
  Tensor copy = torch::stable::new_empty(t, {sizes.data(), sizes.size()});
  TORCH_SUBSET_CALL(aoti_torch_copy_(copy.get(), t.get(), 0));
  return copy;
}

}  // namespace natten::binding
