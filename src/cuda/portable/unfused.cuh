// SPDX-License-Identifier: MIT
// Device side shared by the kernels of the unfused operators: octets, what they see, and the walk over the other side.
#pragma once
#include "cuda/portable/columns.cuh"
#include "cuda/portable/unfused.h"
#include "cuda/portable/window.cuh"

namespace natten::cuda_portable {

/// The two octets of a warp: rows g and g + 8 of its fragments.
struct Octets {
  Int3 first[2];   // of each octet, relative to the tile's origin; of one that exists
  int count[2];    // rows of the octet that exist; no second one without a first
  Int3 at[2];      // this lane's row of each, a position in the group; of one that exists
  bool exists[2];  // does it?

  __device__ __forceinline__ Octets(const UnfusedParams& p, const Item& item, int pair) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int y = 2 * pair + i, x = p.octets_y.split(y);
      const int z = p.octets_x.split(x);
      const int left = item.extent.x - item.origin.x - 8 * x;
      const bool inside = item.origin.z + z < item.extent.z && item.origin.y + y < item.extent.y;
      count[i] = inside ? detail::max(detail::min(8, left), 0) : 0;
      first[i] = count[i] > 0 || i == 0 ? Int3{z, y, 8 * x} : first[0];
      exists[i] = g < count[i];
      const Int3 row = sum(item.origin, Int3{first[i].z, first[i].y, first[i].x + g});
      at[i] = {detail::min(row.z, item.extent.z - 1), detail::min(row.y, item.extent.y - 1),
               detail::min(row.x, item.extent.x - 1)};
    }
  }
};

/// What is seen of the other side.
struct Sight {
  Int3 begin, size;              // the box of all rows of the tile
  Span z[2], y[2], x[2];         // of this lane's row of each octet, relative to the box; z and y: of the whole octet
  Span rows_z, rows_y, columns;  // of the warp's rows

  /// Of positions of the grid, in the tile's dilation group. `spans`: by fill_spans.
  __device__ __forceinline__ Sight(const UnfusedParams& p, const Item& item, const Octets& rows, const Span* spans) {
    const Int3 tile = p.boxes.tile;
    const Span *of_z = spans, *of_y = of_z + tile.z, *of_x = of_y + tile.y;
    begin = {of_z[0].begin, of_y[0].begin, of_x[0].begin};
    size = {of_z[tile.z - 1].end - begin.z, of_y[tile.y - 1].end - begin.y, of_x[tile.x - 1].end - begin.x};
    const auto relative = [](Span s, int origin) { return Span{s.begin - origin, s.end - origin}; };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      z[i] = relative(of_z[rows.first[i].z], begin.z), y[i] = relative(of_y[rows.first[i].y], begin.y);
      x[i] = relative(of_x[rows.at[i].x - item.origin.x], begin.x);
    }
    // Begins and ends of spans never decrease along an axis; a second octet is further only along one of them.
    rows_z = {z[0].begin, z[1].end}, rows_y = {y[0].begin, y[1].end};
    columns = {of_x[rows.first[0].x].begin - begin.x, of_x[rows.first[1].x + 7].end - begin.x};
  }
  /// Everybody sees everything: additional keys, or their queries.
  __device__ explicit Sight(Int3 all)
      : begin{0, 0, 0}, size(all), rows_z{0, all.z}, rows_y{0, all.y}, columns{0, all.x} {
#pragma unroll
    for (int i = 0; i < 2; ++i) z[i] = rows_z, y[i] = rows_y, x[i] = columns;
  }
};

/// Keys of shared memory: rows of the box (z and y flat) from `first_row` on, their columns `begin` .. `end`.
struct Chunk {
  int first_row, rows, begin, end, pitch;
};

template <int kHeadDim>
struct ChunkMap {
  static constexpr int kKeys = kHeadDim == 128 ? 128 : 256, kKeyBytes = kHeadDim * 2;
  static constexpr int kMostSpans = 2 + 8 * kOctets;                // z, y and x of a tile
  static constexpr uint32_t kSpans = (kKeys + kStep) * kKeyBytes;  // a step may read that far past a row's end
  static constexpr uint32_t kItem = kSpans + kMostSpans * sizeof(Span);
  static constexpr uint32_t kStaging = (kItem + sizeof(Item) + 15) / 16 * 16;
};

/// The warp's rows of a chunk, one after the other: visit(row of the chunk, its first token's elements).
template <class T, class Visit>
__device__ __forceinline__ void for_each_row(const Gather<T>& from, Int3 size, const Chunk& c, Visit&& visit) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, flat = c.first_row + warp, z = size.z == 1 ? 0 : flat / size.y;
  const int64_t step = kWarps * from.y, wrap = from.z - size.y * from.y;
  int y = flat - z * size.y;
  const T* at = from.at({z, y, c.begin});
#pragma unroll 1
  for (int row = warp; row < c.rows; row += kWarps) {
    visit(row, at);
    y += kWarps, at += step;
    for (; y >= size.y && size.z > 1; y -= size.y) at += wrap;
  }
}

/// Starts the loads of a chunk; `slice` is the first piece of 16 bytes of each row. Zeros where there is no key.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_chunk(uint32_t to, const Gather<T>& from, Int3 size, const Chunk& c, int slice) {
  constexpr int kPieces = kHeadDim / 8, kKeyBytes = kHeadDim * 2, kColumns = 32 / kPieces;
  const int lane = threadIdx.x % 32, piece = lane % kPieces, first = lane / kPieces, columns = c.end - c.begin;
  const int channel = (slice + piece) * 8, existing = channel < from.dim ? columns : 0;
  const int64_t of_lane = first * from.x + channel, step = kColumns * from.x;
  const auto swizzled_piece = [&](int column) { return (piece ^ chunk_swizzle<kHeadDim>(column)) << 4; };
  if (from.vector)
    for_each_row(from, size, c, [&](int row, const T* at) {
      uint32_t key_to = to + (row * c.pitch + first) * kKeyBytes;  // the pitch is a multiple of 8: see chunk_swizzle
      at += of_lane;
#pragma unroll 2
      for (int column = first; column < c.pitch; column += kColumns) {
        ptx::cp_async_16(key_to + swizzled_piece(column), column < existing ? at : from.base, column < existing);
        at += step, key_to += kColumns * kKeyBytes;
      }
    });
  else
    for_each_row(from, size, c, [&](int row, const T* at) {
      for (int column = first; column < c.pitch; column += kColumns) {
        uint4 words{0, 0, 0, 0};
        if (column < existing) words = load_elements(at + column * from.x, channel, from.dim);
        ptx::store_shared_128(to + (row * c.pitch + column) * kKeyBytes + swizzled_piece(column), words);
      }
    });
}

/// Zeros behind the last row of a chunk, where the last step may read: weights there are 0, but 0 * NaN is not.
template <int kKeyBytes>
__device__ __forceinline__ void clear_behind(uint32_t to, const Chunk& c) {
  to += c.rows * c.pitch * kKeyBytes;
  for (int i = threadIdx.x * 16; i < kStep * kKeyBytes; i += kThreads * 16)
    ptx::store_shared_128(to + i, uint4{0, 0, 0, 0});
}

/// One step's rows: body.start(z, y) for the first of each plane, then body.row(address of the row's first column of
/// this step, which octets see the row) for one after the other.
template <int kHeadDim, class Body>
__device__ __forceinline__ void walk_rows(const Sight& sight, const Chunk& c, uint32_t columns, Body& body) {
  const int first_z = sight.size.z == 1 ? 0 : c.first_row / sight.size.y, row_bytes = c.pitch * (kHeadDim * 2);
#pragma unroll 1
  for (int z = detail::max(first_z, sight.rows_z.begin); z < sight.rows_z.end; ++z) {
    const int before = z * sight.size.y - c.first_row;  // rows of the chunk before this plane
    const int begin = detail::max(sight.rows_y.begin, -before), end = detail::min(sight.rows_y.end, c.rows - before);
    if (c.rows <= before) break;
    if (begin >= end) continue;
    int from[2], count[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      from[i] = sight.y[i].begin, count[i] = sight.z[i].contains(z) ? sight.y[i].size() : 0;
    uint32_t address = columns + (before + begin) * row_bytes;
    body.start(z, begin);
#pragma unroll 1
    for (int y = begin; y < end; ++y, address += row_bytes) {
      const bool sees[2] = {unsigned(y - from[0]) < unsigned(count[0]), unsigned(y - from[1]) < unsigned(count[1])};
      body.row(address, sees);
    }
  }
}

/// All of the box, chunk by chunk, for the whole block of threads. body.columns(the step's first column, the end of what
/// is there, first column in the chunk) comes before the rows of a step.
template <class T, int kHeadDim, class Body>
__device__ __forceinline__ void walk(const Sight& sight, const Gather<T>& from, uint32_t shared, int slice,
                                     bool has_rows, Body& body) {
  const int pitch = detail::min((sight.size.x + 7) & ~7, kMostColumns), rows = ChunkMap<kHeadDim>::kKeys / pitch;
  const int all_rows = sight.size.z * sight.size.y;
#pragma unroll 1
  for (int column = 0; column < sight.size.x; column += pitch)
#pragma unroll 1
    for (int row = 0; row < all_rows; row += rows) {
      const Chunk c{row, detail::min(rows, all_rows - row), column, detail::min(column + pitch, sight.size.x), pitch};
      __syncthreads();  // nobody reads the chunk before
      load_chunk<T, kHeadDim>(shared, from, sight.size, c, slice);
      if (Body::kClearBehind) clear_behind<kHeadDim * 2>(shared, c);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (!has_rows) continue;
      const int end = detail::min(c.end, sight.columns.end);
#pragma unroll 1
      for (int first = detail::max(c.begin, sight.columns.begin); first < end; first += kStep) {
        body.columns(first, end, first - c.begin);
        walk_rows<kHeadDim>(sight, c, shared, body);
      }
    }
}

/// Where the attention tensor's rows of this warp stand, and their image in shared memory.
template <class T>
struct Slots {
  T* octet[2];         // of each octet's first row
  uint32_t staged[2];  // the same in shared memory; the distance of rows is `slots`
  int64_t pitch;       // of rows in the tensor
  int slots, count[2];

  __device__ Slots(const UnfusedParams& p, Int3 origin, const Octets& rows, T* base, uint32_t shared)
      : pitch(p.token_strides[2]), slots(p.slots) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Int3 at = sum(origin, rows.first[i]);
      octet[i] = base + (at.z * p.token_strides[0] + at.y * p.token_strides[1] + at.x * p.token_strides[2]);
      // Rows that follow each other are copied as one, in pieces that are aligned on both sides.
      const uint32_t skew = pitch == slots ? uint32_t(reinterpret_cast<uintptr_t>(octet[i])) & 14 : 0;
      staged[i] = shared + i * p.octet_bytes() + skew;
      count[i] = rows.count[i];
    }
  }

  /// Of this lane's row of octet i, the slot of the box's first position: in shared memory, and in the tensor.
  __device__ __forceinline__ uint32_t of_box(const UnfusedParams& p, const Sight& s, int i, int first_slot) const {
    return staged[i] + (int(threadIdx.x % 32 / 4) * slots + first_slot - before_window(p, s, i)) * 2;
  }
  __device__ __forceinline__ int64_t in_octet(const UnfusedParams& p, const Sight& s, int i, int first_slot) const {
    return threadIdx.x % 32 / 4 * pitch + (first_slot - before_window(p, s, i));
  }
  /// Slots between those of the box's first position and of the window's.
  __device__ static __forceinline__ int before_window(const UnfusedParams& p, const Sight& s, int i) {
    return s.z[i].begin * p.slot_strides[0] + s.y[i].begin * p.slot_strides[1] + s.x[i].begin;
  }

  /// This lane's share of the slots: piece(tensor, shared memory) for 8 of them, element(...) for one.
  template <class Piece, class Element>
  __device__ __forceinline__ void copy(Piece&& piece, Element&& element) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      T* tensor = i ? octet[1] : octet[0];
      const uint32_t shared = i ? staged[1] : staged[0];
      const int rows = i ? count[1] : count[0], all = rows * slots;
      if (pitch != slots) {
#pragma unroll 1
        for (int row = 0; row < rows; ++row)
#pragma unroll 1
          for (int n = lane; n < slots; n += 32) element(tensor + row * pitch + n, shared + (row * slots + n) * 2);
        continue;
      }
      const int head = detail::min(-int(shared / 2) & 7, all), tail = (all - head) & 7;
#pragma unroll 1
      for (int n = head + lane * 8; n < all - tail; n += 32 * 8) piece(tensor + n, shared + n * 2);
      if (lane < head) element(tensor + lane, shared + lane * 2);
      if (lane < tail) element(tensor + all - tail + lane, shared + (all - tail + lane) * 2);
    }
  }
  __device__ void load() const {
    copy([](const T* from, uint32_t to) { ptx::cp_async_16(to, from); },
         [](const T* from, uint32_t to) { ptx::store_shared_16(to, from->bits); });
  }
  __device__ void store() const {
    copy([](T* to, uint32_t from) { ptx::store_global_128(to, ptx::load_shared_128(from)); },
         [](T* to, uint32_t from) { to->bits = uint16_t(ptx::load_shared_16(from)); });
  }
};

/// Bits 2h + e of a lane's columns first + 8h + 2t + e (e: 0, 1) that a row sees.
__device__ __forceinline__ uint32_t column_bits(Span seen, int first, int end) {
  const int column = first + threadIdx.x % 4 * 2;
  uint32_t bits = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = column + 8 * h + e;
      bits |= uint32_t(seen.contains(at) && at < end) << (2 * h + e);
    }
  return bits;
}

/// The block's item and the spans of its coordinates, in shared memory: one warp finds them, and they need no registers.
/// Null if there is nothing to do.
template <int kHeadDim>
__device__ __forceinline__ const Item* begin_item(const UnfusedParams& p, unsigned char* smem) {
  Item* item = reinterpret_cast<Item*>(smem + ChunkMap<kHeadDim>::kItem);
  if (threadIdx.x == 0) *item = decode_item(p.boxes, blockIdx.x);
  __syncthreads();
  if (item->empty) return nullptr;
  fill_spans(reinterpret_cast<Span*>(smem + ChunkMap<kHeadDim>::kSpans), p.boxes, *item);
  __syncthreads();
  return item;
}

template <class T>
__device__ __forceinline__ T* weights_of(const UnfusedParams& p, const Item& item, int head) {
  const int64_t* s = p.weights.strides;
  return pointer<T>(p.weights) + item.batch * s[0] + head * s[4] + item.residue.z * s[1] + item.residue.y * s[2] +
         item.residue.x * s[3];
}

}  // namespace natten::cuda_portable
