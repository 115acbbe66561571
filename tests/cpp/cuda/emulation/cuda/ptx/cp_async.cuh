// SPDX-License-Identifier: MIT
// src/cuda/ptx/cp_async.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

namespace natten::ptx {

inline void cp_async_16(uint32_t to, const void* from) { emulation::cp_async(to, from, 16, true); }
inline void cp_async_16(uint32_t to, const void* from, bool valid) { emulation::cp_async(to, from, 16, valid); }
inline void cp_async_8(uint32_t to, const void* from, bool valid) { emulation::cp_async(to, from, 8, valid); }
inline void cp_async_commit() { emulation::cp_async_commit(); }
template <int kGroups>
void cp_async_wait() {
  emulation::cp_async_wait(kGroups);
}

}  // namespace natten::ptx
