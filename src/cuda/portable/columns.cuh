// SPDX-License-Identifier: MIT
// Blocks of columns: kBlockN positions of the box, their rows of two tensors in shared memory, and which row of the
// tile sees which of them.
//
// The mask of a row is a product of three per-axis tests. Per block and axis, one bit per column is kept for each
// *coordinate* of the tile (8 + 8 for a tile of 8x8), so a row's mask is `z & y & x` of three table entries:
//
//     columns of the block (x fastest)      . . . . | . . . . | . . . .
//     coordinate y = 3 of the tile sees     1 1 1 1   1 1 1 1   0 0 0 0
//     coordinate x = 5 sees                 0 1 1 1   0 1 1 1   0 1 1 1
//     row (3, 5) sees the columns           0 1 1 1   0 1 1 1   0 0 0 0
#pragma once
#include "cuda/portable/tile.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace natten::cuda_portable {

/// Shared memory of a block of threads: kTiles operands of the tile, then two stages of two tensors' columns, tables.
template <class T, int kHeadDim, int kColumns, int kTiles>
struct SharedMap {
  static constexpr int kBlockN = kColumns, kWords = kColumns / 32;
  static constexpr uint32_t kTileBytes = kBlockM * kHeadDim * sizeof(T), kColumnBytes = kBlockN * kHeadDim * sizeof(T);
  static constexpr uint32_t kStages = kTiles * kTileBytes;
  static constexpr uint32_t kSpans = kStages + 4 * kColumnBytes;
  static constexpr uint32_t kBits = kSpans + kMaxCoords * sizeof(Span);
  static constexpr uint32_t kTerms = kBits + 2 * kMaxCoords * kWords * 4;
  static constexpr uint32_t kStats = kTerms + 2 * kBlockN * 4;
  static constexpr uint32_t kBytes = kStats + 2 * kBlockN * sizeof(RowStats);

  __device__ static uint32_t tile(int i) { return i * kTileBytes; }
  __device__ static uint32_t columns(int stage, int tensor) { return kStages + (stage * 2 + tensor) * kColumnBytes; }
};

/// Elements of a chunk, which has 16 bytes.
template <class T>
constexpr int kPerChunk = 16 / sizeof(T);

/// Byte offset of a chunk of a row. Chunks are permuted so that ldmatrix meets every bank once.
template <class T, int kHeadDim>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  constexpr int kRowBytes = kHeadDim * sizeof(T);
  const int key = kRowBytes == 64 ? row >> 1 & 3 : row & 7;
  return row * kRowBytes + ((chunk ^ key) << 4);
}

/// A chunk of a row that need not be aligned or complete.
template <class T>
__device__ inline uint4 load_elements(const T* row, int first, int dim) {
  T elements[kPerChunk<T>];
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) elements[i] = first + i < dim ? row[first + i] : T{};
  uint4 chunk;
  memcpy(&chunk, elements, sizeof chunk);
  return chunk;
}

/// One chunk of one row to shared memory; zeros past the row's end and where there is no row.
template <class T>
__device__ __forceinline__ void load_chunk(uint32_t to, const Gather<T>& from, Int3 at, int chunk, bool exists) {
  const int first = chunk * kPerChunk<T>;
  exists = exists && first < from.dim;
  const T* row = exists ? from.at(at) : from.base;
  if (from.vector)
    ptx::cp_async_16(to, exists ? row + first : row, exists);
  else
    ptx::store_shared_128(to, exists ? load_elements(row, first, from.dim) : uint4{0, 0, 0, 0});
}

/// The rows of the tile.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_tile(uint32_t to, const BoxesParams& p, const Item& item, const Gather<T>& from) {
  constexpr int kChunks = kHeadDim / kPerChunk<T>;
  const int chunk = threadIdx.x % kChunks;
  for (int row = threadIdx.x / kChunks; row < kBlockM; row += kThreads / kChunks)
    load_chunk(to + swizzled<T, kHeadDim>(row, chunk), from, tile_row(p, item, row), chunk, true);
}

/// Columns `first` .. `first + kBlockN` of the box, of two tensors.
template <class T, int kHeadDim, int kBlockN>
__device__ __forceinline__ void load_columns(uint32_t to_a, uint32_t to_b, const Gather<T>& a, const Gather<T>& b,
                                             const Box& box, int first) {
  constexpr int kChunks = kHeadDim / kPerChunk<T>;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll 4
  for (int column = threadIdx.x / kChunks; column < kBlockN; column += kThreads / kChunks) {
    const int flat = first + column;
    const Int3 at = box.split(flat);
    const uint32_t offset = swizzled<T, kHeadDim>(column, chunk);
    load_chunk(to_a + offset, a, at, chunk, flat < box.volume);
    load_chunk(to_b + offset, b, at, chunk, flat < box.volume);
  }
}

/// Spans of every coordinate of the tile: z first, then y, then x. By `threads` threads, this one being number `first`.
__device__ __forceinline__ void fill_spans(Span* spans, const BoxesParams& p, const Item& item, int first,
                                           int threads) {
  for (int coord = first; coord < p.tile.z + p.tile.y + p.tile.x; coord += threads) {
    const int axis = coord < p.tile.z ? 0 : coord < p.tile.z + p.tile.y ? 1 : 2;
    const int index = coord - (axis == 0 ? 0 : axis == 1 ? p.tile.z : p.tile.z + p.tile.y);
    const Axis group = axis == 0 ? item.group[0] : axis == 1 ? item.group[1] : item.group[2];
    const int at = detail::min(component(item.origin, axis) + index, group.extent - 1);
    spans[coord] = span_of(p.side, group, at);
  }
}
__device__ __forceinline__ void fill_spans(Span* spans, const BoxesParams& p, const Item& item) {
  fill_spans(spans, p, item, threadIdx.x, kThreads);
}

/// The bit table of one block. `everything`: each row sees each column that exists.
template <int kBlockN>
__device__ __forceinline__ void fill_bits(uint32_t* bits, const Span* spans, Int3 tile, const Box& box, int first,
                                          bool everything) {
  constexpr int kWords = kBlockN / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Int3 at[kWords];
  bool exists[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    at[w] = box.split(first + 32 * w + lane);
    exists[w] = first + 32 * w + lane < box.volume;
  }
  for (int coord = warp; coord < tile.z + tile.y + tile.x; coord += kThreads / 32) {
    const int axis = coord < tile.z ? 0 : coord < tile.z + tile.y ? 1 : 2;
    const Span span = spans[coord];
    const int origin = component(box.begin, axis);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const bool sees = exists[w] && (everything || span.contains(origin + component(at[w], axis)));
      const uint32_t word = __ballot_sync(~0u, sees);
      if (lane == 0) bits[coord * kWords + w] = word;
    }
  }
}

/// The two rows of the tile that a thread holds in an accumulator: g and g + 8 of its warp's 16.
struct ThreadRows {
  int row[2];       // in the tile
  Int3 at[2];       // relative to the tile's origin, of an existing row
  int coord[2][3];  // indices into the table of bits

  __device__ ThreadRows(const BoxesParams& p, const Item& item) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row[i] = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
      at[i] = tile_row(p, item, row[i]);
      coord[i][0] = at[i].z, coord[i][1] = p.tile.z + at[i].y, coord[i][2] = p.tile.z + p.tile.y + at[i].x;
    }
  }
};

/// The columns of a block that a thread's two rows see, shifted so that bit 8n + e is that of its column 8n + 2t + e.
template <int kBlockN>
struct RowMasks {
  static constexpr int kWords = kBlockN / 32;
  uint32_t word[2][kWords];
  bool any, all;  // of the warp's rows

  __device__ RowMasks(const uint32_t* bits, const ThreadRows& rows) {
    uint32_t some = 0, every = ~0u;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int* c = rows.coord[i];
        word[i][w] = bits[c[0] * kWords + w] & bits[c[1] * kWords + w] & bits[c[2] * kWords + w];
        some |= word[i][w], every &= word[i][w];
        word[i][w] >>= threadIdx.x % 4 * 2;
      }
    any = __any_sync(~0u, some != 0);
    all = __all_sync(~0u, every == ~0u);
  }
  /// Element e of accumulator n: rows g, g, g + 8, g + 8.
  __device__ __forceinline__ bool sees(int n, int e) const {
    return word[e / 2][n * 8 / 32] >> (n * 8 % 32 + e % 2) & 1;
  }
};

template <int kCount>
__device__ __forceinline__ void clear(float (&acc)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
}

/// A position's share of an index into a table over relative positions; differences are exact modulo 2^32.
__device__ __forceinline__ int bias_term(Int3 at, int64_t z, int64_t y, int64_t x) {
  return int(uint32_t(at.z) * uint32_t(z) + uint32_t(at.y) * uint32_t(y) + uint32_t(at.x) * uint32_t(x));
}

__device__ __forceinline__ Int3 sum(Int3 a, Int3 b) { return {a.z + b.z, a.y + b.y, a.x + b.x}; }

/// bias[key - query] for rows and columns of a tile: `sign` * (column's term - row's term) + `origin`.
template <class T>
struct BiasTable {
  const T* table = nullptr;  // of this head; null if there is none
  int64_t z = 0, y = 0, x = 0;
  int sign = 1;

  __device__ BiasTable(const BoxesParams& p, int head) {
    if (!p.problem.has_bias) return;
    const int64_t* s = p.bias.strides;
    const Axis* a = p.problem.axes;
    z = s[1], y = s[2], x = s[3];
    // The entry of a query and the key at its own position.
    table = pointer<T>(p.bias) + head * s[4] + bias_index(a[0], 0, 0) * z + bias_index(a[1], 0, 0) * y +
            bias_index(a[2], 0, 0) * x;
    sign = p.side == Side::queries ? 1 : -1;
  }
  __device__ __forceinline__ int term(Int3 at) const { return sign * bias_term(at, z, y, x); }
};

/// The columns' terms, by the first threads.
template <int kBlockN, class T>
__device__ __forceinline__ void fill_terms(int* terms, const BiasTable<T>& bias, const Box& box, int first) {
  if (threadIdx.x < kBlockN) terms[threadIdx.x] = bias.term(sum(box.begin, box.split(first + int(threadIdx.x))));
}

/// acc += bias * log2(e). Only where a row sees the column is there an entry to read.
template <class T, int kBlockN>
__device__ __forceinline__ void add_bias(float (&acc)[kBlockN / 8][4], const BiasTable<T>& bias, const int* terms,
                                         const int (&row_terms)[2], const RowMasks<kBlockN>& masks) {
  constexpr float kLog2e = 1.44269504088896341f;
#pragma unroll
  for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * n + threadIdx.x % 4 * 2 + e % 2;
      if (masks.sees(n, e))
        acc[n][e] += kLog2e * to_real(bias.table[int(uint32_t(terms[column]) - uint32_t(row_terms[e / 2]))]);
    }
}

}  // namespace natten::cuda_portable
