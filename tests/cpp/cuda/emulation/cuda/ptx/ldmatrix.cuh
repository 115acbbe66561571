// SPDX-License-Identifier: MIT
// src/cuda/ptx/ldmatrix.cuh on the emulated GPU.
#pragma once
#include <cuda_runtime.h>

namespace natten::ptx {

inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }

template <bool kTrans>
void emulated_ldmatrix(uint32_t (&r)[4], uint32_t address) {
  struct Lane {
    uint32_t address, r[4];
  } mine{address, {}};
  emulation::warp_barrier(&mine, [](void* const* lanes) {
    uint16_t m[4][8][8];
    for (int i = 0; i < 32; ++i)
      std::memcpy(m[i / 8][i % 8], emulation::shared(static_cast<Lane*>(lanes[i])->address, 16), 16);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int g = l / 4, t = l % 4;
        const uint16_t low = kTrans ? m[i][2 * t][g] : m[i][g][2 * t];
        const uint16_t high = kTrans ? m[i][2 * t + 1][g] : m[i][g][2 * t + 1];
        static_cast<Lane*>(lanes[l])->r[i] = low | uint32_t{high} << 16;
      }
  });
  for (int i = 0; i < 4; ++i) r[i] = mine.r[i];
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) { emulated_ldmatrix<false>(r, address); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) { emulated_ldmatrix<true>(r, address); }

template <class T>
T emulated_load(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
inline uint32_t load_shared_16(uint32_t address) { return emulated_load<uint16_t>(emulation::shared(address, 2)); }
inline uint32_t load_shared_32(uint32_t address) { return emulated_load<uint32_t>(emulation::shared(address, 4)); }
inline uint2 load_shared_64(uint32_t address) { return emulated_load<uint2>(emulation::shared(address, 8)); }
inline uint4 load_shared_128(uint32_t address) { return emulated_load<uint4>(emulation::shared(address, 16)); }
inline void store_shared_16(uint32_t address, uint32_t v) { std::memcpy(emulation::shared(address, 2), &v, 2); }
inline void store_shared_32(uint32_t address, uint32_t v) { std::memcpy(emulation::shared(address, 4), &v, 4); }
inline void store_shared_64(uint32_t address, uint32_t a, uint32_t b) {
  const uint32_t words[2] = {a, b};
  std::memcpy(emulation::shared(address, 8), words, 8);
}
inline void store_shared_128(uint32_t address, uint4 v) { std::memcpy(emulation::shared(address, 16), &v, 16); }

inline uint4 load_global_128(const void* p) {
  emulation::check_aligned(p, 16);
  return emulated_load<uint4>(p);
}
inline void store_global_128(void* p, uint4 v) {
  emulation::check_aligned(p, 16);
  std::memcpy(p, &v, 16);
}
inline float load_global_32(const float* p) { return *p; }
inline void store_global_32(float* p, float x) { *p = x; }
inline void store_global_64(void* p, uint32_t a, uint32_t b) {
  emulation::check_aligned(p, 8);
  const uint32_t words[2] = {a, b};
  std::memcpy(p, words, 8);
}

}  // namespace natten::ptx
