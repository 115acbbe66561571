// SPDX-License-Identifier: MIT
// Backward for small windows, the part of the queries: dq, and the statistics that window_dkdv.cu needs.
//
// A block holds the key box of its units; a warp's tile of 2 x 8 queries walks over its key rows once:
// S = Q K^T, dP - delta = dO V^T - delta (delta is the addend of the product), dS = exp2(S - lse) * (dP - delta),
// dQ += dS K. delta = rowsum(dO * O) - dlse comes from the tile's own rows.
//
// With a bias, a block does every gridDim.x-th set of units: their head and columns are the same, so the sums of dS for
// the gradient of the bias stay in shared memory until the end, see LaneSums.
#include "cuda/launch.h"
#include "cuda/portable/row_loader.cuh"
#include "cuda/portable/window_bias.cuh"
#include "cuda/portable/window_dispatch.cuh"
#include "cuda/portable/window_stats.cuh"
#include "cuda/ptx/grid.cuh"

namespace natten::cuda_portable {

template <class T, int kHeadDim, Shape kShape, bool kBias>
struct WindowDQ {
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2, kOctets = step_octets(kShape);
  static constexpr int kStep = 3 - kOctets;  // key rows of a step of 16 keys

  const WindowParams& p;
  const Place at;
  uint32_t q[kHeadDim / 16][4], dout[kHeadDim / 16][4];
  Addends<kShape, kBias> addends;
  uint32_t bias_sums;  // address of this lane's
  float lse_log2[2], minus_delta[4];
  uint32_t lane_row, lane_transposed, to_v, row_bytes;
  float acc[kHeadDim / 8][4];

  __device__ __forceinline__ WindowDQ(const WindowParams& params, const Place& place) : p(params), at(place) {}

  template <bool kCareful>
  __device__ __forceinline__ void pass(uint32_t offset, const TileRows<kShape>& rows) {
    set_zero(acc);
    uint32_t bias = rows.bias;
    LaneSums sums;
    if (kBias && !kCareful) sums.start(bias_sums, rows.bias_index);
#pragma unroll 1
    for (int row = 0; row < rows.rows; row += kStep, offset += kStep * row_bytes) {
      const bool second_row = row + 1 < rows.rows;
      const uint32_t to_second = kOctets == 2 ? 8 * kKeyBytes : second_row ? row_bytes : 0;
      const uint32_t keys = lane_row + offset;
      uint4 k[2][kWords], v[2][kWords];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        load_key<kHeadDim>(k[h], keys + h * to_second);
        load_key<kHeadDim>(v[h], keys + h * to_second + to_v);
      }
      float s[2][4], dp[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float addend[4];
        addends.load(addend, kOctets == 2 ? h : 0, bias + (kOctets == 2 ? 0 : h * p.bias_table.pitch));
        multiply_keys<T, kHeadDim>(s[h], q, k[h], addend);
        multiply_keys<T, kHeadDim>(dp[h], dout, v[h], minus_delta);
      }
      uint32_t value[kHeadDim / 16][4], ds[4];
      const bool other_row = kOctets == 1 && (at.lane & 8) && second_row;
      load_transposed<kHeadDim>(value, lane_transposed + offset + (other_row ? row_bytes : 0));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key_row = kOctets == 2 ? row : row + h;
        const bool sees[2] = {rows.sees(0, key_row), rows.sees(1, key_row)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float addend = sees[e / 2] ? -lse_log2[e / 2] : -INFINITY;
          s[h][e] = ptx::exp2_approx(fmaf(s[h][e], p.scale_log2, addend)) * dp[h][e];
          if (kCareful && !(sees[e / 2] && addends.sees(kOctets == 2 ? h : 0, e))) s[h][e] = 0;
        }
        ds[2 * h] = ptx::pack<T>(s[h][0], s[h][1]), ds[2 * h + 1] = ptx::pack<T>(s[h][2], s[h][3]);
      }
      if (kBias && !kCareful) add_to_bias(sums, s);
      bias += kStep * p.bias_table.pitch;
      if (kCareful) clean(value);
      multiply_values<T, kHeadDim>(acc, ds, value);
    }
    if (kBias && !kCareful) sums.finish();
  }

  __device__ static __forceinline__ void add_to_bias(LaneSums& sums, const float (&ds)[2][4]) {
    if (kOctets == 1) return sums.add_row(ds[0]), sums.add_row(ds[1]);
    sums.add_row({ds[0][0] + ds[1][0], ds[0][1] + ds[1][1], ds[0][2] + ds[1][2], ds[0][3] + ds[1][3]});
  }

  __device__ static __forceinline__ void clean(uint32_t (&value)[kHeadDim / 16][4]) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) value[j][i] = without_nonfinite<T>(value[j][i]);
  }

  /// Whether the sums are finite. If not, it may come from keys that are not seen: then `again`, with care.
  __device__ __forceinline__ bool attend(uint32_t offset, const TileRows<kShape>& rows) {
    pass<false>(offset, rows);
    return __all_sync(~0u, finite_witness(acc, 0) + finite_witness(acc, 1) == 0);
  }
  __device__ static __noinline__ void again(WindowDQ& tile, uint32_t offset, TileRows<kShape> rows) {
    tile.template pass<true>(offset, rows);
  }
};

template <class T, int kHeadDim, Shape kShape, bool kBias>
struct WindowDQBlock {
  using Tile = WindowDQ<T, kHeadDim, kShape, kBias>;
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2;

  const WindowParams& p;
  const Place at;
  int batch, z;
  Unit unit;  // of this warp
  uint32_t shared_k, shared_v, spans, bias;

  __device__ __forceinline__ WindowDQBlock(const WindowParams& params, uint32_t shared, int block)
      : p(params), at(params, kShape) {
    int plane = p.by_blocks.split(block);
    batch = p.by_z.split(plane), z = plane;
    const WindowMap map(p, WindowKernel::dq, kHeadDim, at.unit);
    unit = decode_unit<false>(p, block * p.tiling.units + at.unit);
    shared_k = shared + map.first, shared_v = shared + map.second;
    spans = shared + map.spans, bias = shared + map.bias;
    if (unit.ny > 0) {
      const int head_kv = unit.head / p.heads_per_kv;
      load_box<kHeadDim>(p, at, unit, p.k, plane_base<const T>(p.k, batch, z, head_kv), p.v,
                         plane_base<const T>(p.v, batch, z, head_kv), shared_k, shared_v);
      fill_row_spans<false>(at, spans, unit);
    }
    ptx::cp_async_commit();
    const int tail = first_of_tail(p, at, unit);
    if (tail < 0) return;
    fill_zero(at, shared_k + tail * kKeyBytes, kTailKeys * kKeyBytes);
    fill_zero(at, shared_v + tail * kKeyBytes, kTailKeys * kKeyBytes);
  }

  __device__ __forceinline__ uint32_t bias_of_unit() const { return bias + at.unit * p.bias_table.bytes(); }
  __device__ __forceinline__ BiasSums bias_sums() const {
    return BiasSums(p, bias + p.tiling.units * p.bias_table.bytes());
  }
  /// The tables of the bias and of its gradient, for all sets of units: the first of them may be empty.
  __device__ __forceinline__ void start_bias() const {
    fill_bias<T, false>(at, bias_of_unit(), p, unit.head);
    bias_sums().clear(at);
  }

  /// What a tile's two rows bring along, 16 bytes of each row per lane.
  struct Loaded {
    uint4 q[2][kWords], dout[2][kWords], out[2][kWords];
    float lse[2], dlse[2];
  };

  /// The tensors that a lane reads, at its column.
  struct Columns {
    Column<const T> q, dout, out;
    Column<const float> lse, dlse;
  };

  __device__ __forceinline__ Loaded load_tile(const Columns& of, const LaneChannels<kHeadDim>& channels, int y) const {
    Loaded l;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = detail::min(y + at.row + i * second_row(kShape), unit.ny - 1);
      channels.load(l.q[i], of.q.at(row)), channels.load(l.dout[i], of.dout.at(row));
      channels.load(l.out[i], of.out.at(row));
      l.lse[i] = ptx::load_global_32(of.lse.at(row));
      l.dlse[i] = p.dlse.ptr ? ptx::load_global_32(of.dlse.at(row)) : 0.0f;
    }
    return l;
  }

  /// Begins when the block's loads are under way.
  __device__ __forceinline__ void run() {
    constexpr bool kPrefetch = kHeadDim == 64;  // with 32 channels no registers are left for the next tile's rows
    const bool has_column = at.column < unit.nx;
    const int x = unit.x0 + detail::min(at.column, unit.nx - 1), step = p.tiling.step_rows();
    const LaneChannels<kHeadDim> channels(p, at);
    const Columns columns{{p, p.q, batch, z, unit, x, channels.first},
                          {p, p.dout, batch, z, unit, x, channels.first},
                          {p, p.out, batch, z, unit, x, channels.first},
                          {p, p.lse, batch, z, unit, x},
                          {p, p.dlse, batch, z, unit, x}};
    Loaded l{};
    if (kPrefetch && at.x < unit.nx) l = load_tile(columns, channels, at.y);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (at.x >= unit.nx) return;
    const Span first = seen_from<false>(unit.x, unit.x0 + at.x), mine = seen_from<false>(unit.x, x);
    Tile tile(p, at);
    // No dS of a column that does not exist: it repeats the last one.
    const Span seen = kBias && !has_column ? Span{x, x} : mine;
    tile.addends.set(p, at, {seen.begin - first.begin, seen.end - first.begin}, first.begin - x, bias_of_unit());
    if constexpr (kBias) {
      const BiasSums sums = bias_sums();
      sums.set_column(at, seen, x);
      tile.bias_sums = sums.of_lane(at);
    }
    const LaneAddresses<kHeadDim, kShape> lane(at, first.begin - unit.box_x.begin);
    tile.lane_row = shared_k + lane.row, tile.lane_transposed = shared_k + lane.transposed;
    tile.to_v = shared_v - shared_k, tile.row_bytes = p.tiling.pitch * kKeyBytes;
    const Column<T> dq(p, p.dq, batch, z, unit, x, stored_channel(at.t));
    const Column<uint4> stats(p, p.stats, batch, z, unit, x);
    for (int y = at.y; y < unit.ny; y += step) {
      const Exist exist = tokens_exist(kShape, at, unit, y);
      if (!kPrefetch) l = load_tile(columns, channels, y);
      take(tile, l, channels);
      if (exist.first && at.t == 0) store_stats(tile, stats, y, exist.second, l);
      if (kPrefetch) l = load_tile(columns, channels, y + step);
      TileRows<kShape> rows(spans, at, y, unit.ny);
      if constexpr (kBias) {
        set_bias_row(rows, p, unit, y);
        if (y + 1 == unit.ny) rows.begin[1] = rows.rows;  // nor of a row
      }
      const uint32_t offset = rows.first_row * tile.row_bytes;
      const auto store = [&](const Tile& result) {
        if (p.dq.ptr)
          store_tile<T, kHeadDim>(dq.at(y + at.row), second_row(kShape) * dq.row, p, at, result.acc, p.scale, p.scale,
                                  exist);
      };
      if (tile.attend(offset, rows)) {
        store(tile);
      } else {
        Tile copy = tile;  // whose address may be taken
        Tile::again(copy, offset, rows);
        store(copy);
      }
    }
  }

  __device__ __forceinline__ void take(Tile& tile, const Loaded& l, const LaneChannels<kHeadDim>& channels) const {
    constexpr float kLog2e = 1.44269504088896341f;
    make_fragments<kHeadDim>(tile.q, l.q, p.zero, channels);
    make_fragments<kHeadDim>(tile.dout, l.dout, p.zero, channels);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float delta = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const float sum = dot_words<T>(l.dout[i][w], l.out[i][w]);
        delta += w + 1 < kWords || channels.mask ? sum : 0.0f;
      }
      const float minus_delta = l.dlse[i] - add_over_quad(delta);
      tile.minus_delta[2 * i] = minus_delta, tile.minus_delta[2 * i + 1] = minus_delta + p.zero_float;
      // A query to which the bias leaves no key has probabilities 0.
      tile.lse_log2[i] = kBias && l.lse[i] == -INFINITY ? INFINITY : l.lse[i] * kLog2e;
    }
  }

  __device__ __forceinline__ void store_stats(const Tile& tile, const Column<uint4>& stats, int y, bool has_second,
                                              const Loaded& l) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && !has_second) continue;
      const float lse = kBias && l.lse[i] == -INFINITY ? 0 : l.lse[i];  // logits are -infinity already
      const uint2 a = SplitWeights<T>::split(-lse * p.inverse_scale);
      const uint2 b = SplitWeights<T>::split(tile.minus_delta[2 * i]);
      ptx::store_global_128(stats.at(y + at.row + i * second_row(kShape)), uint4{a.x, a.y, b.x, b.y});
    }
  }
};

template <class T, int kHeadDim, Shape kShape, bool kBias>
__device__ __forceinline__ void run_window_dq(const WindowParams& p, uint32_t shared) {
  for (int64_t i = blockIdx.x; i < p.num_blocks; i += gridDim.x) {
    WindowDQBlock<T, kHeadDim, kShape, kBias> block(p, shared, int(i));
    if (kBias && i == blockIdx.x) block.start_bias();
    block.run();
    if (!kBias) return;
    __syncthreads();
    if (i + gridDim.x >= p.num_blocks && p.bias_sums) block.bias_sums().store();
  }
}

template <class T, int kHeadDim, Shape kShape>
__global__ void __launch_bounds__(256, kHeadDim == 32 ? 2 : 1)
    window_dq_kernel(const __grid_constant__ WindowParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const uint32_t shared = ptx::shared_address(smem);
  ptx::let_next_kernel_start();
  if (p.bias_table.y > 0) return run_window_dq<T, kHeadDim, kShape, true>(p, shared);
  if (kShape == Shape::flat && p.tiling.shape == Shape::square)
    return run_window_dq<T, kHeadDim, Shape::square, false>(p, shared);
  run_window_dq<T, kHeadDim, kShape, false>(p, shared);
}

void launch_window_dq(const WindowParams& params, DType dtype, void* stream) {
  dispatch_window(dtype, params.head_dim, [&](auto element, auto channels) {
    using T = decltype(element);
    const size_t bytes = window_shared_bytes(params, WindowKernel::dq);
    const auto go = [&](auto kernel) { launch_window(kernel, params, bytes, stream); };
    if (params.tiling.shape == Shape::narrow) return go(window_dq_kernel<T, 32, Shape::narrow>);
    go(window_dq_kernel<T, channels, Shape::flat>);
  });
}

}  // namespace natten::cuda_portable
