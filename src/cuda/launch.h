// SPDX-License-Identifier: MIT
// Launching kernels. Every CUDA call of the engines goes through NATTEN_CUDA_CHECK.
#pragma once
#include <cuda_runtime.h>

#include <string>

#include "cuda/device.h"
#include "natten/error.h"

namespace natten::cuda {

inline void check_cuda(cudaError_t status, const char* expression, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw Error(ErrorKind::cuda, std::string(expression) + " failed with " + cudaGetErrorName(status) + " (" +
                                   cudaGetErrorString(status) + ") in " + file + ":" + std::to_string(line));
}

}  // namespace natten::cuda

#define NATTEN_CUDA_CHECK(expression) ::natten::cuda::check_cuda((expression), #expression, __FILE__, __LINE__)

namespace natten::cuda {

/// May a kernel start while the one before it in its stream still runs?
enum class Start { after_previous, overlapping };

/// Starts a kernel on a stream. Not `<<<>>>`: so kernels and launches are plain C++, and tests can run them on the CPU.
/// An overlapping one calls ptx::wait_for_previous_kernel before it reads what that one wrote.
/// NOTE: on sm_90 alone. Newer GPUs run the code for sm_80, which cannot wait.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Start start,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    NATTEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  if (start == Start::overlapping && current_device()->major == 9) config.attrs = &overlap, config.numAttrs = 1;
  NATTEN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  launch(kernel, grid, block, shared_bytes, stream, Start::after_previous, arguments...);
}

}  // namespace natten::cuda
