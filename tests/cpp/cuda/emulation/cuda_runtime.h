// SPDX-License-Identifier: MIT
// Stands in for CUDA's header of that name: kernels compile as plain C++ and run on this processor, one block of
// threads after the other, every thread a fiber (emulation.cpp). So their logic is tested where there is no GPU. What
// ptx/ does by one instruction is done in emulation/cuda/ptx; there, addresses and alignments are checked too.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

extern int num_launches;
/// Runs `kernel` once per thread of each block.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
[[noreturn]] void fail(const char* what);
/// Stops a thread until all of its block are there; returns how many have a true `value`.
int block_barrier(bool value);
/// Stops a thread until all of its warp are there; the last one calls `complete` on what every lane gave.
void warp_barrier(void* of_lane, void (*complete)(void* const* of_lanes));
/// Bytes of shared memory at that address, which must be a multiple of `bytes`.
unsigned char* shared(uint32_t address, uint32_t bytes);
uint32_t shared_address(const void* p);
/// As the instructions of that name; a copy happens at once or, if the emulation is told so, when it is waited for.
void cp_async(uint32_t to, const void* from, uint32_t bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int groups);
void check_aligned(const void* p, uint32_t bytes);

template <class T>
T exchange(T value, T (*combine)(const T* of_lanes, int lane, const int* arguments), int argument) {
  struct Lane {
    T value, result;
    T (*combine)(const T*, int, const int*);
    int argument;
  } mine{value, value, combine, argument};
  warp_barrier(&mine, [](void* const* lanes) {
    T values[32];
    int arguments[32];
    for (int i = 0; i < 32; ++i) values[i] = static_cast<Lane*>(lanes[i])->value;
    for (int i = 0; i < 32; ++i) arguments[i] = static_cast<Lane*>(lanes[i])->argument;
    for (int i = 0; i < 32; ++i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = lane.combine(values, i, arguments);
    }
  });
  return mine.result;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::exchange<T>(value, [](const T* v, int lane, const int* a) { return v[a[lane] & 31]; }, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange<T>(value, [](const T* v, int lane, const int* a) { return v[lane ^ a[lane]]; }, mask);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulation::exchange<unsigned>(
      value,
      [](const unsigned* v, int, const int*) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= v[i] << i;
        return bits;
      },
      0);
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
inline void __syncwarp() { __ballot_sync(~0u, true); }
inline void __syncthreads() { emulation::block_barrier(true); }
inline int __syncthreads_or(int value) { return emulation::block_barrier(value != 0) > 0; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t{a} * b >> 32); }
inline float __int_as_float(int x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
using std::isfinite;
using std::max;
using std::min;

// ---- the runtime ----
enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...), Arguments&&... arguments) {
  emulation::run_grid(c->gridDim, c->blockDim, c->dynamicSmemBytes, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}
