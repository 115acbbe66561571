// SPDX-License-Identifier: MIT
// Device side shared by the kernels of the unfused operators: octets, what they see, and the walk over the other side.
#pragma once
#include "cuda/portable/columns.cuh"
#include "cuda/portable/unfused.h"
#include "cuda/portable/window.cuh"

namespace natten::cuda_portable {

/// The two octets of a warp: rows g and g + 8 of its fragments.
struct Octets {
  Int3 at[2];      // this lane's row of each, a position in the group; an existing one
  bool exists[2];  // does it?
  int count[2];    // rows of the octet that exist; 0 first for the second one

  __device__ Octets(const UnfusedParams& p, const Item& item, int pair) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int y = 2 * pair + i, x = p.octets_y.split(y);
      const int z = p.octets_x.split(x);
      at[i] = {item.origin.z + z, item.origin.y + y, item.origin.x + 8 * x};
      const bool inside = at[i].z < item.extent.z && at[i].y < item.extent.y && at[i].x < item.extent.x;
      count[i] = inside ? detail::min(8, item.extent.x - at[i].x) : 0;
      exists[i] = g < count[i];
      at[i].x += detail::min(g, detail::max(count[i] - 1, 0));
    }
    if (count[1] == 0) at[1] = at[0];
  }
};

/// What the position `at` of the tile's side sees; the division by a stride of 1 is not made.
__device__ __forceinline__ Span seen_by(Side side, const Axis& group, int at) {
  return side == Side::queries ? seen_from<false>(group, at) : seen_from<true>(group, at);
}

/// What is seen of the other side.
struct Sight {
  Int3 begin, size;              // the box of all rows of the tile
  Span z[2], y[2], x[2];         // of this lane's row of each octet, relative to the box; z and y: of the whole octet
  Span rows_z, rows_y, columns;  // of the warp's rows

  /// Of positions of the grid, in the tile's dilation group.
  __device__ Sight(const UnfusedParams& p, const Item& item, const Octets& rows) {
    const Side side = p.boxes.side;
    const auto of_tile = [&](int a) {
      const Axis& g = item.group[a];
      const int first = component(item.origin, a), last = detail::min(first + component(p.boxes.tile, a), g.extent) - 1;
      return Span{seen_by(side, g, first).begin, seen_by(side, g, last).end};
    };
    const Span box_z = of_tile(0), box_y = of_tile(1), box_x = of_tile(2);
    begin = {box_z.begin, box_y.begin, box_x.begin}, size = {box_z.size(), box_y.size(), box_x.size()};
    const auto relative = [](Span s, int origin) { return Span{s.begin - origin, s.end - origin}; };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      z[i] = relative(seen_by(side, item.group[0], rows.at[i].z), begin.z);
      y[i] = relative(seen_by(side, item.group[1], rows.at[i].y), begin.y);
      x[i] = relative(seen_by(side, item.group[2], rows.at[i].x), begin.x);
    }
    unite();
  }
  /// Everybody sees everything: additional keys, or their queries.
  __device__ explicit Sight(Int3 all)
      : begin{0, 0, 0}, size(all), rows_z{0, all.z}, rows_y{0, all.y}, columns{0, all.x} {
#pragma unroll
    for (int i = 0; i < 2; ++i) z[i] = rows_z, y[i] = rows_y, x[i] = columns;
  }

 private:
  // Begins and ends of spans never decrease along an axis, nor from the first octet to the second.
  __device__ void unite() {
    rows_z = {z[0].begin, detail::max(z[0].end, z[1].end)}, rows_y = {y[0].begin, detail::max(y[0].end, y[1].end)};
    rows_z.begin = detail::min(rows_z.begin, z[1].begin), rows_y.begin = detail::min(rows_y.begin, y[1].begin);
    columns = {detail::min(__shfl_sync(~0u, x[0].begin, 0), __shfl_sync(~0u, x[1].begin, 0)),
               detail::max(__shfl_sync(~0u, x[0].end, 31), __shfl_sync(~0u, x[1].end, 31))};
  }
};

/// Keys of shared memory: rows of the box (z and y flat) from `first_row` on, their columns `begin` .. `end`.
struct Chunk {
  int first_row, rows, begin, end, pitch;
};

template <int kHeadDim>
struct ChunkMap {
  static constexpr int kKeys = kHeadDim == 128 ? 128 : 256, kKeyBytes = kHeadDim * 2;
  static constexpr uint32_t kStaging = (kKeys + kStep) * kKeyBytes;  // a step may read that far past a row's end
};

/// Starts the loads of a chunk; `slice` is the first chunk of 16 bytes of each row. Zeros where there is no key.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_chunk(uint32_t to, const Gather<T>& from, Int3 size, const Chunk& c, int slice) {
  constexpr int kPieces = kHeadDim / 8, kKeyBytes = kHeadDim * 2;
  const int lane = threadIdx.x % 32, piece = lane % kPieces;
  for (int row = threadIdx.x / 32; row < c.rows; row += kThreads / 32) {
    const int flat = c.first_row + row, z = size.z == 1 ? 0 : flat / size.y, y = flat - z * size.y;
    const Gather<T> keys{from.at({z, y, c.begin}), 0, 0, from.x, from.dim, from.vector};
#pragma unroll 1
    for (int column = lane / kPieces; column < c.pitch; column += 32 / kPieces) {
      const int key = row * c.pitch + column;
      load_chunk(to + key * kKeyBytes + ((piece ^ chunk_swizzle<kHeadDim>(key)) << 4), keys, Int3{0, 0, column},
                 slice + piece, c.begin + column < c.end);
    }
  }
  const uint32_t end = to + c.rows * c.pitch * kKeyBytes;
  for (int i = threadIdx.x * 16; i < kStep * kKeyBytes; i += kThreads * 16)
    ptx::store_shared_128(end + i, uint4{0, 0, 0, 0});
}

/// One step's rows: calls body.row(z, y, address of the row's first column of this step, which octets see it).
template <int kHeadDim, class Body>
__device__ __forceinline__ void walk_rows(const Sight& sight, const Chunk& c, uint32_t columns, Body& body) {
  const int first_z = sight.size.z == 1 ? 0 : c.first_row / sight.size.y;
#pragma unroll 1
  for (int z = detail::max(first_z, sight.rows_z.begin); z < sight.rows_z.end; ++z) {
    const int before = z * sight.size.y - c.first_row;  // rows of the chunk before this plane
    const int begin = detail::max(sight.rows_y.begin, -before), end = detail::min(sight.rows_y.end, c.rows - before);
    if (c.rows <= before) break;
    const bool in_z[2] = {sight.z[0].contains(z), sight.z[1].contains(z)};
#pragma unroll 1
    for (int y = begin; y < end; ++y) {
      const bool sees[2] = {in_z[0] && sight.y[0].contains(y), in_z[1] && sight.y[1].contains(y)};
      body.row(z, y, columns + (before + y) * c.pitch * (kHeadDim * 2), sees);
    }
  }
}

/// All of the box, chunk by chunk, for the whole block of threads. body.columns(step's first column, end of what is
/// there) comes before the rows of a step.
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

  __device__ Slots(const UnfusedParams& p, const Octets& rows, T* base, uint32_t shared)
      : pitch(p.token_strides[2]), slots(p.slots) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Int3 at = rows.at[i];
      const int first = __shfl_sync(~0u, at.x, 0);
      octet[i] = base + (at.z * p.token_strides[0] + at.y * p.token_strides[1] + first * p.token_strides[2]);
      // Rows that follow each other are copied as one, in pieces that are aligned on both sides.
      const uint32_t skew = pitch == slots ? uint32_t(reinterpret_cast<uintptr_t>(octet[i])) & 14 : 0;
      staged[i] = shared + i * p.octet_bytes() + skew;
      count[i] = rows.count[i];
    }
  }

  /// Elements of a row that follow each other in the tensor: copy(element of the octet's staged rows, their number)
  /// for each of this lane's pieces; whole pieces have 8.
  template <class Piece, class Element>
  __device__ __forceinline__ void copy(Piece&& piece, Element&& element) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      if (pitch != slots) {
        for (int row = 0; row < count[i]; ++row)
          for (int n = lane; n < slots; n += 32)
            element(octet[i] + row * pitch + n, staged[i] + (row * slots + n) * 2);
        continue;
      }
      const int all = count[i] * slots, skew = int(staged[i] & 14) / 2;
      for (int n = lane * 8 - skew; n < all; n += 32 * 8) {
        if (n >= 0 && n + 8 <= all) {
          piece(octet[i] + n, staged[i] + n * 2);
          continue;
        }
        for (int e = detail::max(n, 0); e < detail::min(n + 8, all); ++e) element(octet[i] + e, staged[i] + e * 2);
      }
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

template <class T>
__device__ __forceinline__ T* weights_of(const UnfusedParams& p, const Item& item, int head) {
  const int64_t* s = p.weights.strides;
  return pointer<T>(p.weights) + item.batch * s[0] + head * s[4] + item.residue.z * s[1] + item.residue.y * s[2] +
         item.residue.x * s[3];
}

}  // namespace natten::cuda_portable
