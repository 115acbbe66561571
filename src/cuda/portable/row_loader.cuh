// SPDX-License-Identifier: MIT
// Loads of key rows (or query rows) of a unit's box to shared memory, for the "window" kernels.
//
// A thread keeps one chunk of 16 bytes of one column (two columns, if there are 64 channels) and walks down the rows,
// so that a load costs a minimum and a multiplication. Columns and rows past the box repeat its last ones: always
// finite where the tensor is, and no predicates. Threads whose channels do not exist load nothing.
#pragma once
#include "cuda/portable/window.cuh"

namespace natten::cuda_portable {

/// Bytes from the first key of a unit's box to a column of it, and from row to row.
struct BoxStrides {
  int row, column;

  __device__ __forceinline__ BoxStrides(const WindowParams& p, const Plane& t)
      : row(p.y.dilation * t.y * 2), column(p.x.dilation * t.x * 2) {}
};

/// Two tensors' rows. kRing: slots are rows modulo those that there are.
template <int kHeadDim, bool kRing>
class RowLoader {
  static constexpr int kChunks = kHeadDim / 8, kKeyBytes = kHeadDim * 2, kColumns = kHeadDim / 32;

 public:
  RowLoader() = default;
  /// `a`, `b`: of the unit's sample and head. `part`: of a row, where one pass of the threads is not enough for it.
  template <class T>
  __device__ __forceinline__ RowLoader(const WindowParams& p, const Place& at, const Unit& u, const Plane& plane_a,
                                       const T* a, const Plane& plane_b, const T* b, uint32_t to_a, uint32_t to_b,
                                       int part = 0) {
    int index = at.thread;
    next_ = p.row_parts > 1 ? 0 : p.by_row_threads.split(index);
    index += part * at.threads;
    const int chunk = index % kChunks, key = index / kChunks, width = p.tiling.pitch / kColumns;
    if (next_ >= p.rows_at_once || key >= width || chunk * 8 >= p.head_dim) next_ = 1 << 30;  // nothing to load
    last_ = u.box_y.size() - 1;
    const BoxStrides s_a(p, plane_a), s_b(p, plane_b);
    const int column = detail::min(key, u.box_x.size() - 1);
    const auto start = [&](const T* plane, const Plane& t, const BoxStrides& s) {
      const void* first = plane + u.offset(t, p, u.box_y.begin, u.box_x.begin);
      return ptx::opaque(static_cast<const char*>(first) + column * s.column + chunk * 16);
    };
    from_a_ = start(a, plane_a, s_a), from_b_ = start(b, plane_b, s_b);
    const auto place = [&](int k) { return k * kKeyBytes + ((chunk ^ chunk_swizzle<kHeadDim>(k)) << 4); };
    slot_ = next_ * p.tiling.pitch * kKeyBytes, to_a_ = to_a + place(key), to_b_ = to_b + place(key);
    if (kColumns == 1) return;
    const int more = detail::min(key + width, u.box_x.size() - 1) - column;
    more_a_ = more * s_a.column, more_b_ = more * s_b.column, more_to_ = place(key + width) - place(key);
  }

  /// Every row before `end` that is not there yet.
  __device__ __forceinline__ void load(const WindowParams& p, const Plane& a, const Plane& b, int end) {
    const uint32_t row_a = BoxStrides(p, a).row, row_b = BoxStrides(p, b).row;
    const uint32_t row_bytes = p.tiling.pitch * kKeyBytes, ring_bytes = p.tiling.rows * row_bytes;
    for (; next_ < end; next_ += p.rows_at_once) {
      const uint32_t row = detail::min(next_, last_);
      const char *from_a = ptx::offset(from_a_, row, row_a), *from_b = ptx::offset(from_b_, row, row_b);
      ptx::cp_async_16(slot_ + to_a_, from_a), ptx::cp_async_16(slot_ + to_b_, from_b);
      if (kColumns == 2) {
        ptx::cp_async_16(slot_ + to_a_ + more_to_, from_a + more_a_);
        ptx::cp_async_16(slot_ + to_b_ + more_to_, from_b + more_b_);
      }
      slot_ += p.rows_at_once * row_bytes;
      if (kRing) slot_ = min(slot_, slot_ - ring_bytes);  // unsigned: the difference of a smaller one is huge
    }
  }

 private:
  const char *from_a_ = nullptr, *from_b_ = nullptr;  // this thread's chunk of row 0
  uint32_t to_a_ = 0, to_b_ = 0, slot_ = 0;           // where it goes in slot 0, and bytes to the slot of the next row
  int next_ = 0, last_ = 0;                           // the next row of this thread, and the last one of the box
  int more_a_ = 0, more_b_ = 0, more_to_ = 0;         // bytes from the first to the second column
};

/// Zeros for the channels that do not exist, of all rows of two tensors.
template <int kHeadDim>
__device__ __forceinline__ void clear_missing_channels(const WindowParams& p, const Place& at, uint32_t a, uint32_t b) {
  if (p.head_dim == kHeadDim) return;
#pragma unroll 1
  for (int key = at.thread; key < p.tiling.rows * p.tiling.pitch; key += at.threads)
#pragma unroll 1
    for (int chunk = p.head_dim / 8; chunk < kHeadDim / 8; ++chunk) {
      const uint32_t to = key * (kHeadDim * 2) + ((chunk ^ chunk_swizzle<kHeadDim>(key)) << 4);
      ptx::store_shared_128(a + to, uint4{0, 0, 0, 0}), ptx::store_shared_128(b + to, uint4{0, 0, 0, 0});
    }
}

/// A unit's whole box.
template <int kHeadDim, class T>
__device__ __forceinline__ void load_box(const WindowParams& p, const Place& at, const Unit& u, const Plane& plane_a,
                                         const T* a, const Plane& plane_b, const T* b, uint32_t to_a, uint32_t to_b) {
#pragma unroll 1
  for (int part = 0; part < p.row_parts; ++part) {
    RowLoader<kHeadDim, false> loader(p, at, u, plane_a, a, plane_b, b, to_a, to_b, part);
    loader.load(p, plane_a, plane_b, p.tiling.rows);
  }
  clear_missing_channels<kHeadDim>(p, at, to_a, to_b);
}

}  // namespace natten::cuda_portable
