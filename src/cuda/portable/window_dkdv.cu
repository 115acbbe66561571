// SPDX-License-Identifier: MIT
// Backward for small windows, the part of the keys. A block holds the queries that see the keys of its units, dout
// and their statistics; a warp's tile of 2 x 8 keys walks over them: S = K Q^T, dV += P dO, dK += dS Q. Keys at a
// border are seen by more rows and columns than others: only loop bounds. Nobody else writes these rows: where heads of
// queries share a head of keys, the block loads one after the other and each warp keeps the sums of its only tile; they
// go through the tables of a bias, if only of zeros, so that other problems do not pay for that loop in registers.
#include "cuda/launch.h"
#include "cuda/portable/row_loader.cuh"
#include "cuda/portable/window_bias.cuh"
#include "cuda/portable/window_dispatch.cuh"
#include "cuda/portable/window_stats.cuh"
#include "cuda/ptx/grid.cuh"

namespace natten::cuda_portable {

template <class T, int kHeadDim, Shape kShape, bool kTables>
struct WindowDKDV {
  static constexpr int kWords = kHeadDim / 32, kRowBytes = kHeadDim * 2, kOctets = step_octets(kShape);
  static constexpr int kStep = 3 - kOctets;  // query rows of a step of 16 queries

  const WindowParams& p;
  const Place at;
  uint32_t k[kHeadDim / 16][4], v[kHeadDim / 16][4];
  uint32_t weights[2];                     // see window_stats.cuh; the same, in two registers for the mma
  uint32_t to_dout, row_bytes, row_stats;  // bytes
  uint32_t bias_table;
  using Sums = float[kHeadDim / 8][4];
  Sums acc_dk, acc_dv;

  __device__ __forceinline__ WindowDKDV(const WindowParams& params, const Place& place) : p(params), at(place) {}

  /// Two columns' worth of addends: the product of the weights with the statistics of this lane's query, and `c`.
  __device__ __forceinline__ void start(float (&d)[4], uint32_t stats, const float (&c)[4]) const {
    ptx::mma_1688<T>(d, weights[0], weights[1], ptx::load_shared_32(stats), c);
  }
  __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[kHeadDim / 16][4],
                                           const uint4 (&b)[kWords]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      ptx::mma_16816<T>(d, a[2 * i], b[i].x, b[i].y);
      ptx::mma_16816<T>(d, a[2 * i + 1], b[i].z, b[i].w);
    }
  }

  /// One step of 16 queries. kCareful: what is not seen is left out by selection, and values that are not finite go to
  /// `nonfinite`, a number per sum of dV that is not 0 if it sees any.
  template <bool kCareful>
  __device__ __forceinline__ void add_step(uint32_t lane_row, uint32_t lane_transposed, uint32_t lane_stats, int row,
                                           const TileRows<kShape>& rows, const Addends<kShape, kTables>& addends,
                                           uint32_t bias, Sums& nonfinite) {
    const bool second_row = row + 1 < rows.rows;
    const uint32_t to_second = kOctets == 2 ? 8 * kRowBytes : second_row ? row_bytes : 0;
    const uint32_t stats_second = kOctets == 2 ? 8 * 16 : second_row ? row_stats : 0;
    const float none[4] = {0, 0, 0, 0};
    uint4 q[2][kWords], g[2][kWords];
    float s[2][4], dp[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float addend[4];
      addends.load(addend, kOctets == 2 ? h : 0, bias + (kOctets == 2 ? 0 : h * p.bias_table.pitch));
      start(s[h], lane_stats + h * stats_second, addend);
      start(dp[h], lane_stats + h * stats_second + 8, none);
      load_key<kHeadDim>(q[h], lane_row + h * to_second);
      load_key<kHeadDim>(g[h], lane_row + h * to_second + to_dout);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) multiply(s[h], k, q[h]), multiply(dp[h], v, g[h]);
    uint32_t q_value[kHeadDim / 16][4], g_value[kHeadDim / 16][4], probability[4], ds[4], seen[4];
    const uint32_t values = lane_transposed + (kOctets == 1 && (at.lane & 8) && second_row ? row_bytes : 0);
    load_transposed<kHeadDim>(g_value, values + to_dout);
    load_transposed<kHeadDim>(q_value, values);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query_row = kOctets == 2 ? row : row + h;
      const bool sees[2] = {rows.sees(0, query_row), rows.sees(1, query_row)};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool visible = sees[e / 2] && addends.sees(kOctets == 2 ? h : 0, e);
        s[h][e] = ptx::exp2_approx(fmaf(s[h][e], p.scale_log2, sees[e / 2] ? 0.0f : -INFINITY));
        if (kCareful && !visible) s[h][e] = dp[h][e] = 0;
        dp[h][e] *= s[h][e];
      }
      probability[2 * h] = ptx::pack<T>(s[h][0], s[h][1]), probability[2 * h + 1] = ptx::pack<T>(s[h][2], s[h][3]);
      ds[2 * h] = ptx::pack<T>(dp[h][0], dp[h][1]), ds[2 * h + 1] = ptx::pack<T>(dp[h][2], dp[h][3]);
#pragma unroll
      for (int i = 0; kCareful && i < 2; ++i)
        seen[2 * h + i] = ptx::pack<T>(sees[i] && addends.sees(kOctets == 2 ? h : 0, 0),
                                       sees[i] && addends.sees(kOctets == 2 ? h : 0, 1));
    }
    if (kCareful) take_nonfinite(g_value, q_value, seen, nonfinite);
    multiply_values<T, kHeadDim>(acc_dv, probability, g_value);
    multiply_values<T, kHeadDim>(acc_dk, ds, q_value);
  }

  /// Out of the values, so that 0 * NaN does not reach keys that the query does not see. A query that is not finite has
  /// statistics that are not either, and through them reaches all that it sees; a gradient its channels of dV.
  __device__ __forceinline__ void take_nonfinite(uint32_t (&g_value)[kHeadDim / 16][4],
                                                 uint32_t (&q_value)[kHeadDim / 16][4], const uint32_t (&seen)[4],
                                                 Sums& nonfinite) const {
    uint32_t flags[kHeadDim / 16][4];
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t g = g_value[j][i];
        flags[j][i] = ptx::pack<T>(is_nonfinite_half<T>(g & 0xffff), is_nonfinite_half<T>(g >> 16));
        g_value[j][i] = without_nonfinite<T>(g), q_value[j][i] = without_nonfinite<T>(q_value[j][i]);
      }
    multiply_values<T, kHeadDim>(nonfinite, seen, flags);
  }

  /// What a tile's keys are seen from: `column`, the first of the box that sees any key of the octet, `columns` of
  /// them, those that see this lane's key, and the distance of the first from it.
  struct Columns {
    int column, columns;
    Span mine;
    int dx;
  };

  /// Adds all queries of the tile's inverse windows. `queries`: address of the unit's first query, `stats` of its
  /// statistics.
  template <bool kCareful>
  __device__ __forceinline__ void pass(uint32_t queries, uint32_t stats, const TileRows<kShape>& rows, const Columns& c,
                                       Sums& nonfinite) {
#pragma unroll 1
    for (int first = 0; first < c.columns; first += 8 * kOctets) {
      Addends<kShape, kTables> addends;
      addends.set(p, at, {c.mine.begin - first, c.mine.end - first}, c.dx + first, bias_table);
      const LaneAddresses<kHeadDim, kShape> lane(at, c.column + first);
      uint32_t row_address = queries + lane.row, transposed = queries + lane.transposed, bias = rows.bias;
      uint32_t lane_stats = stats + (c.column + first + at.g) * 16 + at.t % 2 * 4;
#pragma unroll 1
      for (int row = 0; row < rows.rows; row += kStep) {
        add_step<kCareful>(row_address, transposed, lane_stats, row, rows, addends, bias, nonfinite);
        row_address += kStep * row_bytes, transposed += kStep * row_bytes, lane_stats += kStep * row_stats;
        bias += kStep * p.bias_table.pitch;
      }
    }
  }

  __device__ __forceinline__ bool is_finite() const {
    const float witness =
        finite_witness(acc_dk, 0) + finite_witness(acc_dk, 1) + finite_witness(acc_dv, 0) + finite_witness(acc_dv, 1);
    return __all_sync(~0u, witness == 0);
  }
  __device__ __forceinline__ void take_sums(const WindowDKDV& other) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc_dk[n][e] = other.acc_dk[n][e], acc_dv[n][e] = other.acc_dv[n][e];
  }
  __device__ __forceinline__ void add(uint32_t queries, uint32_t stats, const TileRows<kShape>& rows,
                                      const Columns& columns) {
    Sums unused;
    pass<false>(queries, stats, rows, columns, unused);
  }
  /// A NaN in a key makes the statistics of the queries that see it NaN; others must not notice.
  __device__ static __noinline__ void add_with_care(WindowDKDV& tile, uint32_t queries, uint32_t stats,
                                                    TileRows<kShape> rows, Columns columns) {
    Sums nonfinite;
    set_zero(nonfinite);
    tile.template pass<true>(queries, stats, rows, columns, nonfinite);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (nonfinite[n][e] != 0) tile.acc_dv[n][e] = NAN;
  }
};

template <class T, int kHeadDim, Shape kShape, bool kTables>
struct WindowDKDVBlock {
  using Tile = WindowDKDV<T, kHeadDim, kShape, kTables>;
  static constexpr int kWords = kHeadDim / 32, kRowBytes = kHeadDim * 2;

  const WindowParams& p;
  const Place at;
  int batch, z;
  Unit unit;  // of this warp
  uint32_t shared_q, shared_dout, stats, spans, bias;

  __device__ __forceinline__ WindowDKDVBlock(const WindowParams& params, uint32_t shared)
      : p(params), at(params, kShape) {
    int block = blockIdx.x, plane = p.by_blocks.split(block);
    batch = p.by_z.split(plane), z = plane;
    const WindowMap map(p, WindowKernel::dkdv, kHeadDim, at.unit);
    unit = decode_unit<true>(p, block * p.tiling.units + at.unit);
    shared_q = shared + map.first, shared_dout = shared + map.second, stats = shared + map.stats;
    spans = shared + map.spans, bias = shared + map.bias + at.unit * p.bias_table.bytes();
    if (unit.ny > 0) load(0), fill_row_spans<true>(at, spans, unit);
    const int tail = first_of_tail(p, at, unit);
    if (tail < 0) return;
    fill_zero(at, shared_q + tail * kRowBytes, kTailKeys * kRowBytes);
    fill_zero(at, shared_dout + tail * kRowBytes, kTailKeys * kRowBytes);
    fill_zero(at, stats + tail * 16, kTailKeys * 16);
  }

  /// What the unit's keys are seen by; `of_kv`: which of the heads that share a key head.
  __device__ __forceinline__ void load(int of_kv) const {
    const int head = unit.head * p.heads_per_kv + of_kv;
    load_box<kHeadDim>(p, at, unit, p.q, plane_base<const T>(p.q, batch, z, head), p.dout,
                       plane_base<const T>(p.dout, batch, z, head), shared_q, shared_dout);
    ptx::wait_for_previous_kernel();  // which writes the statistics
    load_stats(head);
    ptx::cp_async_commit();
    if constexpr (kTables) fill_bias<T, true>(at, bias, p, head);
  }

  /// Zeros behind the last row, but not into the next unit.
  __device__ __forceinline__ void load_stats(int head) const {
    const int pitch = p.tiling.pitch, rows = unit.box_y.size(), row_stats = p.y.dilation * p.stats.y;
    const uint4* base = plane_base<const uint4>(p.stats, batch, z, head);
#pragma unroll 1
    for (int c = at.lane; c < pitch; c += 32) {
      const int x = unit.box_x.begin + detail::min(c, unit.box_x.size() - 1);
      const uint4* from = ptx::opaque(base + unit.offset(p.stats, p, unit.box_y.begin, x));
#pragma unroll 1
      for (int row = at.thread / 32; row < rows; row += at.threads / 32)
        ptx::cp_async_16(stats + (row * pitch + c) * 16, from + row * row_stats);
    }
    fill_zero(at, stats + rows * pitch * 16, detail::min(kTailKeys, (p.tiling.rows - rows) * pitch) * 16);
  }

  /// A fragments of the tile's keys.
  __device__ __forceinline__ void load_fragments(uint32_t (&a)[kHeadDim / 16][4], const Column<const T>& of,
                                                 const LaneChannels<kHeadDim>& channels, int y) const {
    uint4 words[2][kWords];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      channels.load(words[i], of.at(detail::min(y + at.row + i * second_row(kShape), unit.ny - 1)));
    make_fragments<kHeadDim>(a, words, p.zero, channels);
  }

  /// The next of the heads that share a key head; a block has one unit then.
  __device__ __forceinline__ void load_head(int of_kv) const {
    __syncthreads();  // all warps are done with the one before
    if (unit.ny > 0) load(of_kv);
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  /// Of queries that share this unit's head of keys. Bodies of flat tiles without tables are for one.
  __device__ __forceinline__ int heads() const { return kTables || kShape == Shape::square ? p.heads_per_kv : 1; }

  __device__ __forceinline__ void run() {
    const int x = unit.x0 + detail::min(at.column, unit.nx - 1), step = p.tiling.step_rows();
    const int first = seen_from<true>(unit.x, unit.x0 + at.x).begin;
    const Span seen = seen_from<true>(unit.x, x);
    typename Tile::Columns columns;
    const int last = detail::min(at.x + tile_columns(kShape), unit.nx) - 1;
    columns.columns = seen_from<true>(unit.x, unit.x0 + last).end - first;
    columns.column = first - unit.box_x.begin;
    columns.mine = {seen.begin - first, seen.end - first}, columns.dx = first - x;
    Tile tile(p, at);
    tile.weights[0] = SplitWeights<T>::fragment(at.t), tile.weights[1] = ptx::opaque(tile.weights[0], p.zero);
    tile.to_dout = shared_dout - shared_q;
    tile.row_bytes = p.tiling.pitch * kRowBytes, tile.row_stats = p.tiling.pitch * 16;
    const LaneChannels<kHeadDim> channels(p, at);
    const Column<const T> k(p, p.k, batch, z, unit, x, channels.first), v(p, p.v, batch, z, unit, x, channels.first);
    const Column<T> dk(p, p.dk, batch, z, unit, x, stored_channel(at.t));
    const Column<T> dv(p, p.dv, batch, z, unit, x, stored_channel(at.t));
    tile.bias_table = bias;
    for (int y = at.y; y < p.tiling.tile_y; y += step) {
      const bool exists = at.x < unit.nx && y < unit.ny;
      if (!exists && heads() == 1) break;
      if (exists) load_fragments(tile.k, k, channels, y), load_fragments(tile.v, v, channels, y);
      TileRows<kShape> rows(spans, at, y, unit.ny);
      if constexpr (kTables) set_bias_row(rows, p, unit, y);
      const uint32_t queries = shared_q + rows.first_row * tile.row_bytes;
      const uint32_t statistics = stats + rows.first_row * tile.row_stats;
      set_zero(tile.acc_dk), set_zero(tile.acc_dv);
      for (int i = 0; i < heads(); ++i) {
        if (i > 0) load_head(i);
        if (exists) tile.add(queries, statistics, rows, columns);
      }
      if (!all_finite(tile)) {
        Tile copy = tile;  // whose address may be taken
        set_zero(copy.acc_dk), set_zero(copy.acc_dv);
        for (int i = 0; i < heads(); ++i) {
          if (heads() > 1) load_head(i);
          if (exists) Tile::add_with_care(copy, queries, statistics, rows, columns);
        }
        tile.take_sums(copy);
      }
      if (!exists) continue;
      const auto store = [&](const Column<T>& to, const float(&acc)[kHeadDim / 8][4], float factor) {
        store_tile<T, kHeadDim>(to.at(y + at.row), second_row(kShape) * to.row, p, at, acc, factor, factor,
                                tokens_exist(kShape, at, unit, y));
      };
      if (p.dk.ptr) store(dk, tile.acc_dk, p.scale);
      if (p.dv.ptr) store(dv, tile.acc_dv, 1.0f);
    }
  }

  /// Of the warp; of the block, where its warps load one head after the other together.
  __device__ __forceinline__ bool all_finite(const Tile& tile) const {
    const bool finite = tile.is_finite();
    return heads() == 1 ? finite : !__syncthreads_or(!finite);
  }
};

template <class T, int kHeadDim, Shape kShape, bool kTables>
__device__ __forceinline__ void run_window_dkdv(const WindowParams& p, uint32_t shared) {
  WindowDKDVBlock<T, kHeadDim, kShape, kTables> block(p, shared);
  ptx::cp_async_wait<0>();
  __syncthreads();
  block.run();
}

template <class T, int kHeadDim, Shape kShape>
__global__ void __launch_bounds__(256, kHeadDim == 32 ? 2 : 1)
    window_dkdv_kernel(const __grid_constant__ WindowParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const uint32_t shared = ptx::shared_address(smem);
  if (p.bias_table.y > 0) return run_window_dkdv<T, kHeadDim, kShape, true>(p, shared);
  if (kShape == Shape::flat && p.tiling.shape == Shape::square)
    return run_window_dkdv<T, kHeadDim, Shape::square, false>(p, shared);
  run_window_dkdv<T, kHeadDim, kShape, false>(p, shared);
}

void launch_window_dkdv(const WindowParams& params, DType dtype, void* stream) {
  dispatch_window(dtype, params.head_dim, [&](auto element, auto channels) {
    using T = decltype(element);
    const size_t bytes = window_shared_bytes(params, WindowKernel::dkdv);
    const auto go = [&](auto kernel) { launch_window(kernel, params, bytes, stream, cuda::Start::overlapping); };
    if (params.tiling.shape == Shape::narrow) return go(window_dkdv_kernel<T, 32, Shape::narrow>);
    go(window_dkdv_kernel<T, channels, Shape::flat>);
  });
}

}  // namespace natten::cuda_portable
