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
#include <type_traits>

#include "cuda/portable/tile.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"

namespace natten::cuda_portable {

/// Where the rows of a column begin in memory, in both tensors.
template <class T>
struct alignas(16) ColumnRows {
  const T* row[2];
};

/// What all threads of a block ask about their work now and then; registers are for what they need always.
template <class T>
struct alignas(16) Work {
  Item item;
  Box box, extra;                       // of the grid, and of additional keys
  Gather<T> in_box[2], among_extra[2];  // of the two tensors that columns have
  Gather<RowStats> stats;               // of the columns, where these are queries
};

/// Shared memory of a block of threads: kTiles operands of the tile, two stages of two tensors' columns, tables.
template <class T, int kHeadDim, int kColumns, int kTiles, int kWarpTiles = 1>
struct SharedMap {
  static constexpr int kBlockN = kColumns, kWords = kColumns / 32, kRows = kWarpTiles * kBlockM;
  static constexpr int kCoords = most_coords(kRows) + 1;  // the last one sees nothing
  static constexpr uint32_t kTileBytes = kRows * kHeadDim * sizeof(T), kColumnBytes = kBlockN * kHeadDim * sizeof(T);
  static constexpr uint32_t kStages = kTiles * kTileBytes;
  static constexpr uint32_t kLists = kStages + 4 * kColumnBytes;
  static constexpr uint32_t kWork = kLists + 2 * kBlockN * sizeof(ColumnRows<T>);
  static constexpr uint32_t kSpans = kWork + sizeof(Work<T>);
  static constexpr uint32_t kBits = kSpans + kCoords * sizeof(Span);
  static constexpr uint32_t kTerms = kBits + 2 * kCoords * kWords * 4;
  static constexpr uint32_t kStats = kTerms + 2 * kBlockN * 4;
  static constexpr uint32_t kBytes = kStats + 2 * kBlockN * sizeof(RowStats);

  __device__ static uint32_t tile(int i) { return i * kTileBytes; }
  __device__ static uint32_t columns(int stage, int tensor) { return kStages + (stage * 2 + tensor) * kColumnBytes; }

  // What the tables hold. Those with two stages: of blocks of columns in turn.
  template <class E>
  __device__ static E* at(unsigned char* smem, uint32_t offset) {
    return reinterpret_cast<E*>(smem + offset);
  }
  __device__ static Work<T>& work(unsigned char* smem) { return *at<Work<T>>(smem, kWork); }
  __device__ static Span* spans(unsigned char* smem) { return at<Span>(smem, kSpans); }
  __device__ static ColumnRows<T>* list(unsigned char* smem, int block) {
    return at<ColumnRows<T>>(smem, kLists) + block % 2 * kBlockN;
  }
  __device__ static uint32_t* bits(unsigned char* smem, int block) {
    return at<uint32_t>(smem, kBits) + block % 2 * kCoords * kWords;
  }
  __device__ static int* terms(unsigned char* smem, int block) { return at<int>(smem, kTerms) + block % 2 * kBlockN; }
  __device__ static RowStats* stats(unsigned char* smem, int block) {
    return at<RowStats>(smem, kStats) + block % 2 * kBlockN;
  }
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

/// One chunk of one row to shared memory; zeros past the row's end. `vector`: it can be copied by 16 bytes.
template <class T>
__device__ __forceinline__ void load_chunk(uint32_t to, const T* row, int chunk, int dim, bool vector) {
  const int first = chunk * kPerChunk<T>, existing = first < dim ? first : 0;
  if (vector)
    ptx::cp_async_16(to, row + existing, first < dim);
  else
    ptx::store_shared_128(to, load_elements(row, first, dim));
}

/// The rows of the tile.
template <class T, int kHeadDim, int kRows>
__device__ __forceinline__ void load_tile(uint32_t to, const BoxesParams& p, const Item& item, const Gather<T>& from) {
  constexpr int kChunks = kHeadDim / kPerChunk<T>;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll 2
  for (int row = threadIdx.x / kChunks; row < kRows; row += kThreads / kChunks)
    load_chunk(to + swizzled<T, kHeadDim>(row, chunk), from.at(tile_row(p, item, row)), chunk, from.dim, from.vector);
}

/// Lists the rows of columns `first` .. `first + kBlockN` of the box, by a thread per row, from two tensors and as many
/// elements behind there. What is past the box repeats its last column: nobody sees it.
template <int kBlockN, class T>
__device__ __forceinline__ void list_columns(ColumnRows<T>* list, const Gather<T>* from, const Box& box, int first,
                                             int64_t behind_a = 0, int64_t behind_b = 0) {
  const int column = threadIdx.x % kBlockN, tensor = threadIdx.x / kBlockN;
  if (tensor > 1) return;
  const Int3 at = box.split(detail::min(first + column, box.volume - 1));
  list[column].row[tensor] = from[tensor].at(at) + (tensor == 0 ? behind_a : behind_b);
}

/// Listed columns of two tensors, `dim_a` and `dim_b` channels of them.
template <class T, int kHeadDim, int kBlockN>
__device__ __forceinline__ void load_columns(uint32_t to_a, uint32_t to_b, const ColumnRows<T>* list, int dim_a,
                                             int dim_b, bool vector) {
  constexpr int kChunks = kHeadDim / kPerChunk<T>, kPasses = kBlockN * kChunks / kThreads;
  const int chunk = threadIdx.x % kChunks;
  const auto load = [&](int pass, bool by_chunks) {
    const int column = threadIdx.x / kChunks + pass * (kThreads / kChunks);
    const ColumnRows<T> rows = list[column];
    const uint32_t offset = swizzled<T, kHeadDim>(column, chunk);
    load_chunk(to_a + offset, rows.row[0], chunk, dim_a, by_chunks);
    load_chunk(to_b + offset, rows.row[1], chunk, dim_b, by_chunks);
  };
  if (vector) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) load(pass, true);
  } else {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) load(pass, false);
  }
}

/// Spans of every coordinate of the tile, by all threads of the block: z first, then y, then x.
__device__ __forceinline__ void fill_spans(Span* spans, const BoxesParams& p, const Item& item) {
  for (int coord = threadIdx.x; coord < p.tile.z + p.tile.y + p.tile.x; coord += kThreads) {
    const int axis = coord < p.tile.z ? 0 : coord < p.tile.z + p.tile.y ? 1 : 2;
    const int index = coord - (axis == 0 ? 0 : axis == 1 ? p.tile.z : p.tile.z + p.tile.y);
    const Axis group = axis == 0 ? item.group[0] : axis == 1 ? item.group[1] : item.group[2];
    const int at = detail::min(component(item.origin, axis) + index, group.extent - 1);
    spans[coord] = span_of(p.side, group, at);
  }
}

/// What stays as it is for an item, by all threads of the block.
template <class Map, class T>
__device__ __forceinline__ void fill_tables(unsigned char* smem, const BoxesParams& p, const Work<T>& work) {
  if (threadIdx.x == 0) Map::work(smem) = work;
  fill_spans(Map::spans(smem), p, work.item);
  for (int i = threadIdx.x; i < 2 * Map::kWords; i += kThreads)
    Map::bits(smem, i % 2)[(Map::kCoords - 1) * Map::kWords + i / 2] = 0;
}

/// The bit table of one block: kBlockN / 4 bits for each thread of a quad, bit 2n + e being its column 8n + 2t + e.
/// `everything`: each row sees each column that exists.
template <int kBlockN>
__device__ __forceinline__ void fill_bits(uint32_t* bits, const Span* spans, Int3 tile, const Box& box, int first,
                                          bool everything) {
  constexpr int kWords = kBlockN / 32, kBits = kBlockN / 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Int3 at[kWords];
  bool exists[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    const int bit = 32 * w + lane, flat = first + bit % kBits / 2 * 8 + bit / kBits * 2 + bit % 2;
    at[w] = sum(box.begin, box.split(flat));  // past the box at a z that nobody sees
    exists[w] = flat < box.volume;
  }
  const auto fill = [&](int first_coord, int coords, auto sees) {
#pragma unroll 1
    for (int coord = first_coord + warp; coord < first_coord + coords; coord += kThreads / 32) {
      const Span span = spans[coord];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const uint32_t word = __ballot_sync(~0u, sees(w, span));
        if (lane == 0) bits[coord * kWords + w] = word;
      }
    }
  };
  if (everything) return fill(0, tile.z + tile.y + tile.x, [&](int w, Span) { return exists[w]; });
  fill(0, tile.z, [&](int w, Span span) { return span.contains(at[w].z); });
  fill(tile.z, tile.y, [&](int w, Span span) { return span.contains(at[w].y); });
  fill(tile.z + tile.y, tile.x, [&](int w, Span span) { return span.contains(at[w].x); });
}

/// The number in the tile of the row that a thread holds in elements 2i and 2i + 1 of its warp's accumulators `m`.
template <int kWarpTiles>
__device__ __forceinline__ int thread_row(int m, int i) {
  return (threadIdx.x / 32 * kWarpTiles + m) * 16 + threadIdx.x % 32 / 4 + 8 * i;
}

/// Where the table of bits has the coordinates of a thread's rows. Rows that do not exist see nothing.
template <int kWarpTiles>
struct ThreadRows {
  static constexpr int kNowhere = most_coords(kWarpTiles * kBlockM);
  uint32_t coords[kWarpTiles][2];  // a byte per axis

  __device__ ThreadRows(const BoxesParams& p, const Item& item) {
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = thread_row<kWarpTiles>(m, i);
        const Int3 at = tile_row(p, item, row);
        const int z = is_row(p, item, row) ? at.z : kNowhere;
        coords[m][i] = z | (p.tile.z + at.y) << 8 | (p.tile.z + p.tile.y + at.x) << 16;
      }
  }
};

/// The columns of a block that a thread's rows see.
template <int kWarpTiles, int kBlockN>
struct RowMasks {
  static constexpr int kBits = kBlockN / 4;
  using Bits = std::conditional_t<kBits == 16, uint16_t, uint8_t>;
  uint32_t bits[kWarpTiles][2];  // bit 2n + e: element e or e + 2 of accumulator n
  bool any, all;                 // of the warp's rows

  __device__ RowMasks(const uint32_t* table, const ThreadRows<kWarpTiles>& rows) {
    const Bits* of_thread = reinterpret_cast<const Bits*>(table) + threadIdx.x % 4;
    uint32_t some = 0, every = ~0u;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t c = rows.coords[m][i];
        bits[m][i] = of_thread[4 * (c & 0xff)] & of_thread[4 * (c >> 8 & 0xff)] & of_thread[4 * (c >> 16)];
        some |= bits[m][i], every &= bits[m][i];
      }
    any = __any_sync(~0u, some != 0);
    all = __all_sync(~0u, every == (1u << kBits) - 1);
  }
  /// Element e of accumulator n: rows g, g, g + 8, g + 8 of tile `m`.
  __device__ __forceinline__ bool sees(int m, int n, int e) const { return bits[m][e / 2] >> (2 * n + e % 2) & 1; }
  /// Puts `hidden` where a row does not see the column.
  __device__ __forceinline__ void apply(float (&acc)[kWarpTiles][kBlockN / 8][4], float hidden) const {
    if (all) return;
#pragma unroll
    for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[m][n][e] = sees(m, n, e) ? acc[m][n][e] : hidden;
  }
};

template <int kCount>
__device__ __forceinline__ void clear(float (&acc)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
}

template <int kWarpTiles, int kCount>
__device__ __forceinline__ void scale(float (&acc)[kWarpTiles][kCount][4], float factor) {
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m)
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] *= factor;
}

/// A position's share of an index into a table over relative positions; differences are exact modulo 2^32.
__device__ __forceinline__ int bias_term(Int3 at, int64_t z, int64_t y, int64_t x) {
  return int(uint32_t(at.z) * uint32_t(z) + uint32_t(at.y) * uint32_t(y) + uint32_t(at.x) * uint32_t(x));
}

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
template <class T, int kWarpTiles, int kBlockN>
__device__ __forceinline__ void add_bias(float (&acc)[kWarpTiles][kBlockN / 8][4], const BoxesParams& p,
                                         const Item& item, int head, const int* terms,
                                         const RowMasks<kWarpTiles, kBlockN>& masks) {
  constexpr float kLog2e = 1.44269504088896341f;
  const BiasTable<T> bias(p, head);
#pragma unroll
  for (int r = 0; r < 2 * kWarpTiles; ++r) {
    const int row_term = bias.term(sum(item.origin, tile_row(p, item, thread_row<kWarpTiles>(r / 2, r % 2))));
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
      for (int e = r % 2 * 2; e < r % 2 * 2 + 2; ++e) {
        const int column = 8 * n + threadIdx.x % 4 * 2 + e % 2;
        if (masks.sees(r / 2, n, e))
          acc[r / 2][n][e] += kLog2e * to_real(bias.table[int(uint32_t(terms[column]) - uint32_t(row_term))]);
      }
  }
}

}  // namespace natten::cuda_portable
