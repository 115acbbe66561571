// SPDX-License-Identifier: MIT
// Every CUDA call of the engines goes through NATTEN_CUDA_CHECK; after a launch it is given cudaGetLastError().
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
