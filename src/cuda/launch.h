// SPDX-License-Identifier: MIT
// Launching kernels. Every CUDA call of the engines goes through NATTEN_CUDA_CHECK.
#pragma once
#include <cuda_runtime.h>

#include <string>

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

/// Starts a kernel on a stream. Not `<<<>>>`: so kernels and launches are plain C++, and tests can run them on the CPU.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024)
    NATTEN_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  NATTEN_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace natten::cuda
