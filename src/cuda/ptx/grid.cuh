// SPDX-License-Identifier: MIT
// Programmatic dependent launch: a kernel that was started as overlapping begins while the one before it in its stream
// runs out of blocks. Nothing in code for GPUs before sm_90. No logic.
#pragma once

namespace natten::ptx {

/// Until the kernel before has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// As far as this block goes, the kernel behind may start.
__device__ __forceinline__ void let_next_kernel_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace natten::ptx
