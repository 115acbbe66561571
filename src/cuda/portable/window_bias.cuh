// SPDX-License-Identifier: MIT
// The relative position bias of the "window" kernels: a table in shared memory that replaces the column mask, and sums
// for its gradient.
//
// Entries are bias / scale, so the addend of the first mma is what it adds to q * k. A lane's addend for a key row is
// a pair of columns, whose visibility depends on lane and octet only: it picks one of three tables once and then loads
// 8 bytes per octet and row of the tile. Nothing is masked inside the loop.
//
//   kind 0, both columns seen    (b[dx], b[dx + 1])         row dy of each: pairs at dx = -x .. x - 1
//   kind 1, the first            (b[dx], -infinity)         neither: the pair -x of this kind
//   kind 2, the second           (-infinity, b[dx + 1])
//
// The tables lie a multiple of 128 bytes apart: where windows are not shifted, which kind a pair is of depends on dx
// alone, so lanes of a half warp meet different banks or the same address.
#pragma once
#include "cuda/portable/window.cuh"

namespace natten::cuda_portable {

/// Tables of one head, by all threads of a unit; zeros if there is no bias. (dy, dx) is key - query or, if the tile is
/// of keys, query - key.
template <class T, bool kOfKeys>
__device__ __forceinline__ void fill_bias(const Place& at, uint32_t to, const WindowParams& p, int head) {
  const WindowBias& table = p.bias_table;
  const T* bias = p.bias.ptr ? plane_base<const T>(p.bias, 0, 0, head) : nullptr;
  const auto entry = [&](int dy, int dx) {
    if (dy <= -table.y || dy >= table.y || dx <= -table.x || dx >= table.x) return -INFINITY;
    if (!bias) return 0.0f;
    const int y = bias_index(p.y, 0, kOfKeys ? -dy : dy), x = bias_index(p.x, 0, kOfKeys ? -dx : dx);
    return to_real(bias[y * p.bias.y + x * p.bias.x]) * p.inverse_scale;
  };
  const uint32_t none = __float_as_uint(-INFINITY);
  for (int i = at.thread; i < table.rows() * 2 * table.x; i += at.threads) {
    int column = i;
    const int dy = p.by_bias_columns.split(column) - table.origin, dx = column - table.x;
    const uint32_t first = __float_as_uint(entry(dy, dx)), second = __float_as_uint(entry(dy, dx + 1));
    ptx::store_shared_64(to + i * 8, first, second);
    ptx::store_shared_64(to + table.kind_bytes + i * 8, first, none);
    ptx::store_shared_64(to + 2 * table.kind_bytes + i * 8, none, second);
  }
}

/// What a lane adds to its accumulators before the first product: the column mask, or mask and bias in one.
template <Shape kShape, bool kBias>
struct Addends;

template <Shape kShape>
struct Addends<kShape, false> {
  float mask[step_octets(kShape)][4];

  __device__ __forceinline__ void set(const WindowParams& p, const Place& at, Span seen, int, uint32_t) {
    column_mask(mask, p, at, seen);
  }
  __device__ __forceinline__ void load(float (&c)[4], int octet, uint32_t) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] = mask[octet][e];
  }
  __device__ __forceinline__ bool sees(int octet, int e) const { return mask[octet][e] == 0; }
};

template <Shape kShape>
struct Addends<kShape, true> {
  static constexpr int kOctets = step_octets(kShape);
  uint32_t lane[kOctets];  // of this lane's pairs in row 0 of the table
  uint32_t pitch;
  Span seen;  // columns, this lane's first being 0

  /// `dx`: of the first column; `table`: of the unit's head.
  __device__ __forceinline__ void set(const WindowParams& p, const Place& at, Span columns, int dx, uint32_t table) {
    pitch = p.bias_table.pitch;
    seen = {columns.begin - at.t * 2, columns.end - at.t * 2};
#pragma unroll
    for (int h = 0; h < kOctets; ++h) {
      const bool first = seen.contains(h * 8), second = seen.contains(h * 8 + 1);
      const int pair = first || second ? dx + h * 8 + at.t * 2 + p.bias_table.x : 0,
                kind = first ? !second : second * 2;
      lane[h] = table + (first || second ? kind : 1) * p.bias_table.kind_bytes + pair * 8 - at.row * pitch;
    }
  }
  /// `row`: byte offset of the table's row for row 0 of the tile; others are further from the key.
  __device__ __forceinline__ void load(float (&c)[4], int octet, uint32_t row) const {
    const uint32_t above = row - second_row(kShape) * pitch;  // uniform, as `row` is
    const uint2 a = ptx::load_shared_64(lane[octet] + row), b = ptx::load_shared_64(lane[octet] + above);
    c[0] = __uint_as_float(a.x), c[1] = __uint_as_float(a.y), c[2] = __uint_as_float(b.x), c[3] = __uint_as_float(b.y);
  }
  __device__ __forceinline__ bool sees(int octet, int e) const { return seen.contains(octet * 8 + e % 2); }
};

/// Where the table's rows for row `y` of a unit's tile begin.
template <Shape kShape>
__device__ __forceinline__ void set_bias_row(TileRows<kShape>& rows, const WindowParams& p, const Unit& u, int y) {
  rows.bias_index = u.box_y.begin + rows.first_row - u.y0 - y + p.bias_table.origin;
  rows.bias = rows.bias_index * p.bias_table.pitch;
}

/// Sums of dS for the gradient of the bias. A warp has a table of its own, each lane two columns of it per dy: no
/// atomics, no bank conflicts, and always the same order. Windows are at most 7 wide, so that of a lane's columns c and
/// c + 8 at most one is seen and both octets share a place.
struct LaneSums {
  uint32_t next;   // address of the row dy - 1
  float carry[2];  // of tile row 0 in the key row before; tile row 1 meets the same dy one key row later

  /// Starts a tile; `row`: see TileRows::bias_index.
  __device__ __forceinline__ void start(uint32_t lane_sums, int row) {
    next = lane_sums + (row - 1) * kBiasSumPitch;
    carry[0] = carry[1] = 0;
  }
  __device__ __forceinline__ void add(float a0, float a1) {
    const uint2 sum = ptx::load_shared_64(next);
    ptx::store_shared_64(next, __float_as_uint(__uint_as_float(sum.x) + a0),
                         __float_as_uint(__uint_as_float(sum.y) + a1));
    next += kBiasSumPitch;
  }
  /// dS of 8 or 16 keys of one row: of tile row 0 in elements 0 and 1, of tile row 1 in 2 and 3.
  __device__ __forceinline__ void add_row(const float (&ds)[4]) {
    add(carry[0] + ds[2], carry[1] + ds[3]);
    carry[0] = ds[0], carry[1] = ds[1];
  }
  __device__ __forceinline__ void finish() { add(carry[0], carry[1]); }
};

/// Shared memory of a block for those sums: a table per warp, and which dx each column of the units sees.
struct BiasSums {
  const WindowParams& p;
  uint32_t tables, spans;

  __device__ __forceinline__ BiasSums(const WindowParams& params, uint32_t shared)
      : p(params), tables(shared), spans(shared + params.threads() / 32 * params.bias_table.sum_bytes()) {}

  __device__ __forceinline__ void clear(const Place& at) const {
    fill_zero(at, tables, spans - tables + p.tiling.units * p.tiling.tile_x * 8);
  }
  __device__ __forceinline__ uint32_t of_lane(const Place& at) const {
    return tables + threadIdx.x / 32 * p.bias_table.sum_bytes() + at.lane * 8;
  }
  /// The same for every tile of a block. Columns that do not exist see nothing.
  __device__ __forceinline__ void set_column(const Place& at, Span seen, int x) const {
    if (at.t != 0) return;
    ptx::store_shared_64(spans + (at.unit * p.tiling.tile_x + at.column) * 8, seen.begin - x, seen.end - x);
  }

  /// All warps' sums of an entry.
  __device__ __forceinline__ float entry(int unit, int dy, int dx) const {
    const int octets = p.tiling.warps_x(), bytes = p.bias_table.sum_bytes();
    float sum = 0;
    for (int octet = 0; octet < octets; ++octet) {
      const uint32_t columns = spans + (unit * octets + octet) * 64;
      const int first = int(ptx::load_shared_32(columns));  // dx of the octet's first key column, for column 0
      uint32_t of_octet =
          tables + (unit * p.tiling.warps_y * octets + octet) * bytes + (dy + p.bias_table.origin) * kBiasSumPitch;
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        const uint2 seen = ptx::load_shared_64(columns + g * 8);
        if (dx < int(seen.x) || dx >= int(seen.y)) continue;
        const uint32_t address = of_octet + g * 32 + ((dx + g - first) & 7) * 4;
        for (int i = 0; i < p.tiling.warps_y; ++i)
          sum += __uint_as_float(ptx::load_shared_32(address + i * octets * bytes));
      }
    }
    return sum;
  }

  /// To this block's tables in global memory: [heads, tables, entries].
  __device__ __forceinline__ void store() const {
    const int height = 2 * p.y.window - 1, width = 2 * p.x.window - 1;
    for (int unit = 0; unit < p.tiling.units; ++unit) {
      int table = blockIdx.x * p.tiling.units + unit, head = table;
      table = p.by_heads.split(head);
      float* to = p.bias_sums + (int64_t{head} * p.bias_sum_tables + table) * (height * width);
      for (int i = threadIdx.x; i < height * width; i += blockDim.x) {
        const int y = i / width, dy = y - p.y.window + 1, dx = i - y * width - p.x.window + 1;
        const bool meets = dy > -p.bias_table.y && dy < p.bias_table.y;
        to[i] = meets ? entry(unit, dy, dx) : 0.0f;
      }
    }
  }
};

}  // namespace natten::cuda_portable
