// SPDX-License-Identifier: MIT
// Device side shared by the "window" kernels: units, their boxes, loading of rows, fragments, and the mask.
#pragma once
#include <type_traits>

#include "core/element.h"
#include "cuda/portable/window.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace natten::cuda_portable {

/// Chunks of 16 bytes are permuted so that neither ldmatrix (8 keys, one chunk) nor a 16-byte load (2 keys, 4 chunks)
/// has a bank conflict. The pitch is a multiple of 8 keys, so the permutation does not depend on the row.
template <int kHeadDim>
__device__ __forceinline__ int chunk_swizzle(int key) {
  return kHeadDim == 32 ? key >> 1 & 3 : (key & 1) << 2 | (key >> 1 & 3);
}

/// key_span or query_span; the division by a stride of 1 is not made.
template <bool kOfKeys>
__device__ __forceinline__ Span seen_from(const Axis& group, int at) {
  const Axis dense{group.extent, group.window, 1, 1, group.causal};
  if (group.stride == 1) return kOfKeys ? query_span(dense, at) : key_span(dense, at);
  return kOfKeys ? query_span(group, at) : key_span(group, at);
}

/// A tile of one head and dilation group, and the box on the other side that it sees.
struct Unit {
  int head = 0, residue_y = 0, residue_x = 0;
  int y0 = 0, x0 = 0, ny = 0, nx = 0;  // first position and tokens; no tokens: nothing to do
  Axis y, x;                           // of the group
  Span box_y, box_x;

  /// Of the token at a position of the tile's group, relative to the plane.
  __device__ __forceinline__ int offset(const Plane& t, const WindowParams& p, int at_y, int at_x) const {
    return (residue_y + at_y * p.y.dilation) * t.y + (residue_x + at_x * p.x.dilation) * t.x;
  }
};

template <bool kOfKeys>
__device__ __forceinline__ Unit decode_unit(const WindowParams& p, int index) {
  Unit u;
  if (index >= p.units_per_plane) return u;
  int rest = index, n = p.by_heads.split(rest);
  u.head = rest;
  rest = n, n = p.by_groups_x.split(rest);
  u.residue_x = rest;
  rest = n, n = p.by_tiles_x.split(rest);
  const int tile_x = rest;
  rest = n, u.residue_y = p.by_tiles_y.split(rest);
  const int tile_y = rest;
  u.y = group_axis(p.y, u.residue_y, p.by_dilation_y), u.x = group_axis(p.x, u.residue_x, p.by_dilation_x);
  u.y0 = tile_y * p.tiling.tile_y, u.x0 = tile_x * p.tiling.tile_x;
  u.ny = detail::min(p.tiling.tile_y, u.y.extent - u.y0), u.nx = detail::min(p.tiling.tile_x, u.x.extent - u.x0);
  if (u.ny <= 0 || u.nx <= 0) {
    u.ny = u.nx = 0;
    return u;
  }
  u.box_y = {seen_from<kOfKeys>(u.y, u.y0).begin, seen_from<kOfKeys>(u.y, u.y0 + u.ny - 1).end};
  u.box_x = {seen_from<kOfKeys>(u.x, u.x0).begin, seen_from<kOfKeys>(u.x, u.x0 + u.nx - 1).end};
  return u;
}

/// A plane's tensor of one sample and head.
template <class T>
__device__ __forceinline__ T* plane_base(const Plane& t, uint32_t batch, uint32_t z, uint32_t head) {
  return static_cast<T*>(t.ptr) + (uint64_t{t.batch} * batch + uint64_t{t.z} * z + uint64_t{t.head} * head);
}

/// Tokens of a tensor below each other, in a unit, from one of their channels on.
template <class T>
struct Column {
  T* first;
  int row;  // elements from one to the next

  __device__ __forceinline__ Column(const WindowParams& p, const Plane& t, int batch, int z, const Unit& u, int x,
                                    int channel = 0)
      : first(ptx::opaque(plane_base<T>(t, batch, z, u.head) + u.offset(t, p, u.y0, x) + channel)),
        row(p.y.dilation * t.y) {}
  __device__ __forceinline__ T* at(int y) const { return first + y * row; }
};

/// Where a thread stands in its block.
struct Place {
  int lane, g, t;
  int unit, y, x;       // of the warp: unit of the block, first row and column of its first tile
  int row, column;      // of the lane: of its first token in the tile, and from the unit's first column
  int thread, threads;  // of those that share the unit

  __device__ Place(const WindowParams& p, Shape shape) {
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int rest = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);  // uniform, and the compiler knows
    unit = p.by_unit_warps.split(rest);
    threads = p.by_unit_warps.divisor * 32, thread = rest * 32 + lane;
    y = p.by_warps_x.split(rest) * tile_rows(shape), x = rest * tile_columns(shape);
    row = g / tile_columns(shape), column = x + (g & (tile_columns(shape) - 1));
  }
};

__device__ __forceinline__ void fill_zero(const Place& at, uint32_t to, int bytes) {
  for (int i = at.thread * 16; i < bytes; i += at.threads * 16) ptx::store_shared_128(to + i, uint4{0, 0, 0, 0});
}

/// A step reads up to kTailKeys rows of shared memory behind those of a unit: zeros, or the next unit's. The first that
/// this unit has to set to zero, or -1.
__device__ __forceinline__ int first_of_tail(const WindowParams& p, const Place& at, const Unit& u) {
  if (u.ny == 0) return 0;
  return at.unit + 1 == p.tiling.units ? p.tiling.rows * p.tiling.pitch : -1;
}

/// The spans of a unit's rows, relative to its box, for all of its threads.
template <bool kOfKeys>
__device__ __forceinline__ void fill_row_spans(const Place& at, uint32_t to, const Unit& u) {
  for (int i = at.thread; i < u.ny; i += at.threads) {
    const Span s = seen_from<kOfKeys>(u.y, u.y0 + i);
    ptx::store_shared_32(to + i * 8, s.begin - u.box_y.begin);
    ptx::store_shared_32(to + i * 8 + 4, s.end - u.box_y.begin);
  }
}

/// What the rows of a warp's tile see, relative to the first row that any does.
template <Shape kShape>
struct TileRows {
  int first_row;         // in the box
  int rows;              // of all
  int begin[2], end[2];  // this lane's two tokens see [begin, end)
  int bias_index = 0;    // of the bias table's row for row 0 of the tile and first_row
  uint32_t bias = 0;     // the same in bytes

  /// Tokens behind the last row repeat it.
  __device__ __forceinline__ TileRows(uint32_t spans, const Place& at, int y, int ny) {
    const auto span = [&](int row) { return ptx::load_shared_64(spans + detail::min(row, ny - 1) * 8); };
    const uint2 first = kShape == Shape::square ? span(y + at.row) : ptx::load_shared_64(spans + y * 8);
    const uint2 second = span(y + at.row + second_row(kShape));
    const int top = kShape == Shape::square ? span(y).x : first.x;
    const int bottom = kShape == Shape::square ? span(y + tile_rows(kShape) - 1).y : second.y;
    first_row = top, rows = bottom - top;
    begin[0] = first.x - top, end[0] = first.y - top;
    begin[1] = second.x - top, end[1] = second.y - top;
  }

  /// Of two rows, the first begins where both do and the second ends there.
  __device__ __forceinline__ bool sees(int token, int row) const {
    if (kShape == Shape::square) return row >= begin[token] && row < end[token];
    return token == 0 ? row < end[0] : row >= begin[1] && row < rows;
  }
};

/// The column mask of a lane's accumulators: 0 where the query (or key) of row g sees the column, else -infinity.
/// NOTE: rows g and g + 8 have the same mask; if the compiler knew it, it would keep one pair of registers and copy it
/// before every mma, or compute the mask anew for each.
template <int kOctets>
__device__ __forceinline__ void column_mask(float (&mask)[kOctets][4], const WindowParams& p, const Place& at,
                                            Span seen) {
#pragma unroll
  for (int h = 0; h < kOctets; ++h)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t bits = __float_as_uint(seen.contains(h * 8 + at.t * 2 + e) ? 0.0f : -INFINITY);
      mask[h][e] = __uint_as_float(ptx::opaque(bits, p.zero));
      mask[h][2 + e] = mask[h][e] + p.zero_float;
    }
}

// ---- fragments ---- The order of the channels in a product over head_dim is free, so lane (g, t) takes channels 8t
// .. 8t + 7 (+ 32) of its row with one 16-byte load: two k steps of an A or B fragment.

/// The channels that a lane loads of its rows in global memory. If its last eight do not exist, it loads the first ones
/// that do once more and masks them.
template <int kHeadDim>
struct LaneChannels {
  static constexpr int kWords = kHeadDim / 32;
  uint32_t mask;    // of the last word
  int first, last;  // channel of the first word, and channels from there to the last one

  __device__ __forceinline__ LaneChannels(const WindowParams& p, const Place& at) {
    const bool exists = at.t * 8 + kHeadDim - 32 < p.head_dim;
    mask = exists ? ~0u : 0;
    first = kWords > 1 || exists ? at.t * 8 : 0, last = exists ? kHeadDim - 32 : 0;
  }
  /// `from`: channel `first` of a row.
  template <class T>
  __device__ __forceinline__ void load(uint4 (&words)[kWords], const T* from) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = ptx::load_global_128(from + (i + 1 < kWords ? i * 32 : last));
  }
};

/// A fragments of two rows (first and second eight of the tile) from 16-byte words: take(i, x) of each part of word i.
template <int kHeadDim, class Take>
__device__ __forceinline__ void take_fragments(uint32_t (&a)[kHeadDim / 16][4], const uint4 (&words)[2][kHeadDim / 32],
                                               const Take& take) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) {
    a[2 * i][0] = take(i, words[0][i].x), a[2 * i][1] = take(i, words[1][i].x);
    a[2 * i][2] = take(i, words[0][i].y), a[2 * i][3] = take(i, words[1][i].y);
    a[2 * i + 1][0] = take(i, words[0][i].z), a[2 * i + 1][1] = take(i, words[1][i].z);
    a[2 * i + 1][2] = take(i, words[0][i].w), a[2 * i + 1][3] = take(i, words[1][i].w);
  }
}
template <int kHeadDim>
__device__ __forceinline__ void make_fragments(uint32_t (&a)[kHeadDim / 16][4], const uint4 (&words)[2][kHeadDim / 32],
                                               uint32_t zero) {
  take_fragments<kHeadDim>(a, words, [&](int, uint32_t x) { return ptx::opaque(x, zero); });
}
/// Without the channels that do not exist: the mask of the last word is as opaque as `zero`.
template <int kHeadDim>
__device__ __forceinline__ void make_fragments(uint32_t (&a)[kHeadDim / 16][4], const uint4 (&words)[2][kHeadDim / 32],
                                               uint32_t zero, const LaneChannels<kHeadDim>& channels) {
  take_fragments<kHeadDim>(a, words, [&](int i, uint32_t x) {
    return (i + 1) * 32 < kHeadDim ? ptx::opaque(x, zero) : ptx::masked(x, channels.mask);
  });
}

/// d = rows * keys^T + c for 8 keys; b: this lane's key.
template <class T, int kHeadDim>
__device__ __forceinline__ void multiply_keys(float (&d)[4], const uint32_t (&a)[kHeadDim / 16][4],
                                              const uint4 (&b)[kHeadDim / 32], const float (&c)[4]) {
  ptx::mma_16816<T>(d, a[0], b[0].x, b[0].y, c);
  ptx::mma_16816<T>(d, a[1], b[0].z, b[0].w);
#pragma unroll
  for (int i = 1; i < kHeadDim / 32; ++i) {
    ptx::mma_16816<T>(d, a[2 * i], b[i].x, b[i].y);
    ptx::mma_16816<T>(d, a[2 * i + 1], b[i].z, b[i].w);
  }
}

/// This lane's key: the chunks t, t + 4, ... of a row.
template <int kHeadDim>
__device__ __forceinline__ void load_key(uint4 (&b)[kHeadDim / 32], uint32_t address) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 32; ++i) b[i] = ptx::load_shared_128(address ^ (i << 6));
}

/// B fragments of 16 keys for a product over keys: all channels.
template <int kHeadDim>
__device__ __forceinline__ void load_transposed(uint32_t (&b)[kHeadDim / 16][4], uint32_t address) {
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) ptx::ldmatrix_x4_trans(b[j], address ^ (j << 5));
}

template <class T, int kHeadDim>
__device__ __forceinline__ void multiply_values(float (&acc)[kHeadDim / 8][4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[kHeadDim / 16][4]) {
#pragma unroll
  for (int j = 0; j < kHeadDim / 16; ++j) {
    ptx::mma_16816<T>(acc[2 * j], a, b[j][0], b[j][1]);
    ptx::mma_16816<T>(acc[2 * j + 1], a, b[j][2], b[j][3]);
  }
}

template <int kCount>
__device__ __forceinline__ void set_zero(float (&acc)[kCount][4]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
}

/// Not finite if any sum is not: one addition each.
template <int kCount>
__device__ __forceinline__ float finite_witness(const float (&acc)[kCount][4], int row) {
  float witness = 0;
#pragma unroll
  for (int n = 0; n < kCount; ++n) witness = fmaf(acc[n][2 * row], 0.0f, fmaf(acc[n][2 * row + 1], 0.0f, witness));
  return witness;
}

__device__ __forceinline__ float add_over_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <class T>
__device__ __forceinline__ bool is_nonfinite_half(uint32_t half) {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
  return (half & kExponent) == kExponent;
}

/// Where a warp's tile of a unit lies in shared memory, for the two ways to read a row: 16-byte chunks of key `g`, and
/// ldmatrix. `column`: the first of the tile's, counted from the unit's first key.
template <int kHeadDim, Shape kShape>
struct LaneAddresses {
  uint32_t row, transposed;

  __device__ __forceinline__ LaneAddresses(const Place& at, int column) {
    const int key = column + at.g, other = column + (at.lane & (step_octets(kShape) * 8 - 1));
    row = key * (kHeadDim * 2) + ((at.t ^ chunk_swizzle<kHeadDim>(key)) << 4);
    transposed = other * (kHeadDim * 2) + ((at.lane / 16 ^ chunk_swizzle<kHeadDim>(other)) << 4);
  }
};

/// Zero instead of each half that is infinite or NaN.
template <class T>
__device__ __forceinline__ uint32_t without_nonfinite(uint32_t word) {
  return (is_nonfinite_half<T>(word & 0xffff) ? 0 : word & 0xffff) |
         (is_nonfinite_half<T>(word >> 16) ? 0 : word & 0xffff0000);
}

/// Of pairs of channels 2t, 2t + 1 of two octets (a, b), the four channels from `stored_channel` on.
__device__ __forceinline__ void pairs_to_fours(uint32_t& a, uint32_t& b, int t) {
  const bool odd = t % 2;
  const uint32_t other = __shfl_xor_sync(~0u, odd ? a : b, 1);
  a = odd ? other : a, b = odd ? b : other;
}

/// The first channel that a lane stores.
__device__ __forceinline__ int stored_channel(int t) { return t % 2 * 8 + t / 2 * 4; }

/// Which of a lane's two tokens exist, in the tile of a unit that begins at row `y`.
struct Exist {
  bool first, second;
};
__device__ __forceinline__ Exist tokens_exist(Shape shape, const Place& at, const Unit& u, int y) {
  const bool column = at.column < u.nx, first = shape != Shape::square || y + at.row < u.ny;
  return {column && first, column && y + at.row + second_row(shape) < u.ny};
}

/// acc * factor of a tile's tokens to memory. `to` is this lane's first one, from `stored_channel` on, and `to_second`
/// the distance of the other.
/// NOTE: one shuffle turns pairs of channels into fours, so every 8-byte store of the warp fills whole 32-byte sectors.
template <class T, int kHeadDim>
__device__ __forceinline__ void store_tile(T* to, int to_second, const WindowParams& p, const Place& at,
                                           const float (&acc)[kHeadDim / 8][4], float factor0, float factor1,
                                           const Exist& exist) {
  T* second = ptx::opaque(to + to_second);
  const int channels = p.head_dim - at.t % 2 * 8, of_first = exist.first ? channels : 0,
            of_second = exist.second ? channels : 0;
#pragma unroll
  for (int n = 0; n < kHeadDim / 8; n += 2) {
    uint32_t a = ptx::pack<T>(acc[n][0] * factor0, acc[n][1] * factor0);
    uint32_t b = ptx::pack<T>(acc[n + 1][0] * factor0, acc[n + 1][1] * factor0);
    uint32_t c = ptx::pack<T>(acc[n][2] * factor1, acc[n][3] * factor1);
    uint32_t d = ptx::pack<T>(acc[n + 1][2] * factor1, acc[n + 1][3] * factor1);
    pairs_to_fours(a, b, at.t), pairs_to_fours(c, d, at.t);
    if (n * 8 < of_first) ptx::store_global_64(to + n * 8, a, b);
    if (n * 8 < of_second) ptx::store_global_64(second + n * 8, c, d);
  }
}

}  // namespace natten::cuda_portable
