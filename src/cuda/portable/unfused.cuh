// SPDX-License-Identifier: MIT
// Device side shared by the kernels of the unfused operators: octets, what they see, and the walk over the other side.
#pragma once
#include "cuda/portable/columns.cuh"
#include "cuda/portable/unfused.h"
#include "cuda/portable/window.cuh"

namespace natten::cuda_portable {

constexpr int kWarps = kThreads / 32;

/// The box of positions that a tile sees, and how many of its columns come at a time.
struct Field {
  Int3 begin, size;
  int columns;

  __device__ __forceinline__ Field(Int3 from, Int3 extent)
      : begin(from), size(extent), columns(detail::max(detail::min((extent.x + 7) & ~7, kMostColumns), 8)) {}
};

/// Rows of the field in shared memory, from `first_row` on, their columns `begin` .. `end`.
struct Chunk {
  int first_row, rows, begin, end, pitch;
};

// ---- what all warps of a block share ----

/// Rows of a tensor that belong to one sample, head and dilation group, by position in the group. As Gather, but with
/// strides of 32 bits, which take a quarter of the instructions; the host asks whether they suffice.
template <class T>
struct Tokens {
  T* base;
  int z, y, x;
  int dim;
  bool vector;

  __device__ __forceinline__ T* at(Int3 p) const {
    return base + (int64_t{p.z} * z + int64_t{p.y} * y + int64_t{p.x} * x);
  }
};

/// Up to 8 neighbours along the last axis: rows of the tile that see the same planes and rows of the field.
template <class T>
struct Octet {
  T* row;        // first token of the tile's side
  T* weights;    // its slots, if that is the side of queries
  Span z, y, x;  // seen of the field, of x by any of the tokens
  Int3 at;       // position in the group of the first token
  int count;     // tokens that exist; without any, all else is of tokens that do
  int first_span;
};

template <class T>
struct Block {
  Item item;
  Tokens<T> queries, keys, extra, weights;  // of the item's head or, in `queries` and `weights`, the first of its heads
  Field field;                              // of the grid
  Octet<T> octets[kMostOctets];             // two by two, of pairs

  /// The tensor whose rows are the tile's.
  __device__ __forceinline__ const Tokens<T>& side(Side side) const {
    return side == Side::queries ? queries : side == Side::keys ? keys : extra;
  }
};

/// The two octets of a warp: rows g and g + 8 of its fragments. They are neighbours along one axis.
template <class T>
struct Octets {
  const Octet<T>* of;
  int count[2];     // none of the second octet without the first one
  int in_octet[2];  // of this lane's row; one that exists
  bool exists[2];   // does it?

  __device__ __forceinline__ Octets(const Block<T>& block, int pair) : of(block.octets + 2 * pair) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      count[i] = of[i].count, exists[i] = g < count[i];
      in_octet[i] = exists[i] ? g : 0;
    }
  }
  __device__ __forceinline__ Int3 at(int i) const { return {of[i].at.z, of[i].at.y, of[i].at.x + in_octet[i]}; }
  __device__ __forceinline__ T* row(int i, int stride) const { return of[i].row + int64_t{in_octet[i]} * stride; }
};

/// What is seen of a field by a warp, relative to it.
struct Sight {
  Span z[2], y[2], x[2];         // of this lane's row of each octet; z and y: of the whole octet
  Span rows_z, rows_y, columns;  // of all rows

  /// `spans`: by fill_spans.
  template <class T>
  __device__ __forceinline__ Sight(const Octets<T>& rows, const Span* spans, int first_column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Span of_lane = spans[rows.of[i].first_span + int(threadIdx.x % 32 / 4)];
      z[i] = rows.of[i].z, y[i] = rows.of[i].y;
      x[i] = {of_lane.begin - first_column, of_lane.end - first_column};
    }
    // Begins and ends of spans never decrease along an axis; a second octet is further only along one of them.
    rows_z = {z[0].begin, z[1].end}, rows_y = {y[0].begin, y[1].end};
    columns = {rows.of[0].x.begin, rows.of[1].x.end};
  }
  /// Everybody sees everything: additional keys, or their queries.
  __device__ explicit Sight(Int3 all) : rows_z{0, all.z}, rows_y{0, all.y}, columns{0, all.x} {
#pragma unroll
    for (int i = 0; i < 2; ++i) z[i] = rows_z, y[i] = rows_y, x[i] = columns;
  }
};

/// Shared memory: Block, spans, keys, slots of each warp. Keys begin at a multiple of the longest: see load_key.
template <class T, int kHeadDim>
struct Map {
  static constexpr int kKeyBytes = kHeadDim * 2;
  static constexpr int kMostSpans = 8 * kMostOctetsX + 1 + kMostOctets;  // z, y and x of a tile
  static constexpr uint32_t kSpans = (sizeof(Block<T>) + 15) / 16 * 16;
  static constexpr uint32_t kKeys = (kSpans + kMostSpans * sizeof(Span) + 255) / 256 * 256;

  /// A step may read that far past a row's end.
  NATTEN_HD static uint32_t slots(const UnfusedParams& p, int warp) {
    return kKeys + (p.chunk_keys + kStep) * kKeyBytes + warp * p.staged_bytes();
  }
  static size_t bytes(const UnfusedParams& p) { return slots(p, kWarps); }
};

template <class T>
__device__ __forceinline__ Tokens<T> tokens(const UnfusedParams& p, const Rows& rows, const Item& item, int head,
                                            bool plain) {
  const Gather<T> from = plain ? gather_plain<T>(p.boxes, rows, item, head, {0, 0, 0})
                               : gather_group<T>(p.boxes, rows, item, head, {0, 0, 0});
  return {from.base, int(from.z), int(from.y), int(from.x), from.dim, from.vector};
}

/// Octet `i` of a pair.
template <class T>
__device__ __forceinline__ void fill_octet(Octet<T>& octet, const UnfusedParams& p, const Block<T>& block,
                                           const Item& item, const Field& field, const Span* spans, int pair, int i) {
  int y = pair, x = p.pairs_y.split(y);
  const int z = p.pairs_x.split(x);
  const Int3 extent = item.extent, origin = item.origin, tile = p.boxes.tile;
  const Int3 first{z * p.pair.z, y * p.pair.y, x * p.pair.x};
  const Int3 second{first.z + p.pair.z - 1, first.y + p.pair.y - 1, first.x + p.pair.x - 8};
  const auto count = [&](Int3 at) {
    const int left = origin.z + at.z < extent.z && origin.y + at.y < extent.y ? extent.x - origin.x - at.x : 0;
    return detail::max(detail::min(left, 8), 0);
  };
  octet.count = count(i ? second : first);
  const Int3 in_tile = octet.count > 0 ? (i ? second : first) : count(first) > 0 ? first : Int3{0, 0, 0};
  octet.at = sum(origin, in_tile);
  octet.row = block.side(p.boxes.side).at(octet.at), octet.weights = block.weights.at(octet.at);
  const auto relative = [](int begin, int end, int to) { return Span{begin - to, end - to}; };
  octet.first_span = tile.z + tile.y + in_tile.x;
  const Span of_z = spans[in_tile.z], of_y = spans[tile.z + in_tile.y];
  octet.z = relative(of_z.begin, of_z.end, field.begin.z), octet.y = relative(of_y.begin, of_y.end, field.begin.y);
  octet.x = relative(spans[octet.first_span].begin, spans[octet.first_span + 7].end, field.begin.x);
}

/// Fills spans and Block; the result is the grid's field. Every warp decodes the item, and each looks for one tensor.
template <class T>
__device__ __forceinline__ Field begin_block(const UnfusedParams& p, Block<T>& block, Span* spans) {
  const BoxesParams& b = p.boxes;
  const Item item = decode_item(b, blockIdx.x);
  fill_spans(spans, b, item);
  const bool queries = b.side == Side::queries, plain = b.side == Side::extra_keys;
  const int head = queries ? item.head : item.head * int(p.heads_per_kv.divisor);
  const int head_kv = queries ? p.heads_per_kv.quotient(item.head) : item.head;
  const int thread = threadIdx.x;
  if (thread == 0) block.item = item;
  if (thread == 0 && b.problem.extra_keys > 0) block.extra = tokens<T>(p, b.extra_k, item, head_kv, true);
  if (thread == 32) block.queries = tokens<T>(p, b.q, item, head, plain);
  if (thread == 64) block.keys = tokens<T>(p, b.k, item, head_kv, false);
  if (thread == 96) block.weights = tokens<T>(p, Rows{p.weights, p.slots, false}, item, head, plain);
  __syncthreads();
  const Span *of_z = spans, *of_y = of_z + b.tile.z, *of_x = of_y + b.tile.y;
  const Int3 begin{of_z[0].begin, of_y[0].begin, of_x[0].begin};
  const Int3 size{of_z[b.tile.z - 1].end - begin.z, of_y[b.tile.y - 1].end - begin.y, of_x[b.tile.x - 1].end - begin.x};
  const Field field(begin, size);
  if (thread == 0) block.field = field;
  const int warp = thread / 32, lane = thread % 32, pair = warp + lane / 2 * kWarps;  // each warp fills its own octets
  if (pair < p.num_pairs) fill_octet(block.octets[2 * pair + lane % 2], p, block, item, field, spans, pair, lane % 2);
  __syncwarp();
  if (!p.staged) __syncthreads();  // others have barriers of their own before they ask for the field
  return field;
}

// ---- chunks ----

/// The warp's rows of a chunk, one after the other: visit(row of the chunk, its first token's elements).
template <class T, class Visit>
__device__ __forceinline__ void for_each_row(const Tokens<T>& from, const Field& f, const Chunk& c, Visit&& visit) {
  const Int3 size = f.size;
  const int warp = threadIdx.x / 32, flat = c.first_row + warp, z = size.z == 1 ? 0 : flat / size.y;
  const int64_t step = int64_t{kWarps} * from.y, wrap = from.z - int64_t{size.y} * from.y;
  int y = flat - z * size.y;
  const T* at = from.at(sum(f.begin, {z, y, c.begin}));
#pragma unroll 1
  for (int row = warp; row < c.rows; row += kWarps) {
    visit(row, at);
    y += kWarps, at += step;
    for (; y >= size.y && size.z > 1; y -= size.y) at += wrap;
  }
}

/// Starts the loads of a chunk; `slice` is the first piece of 16 bytes of each row. Zeros where there is no key.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_chunk(uint32_t to, const Tokens<T>& from, const Field& f, const Chunk& c,
                                           int slice) {
  constexpr int kPieces = kHeadDim / 8, kKeyBytes = kHeadDim * 2, kColumns = 32 / kPieces;
  const int lane = threadIdx.x % 32, piece = lane % kPieces, first = lane / kPieces, columns = c.end - c.begin;
  const int channel = (slice + piece) * 8, existing = channel < from.dim ? columns : 0;
  const int64_t of_lane = int64_t{first} * from.x + channel, step = int64_t{kColumns} * from.x;
  const auto swizzled_piece = [&](int column) { return (piece ^ chunk_swizzle<kHeadDim>(column)) << 4; };
  if (from.vector)
    for_each_row(from, f, c, [&](int row, const T* at) {
      uint32_t key_to = to + (row * c.pitch + first) * kKeyBytes;  // the pitch is a multiple of 8: see chunk_swizzle
      at += of_lane;
#pragma unroll 1
      for (int column = first; column < c.pitch; column += kColumns) {
        // NOTE: with head_dim 32 the permutation is the same in all columns of a lane.
        ptx::cp_async_16(key_to + swizzled_piece(kHeadDim == 32 ? first : column), at, column < existing);
        at += step, key_to += kColumns * kKeyBytes;
      }
    });
  else
    for_each_row(from, f, c, [&](int row, const T* at) {
      for (int column = first; column < c.pitch; column += kColumns) {
        uint4 words{0, 0, 0, 0};
        if (column < existing) words = load_elements(at + int64_t{column} * from.x, channel, from.dim);
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

/// Starts the loads of a whole field; `slice` as above. Columns behind it repeat its last one: they are not seen.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_field(uint32_t to, const Tokens<T> from, const Field& f, int slice) {
  constexpr int kPieces = kHeadDim / 8, kKeyBytes = kHeadDim * 2, kColumns = 32 / kPieces;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, piece = lane % kPieces, channel = (slice + piece) * 8;
  const int64_t step = int64_t{kWarps} * from.y;
  const auto load = [&](auto&& visit) {
#pragma unroll 1
    for (int z = 0; z < f.size.z; ++z)
#pragma unroll 1
      for (int column = lane / kPieces; column < f.columns; column += kColumns) {
        const T* at = from.at(sum(f.begin, {z, warp, detail::min(column, f.size.x - 1)}));
        uint32_t key_to = to + ((z * f.size.y + warp) * f.columns + column) * kKeyBytes;
        key_to += (piece ^ chunk_swizzle<kHeadDim>(column)) << 4;
#pragma unroll 4
        for (int y = warp; y < f.size.y; y += kWarps, at += step, key_to += kWarps * f.columns * kKeyBytes)
          visit(key_to, at);
      }
  };
  if (from.vector && channel < from.dim)
    load([&](uint32_t key_to, const T* at) { ptx::cp_async_16(key_to, at + channel); });
  else
    load([&](uint32_t key_to, const T* at) { ptx::store_shared_128(key_to, load_elements(at, channel, from.dim)); });
}

/// One step's rows, Body::kRows at a time: body.start(z, y) for the first of each plane, then body.rows(addresses in
/// them, which octets see them). `columns`: address of the step in the chunk's first row.
template <int kHeadDim, class Body>
__device__ __forceinline__ void walk_rows(const Sight& sight, const Field& f, const Chunk& c, uint32_t columns,
                                          Body& body) {
  constexpr int kRows = Body::kRows;
  const int height = f.size.y, row_bytes = c.pitch * (kHeadDim * 2);
  const int first_z = f.size.z == 1 ? 0 : c.first_row / height;
#pragma unroll 1
  for (int z = detail::max(first_z, sight.rows_z.begin); z < sight.rows_z.end; ++z) {
    const int before = z * height - c.first_row;  // rows of the chunk before this plane
    const int begin = detail::max(sight.rows_y.begin, -before), end = detail::min(sight.rows_y.end, c.rows - before);
    if (begin >= end) continue;
    // The first octet sees the first rows, up to there, the second one the last rows, from there on.
    const int seen_end = sight.z[0].contains(z) ? detail::min(sight.y[0].end, end) : begin;
    const int seen_begin = sight.z[1].contains(z) ? sight.y[1].begin : end;
    uint32_t next = columns + (before + begin) * row_bytes;
    body.start(z, begin);
#pragma unroll 1
    for (int y = begin; y < end; y += kRows) {
      uint32_t address[kRows];
      bool sees[kRows][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool is_row = r == 0 || y + r < end;  // otherwise once more the last one
        address[r] = is_row ? next : next - row_bytes, next += row_bytes;
        sees[r][0] = y + r < seen_end, sees[r][1] = is_row && y + r >= seen_begin;
      }
      body.rows(address, sees);
    }
  }
}

/// A chunk's steps for this warp. body.columns(the step's first column, the end of what is there, first column in the
/// chunk) comes before the rows of a step and gives the offset of what this lane reads of them.
template <int kHeadDim, class Body>
__device__ __forceinline__ void walk_chunk(const Sight& sight, const Field& f, const Chunk& c, uint32_t shared,
                                           Body& body) {
  const int end = detail::min(c.end, sight.columns.end);
#pragma unroll 1
  for (int first = detail::max(c.begin, sight.columns.begin); first < end; first += kStep) {
    const uint32_t of_lane = body.columns(first, end, first - c.begin);
    walk_rows<kHeadDim>(sight, f, c, shared + of_lane, body);
  }
}

__device__ __forceinline__ Chunk whole(const Field& f) { return {0, f.size.z * f.size.y, 0, f.size.x, f.columns}; }

/// All of the field, chunk by chunk of up to `keys` positions, for the whole block of threads.
template <class T, int kHeadDim, class Body>
__device__ __forceinline__ void walk(int keys, const Field& f, const Sight& sight, const Tokens<T>& from,
                                     uint32_t shared, int slice, bool has_rows, Body& body) {
  const int all_rows = f.size.z * f.size.y, rows = keys / f.columns;
#pragma unroll 1
  for (int column = 0; column < f.size.x; column += f.columns)
#pragma unroll 1
    for (int row = 0; row < all_rows; row += rows) {
      const Chunk c{row, detail::min(rows, all_rows - row), column, detail::min(column + f.columns, f.size.x),
                    f.columns};
      __syncthreads();  // nobody reads the chunk before
      load_chunk<T, kHeadDim>(shared, from, f, c, slice);
      if (Body::kClearBehind) clear_behind<kHeadDim * 2>(shared, c);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (has_rows) walk_chunk<kHeadDim>(sight, f, c, shared, body);
    }
}

// ---- slots ----

/// Where the attention tensor's rows of this warp stand, and their image in shared memory.
template <class T>
struct Slots {
  T* octet[2];         // of each octet's first row
  uint32_t staged[2];  // the same in shared memory; the distance of rows is `slots`
  int pitch;           // of rows in the tensor
  int slots, count[2];

  __device__ __forceinline__ Slots(const UnfusedParams& p, const Block<T>& block, const Octets<T>& rows,
                                   uint32_t shared)
      : pitch(block.weights.x), slots(p.slots) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      octet[i] = rows.of[i].weights;
      // Rows that follow each other are copied as one, in pieces that are aligned on both sides.
      const uint32_t skew = pitch == slots ? uint32_t(reinterpret_cast<uintptr_t>(octet[i])) & 14 : 0;
      staged[i] = shared + i * p.octet_bytes() + skew;
      count[i] = rows.count[i];
    }
  }

  /// Of this lane's row of octet i, the slot of the field's first position: in shared memory, and in the tensor.
  __device__ __forceinline__ uint32_t of_field(const UnfusedParams& p, const Sight& s, int i) const {
    return staged[i] + (int(threadIdx.x % 32 / 4) * slots - before_window(p, s, i)) * 2;
  }
  __device__ __forceinline__ int64_t in_octet(const UnfusedParams& p, const Sight& s, int i, int first_slot) const {
    return int64_t(threadIdx.x % 32 / 4) * pitch + (first_slot - before_window(p, s, i));
  }
  /// Slots between those of the field's first position and of the window's.
  __device__ static __forceinline__ int before_window(const UnfusedParams& p, const Sight& s, int i) {
    return s.z[i].begin * p.slot_strides[0] + s.y[i].begin * p.slot_strides[1] + s.x[i].begin;
  }

  /// This lane's share of the slots: pieces(tensor, shared memory, is there a second one kApart behind?) for 8 of them
  /// each, element(...) for one.
  static constexpr int kApart = 32 * 8;
  template <class Pieces, class Element>
  __device__ __forceinline__ void copy(Pieces&& pieces, Element&& element) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (pitch != slots) {
        copy_rows(i, element);
        continue;
      }
      const int all = count[i] * slots, head = detail::min(-int(staged[i] / 2) & 7, all), tail = (all - head) & 7;
#pragma unroll 1
      for (int n = head + lane * 8; n < all - tail; n += 2 * kApart)
        pieces(octet[i] + n, staged[i] + n * 2, n + kApart < all - tail);
      if ((head | tail) == 0) continue;
      const int n = lane < 8 ? lane : all - tail + lane - 8;
      if (lane < 8 ? lane < head : lane < 8 + tail) element(octet[i] + n, staged[i] + n * 2);
    }
  }
  template <class Element>
  __device__ __forceinline__ void copy_rows(int i, Element&& element) const {
#pragma unroll 1
    for (int row = 0; row < count[i]; ++row)
#pragma unroll 1
      for (int n = threadIdx.x % 32; n < slots; n += 32)
        element(octet[i] + int64_t{row} * pitch + n, staged[i] + (row * slots + n) * 2);
  }
  __device__ __forceinline__ void load() const {
    copy(
        [](const T* from, uint32_t to, bool second) {
          ptx::cp_async_16(to, from);
          if (second) ptx::cp_async_16(to + kApart * 2, from + kApart);
        },
        [](const T* from, uint32_t to) { ptx::store_shared_16(to, from->bits); });
  }
  __device__ __forceinline__ void store() const {
    copy(
        [](T* to, uint32_t from, bool second) {
          const uint4 first = ptx::load_shared_128(from);
          if (second) ptx::store_global_128(to + kApart, ptx::load_shared_128(from + kApart * 2));
          ptx::store_global_128(to, first);
        },
        [](T* to, uint32_t from) { to->bits = uint16_t(ptx::load_shared_16(from)); });
  }
};

/// Bits 1 + 2h + e of a lane's columns first + 8h + 2t + e (e: 0, 1) that a row sees. The first predicate register is
/// often taken, so that bits from 1 on become predicates in one instruction.
__device__ __forceinline__ uint32_t column_bits(Span seen, int first, int end) {
  const int from = detail::min(detail::max(seen.begin - first, 0), kStep);
  const int to = detail::min(detail::max(detail::min(seen.end, end) - first, 0), kStep);
  const uint32_t mine = (~0u << from & ~(~0u << to)) >> threadIdx.x % 4 * 2;
  return (mine & 3) << 1 | (mine >> 5 & 24);
}
/// Of both octets.
template <class T>
__device__ __forceinline__ void column_bits(uint32_t (&sees)[2], const UnfusedParams& p, const Octets<T>& rows,
                                            const Span (&seen)[2], int first, int end) {
  const uint32_t bits = column_bits(seen[0], first, end);
  const uint32_t others = p.pair.x > 8 ? column_bits(seen[1], first, end) : bits;
  sees[0] = rows.exists[0] ? bits : 0, sees[1] = rows.exists[1] ? others : 0;
}
__device__ __forceinline__ bool has_column(uint32_t bits, int column) { return bits >> (column + 1) & 1; }

}  // namespace natten::cuda_portable
