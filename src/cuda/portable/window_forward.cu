// SPDX-License-Identifier: MIT
// Forward for small windows. A warp's tile of 2 x 8 queries meets its key rows one after the other (window.h).
//
// NOTE: no maximum is taken first. exp2(logit) needs none in fp32 and bfloat16 as long as logits stay within some 46 of
// zero; a tile whose sums leave the safe range, or are not finite, is computed again by `again`, rarely. That saves the
// registers of all scores and all shuffles of a maximum: 30 % more warps per multiprocessor. A half would overflow, so
// with f16 the maximum comes first, from an extra pass over the keys.
#include "cuda/launch.h"
#include "cuda/portable/row_loader.cuh"
#include "cuda/portable/window_bias.cuh"
#include "cuda/portable/window_dispatch.cuh"
#include "cuda/ptx/grid.cuh"

namespace natten::cuda_portable {

template <class T, int kHeadDim, Shape kShape, bool kRing, bool kBias>
struct WindowForward {
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2, kOctets = step_octets(kShape);
  static constexpr int kStep = kOctets == 2 ? 2 : 4;  // key rows of an iteration: two steps of 16 keys
  static constexpr bool kMaximumFirst = std::is_same_v<T, f16>;
  static constexpr float kSmallestWeight = std::is_same_v<T, f16> ? 1.0f / 256 : 1;  // see count_nonfinite

  const WindowParams& p;
  const Place at;
  uint32_t q[kHeadDim / 16][4];  // A fragments
  Addends<kShape, kBias> addends;
  uint32_t lane_k, lane_v;  // addresses of the first key row's fragments
  uint32_t row_bytes, ring_bytes;

  float acc_o[kHeadDim / 8][4];
  float row_sum[2];    // exact, for the log-sum-exp
  float acc_sum[4];    // of the rounded probabilities, in elements 0 and 2: what acc_o is divided by
  float reference[2];  // base-2 logit that counts as 0

  __device__ __forceinline__ WindowForward(const WindowParams& params, const Place& place) : p(params), at(place) {}

  __device__ __forceinline__ uint32_t next_row(uint32_t offset) const {
    offset += row_bytes;
    return kRing ? min(offset, offset - ring_bytes) : offset;  // unsigned: the difference of a smaller one is huge
  }

  /// Logits before the scale, of 8 keys; `bias`: see TileRows.
  __device__ __forceinline__ void scores(float (&s)[4], uint32_t offset, uint32_t bias, int octet) const {
    uint4 key[kWords];
    float addend[4];
    load_key<kHeadDim>(key, lane_k + offset + octet * 8 * kKeyBytes);
    addends.load(addend, octet, bias);
    multiply_keys<T, kHeadDim>(s, q, key, addend);
  }

  /// One step of 16 keys: rows `row` (and `row + 1`, if an octet is all there is of a row).
  template <bool kCareful>
  __device__ __forceinline__ void add_step(const float (&s)[2][4], int row, uint32_t offset0, uint32_t offset1,
                                           const TileRows<kShape>& rows, float (&nonfinite)[kHeadDim / 8][4]) {
    uint32_t value[kHeadDim / 16][4], probability[4], visible[4];
    load_transposed<kHeadDim>(value, lane_v + (kOctets == 1 && (at.lane & 8) ? offset1 : offset0));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key_row = kOctets == 2 ? row : row + h;
      const bool sees[2] = {rows.sees(0, key_row), rows.sees(1, key_row)};
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float addend = sees[e / 2] ? -reference[e / 2] : -INFINITY;
        x[e] = ptx::exp2_approx(fmaf(s[h][e], p.scale_log2, addend));
        const bool visible_key = sees[e / 2] && addends.sees(kOctets == 2 ? h : 0, e);
        if (kCareful && !visible_key) x[e] = 0;
      }
      row_sum[0] += x[0] + x[1], row_sum[1] += x[2] + x[3];
      probability[2 * h] = ptx::pack<T>(x[0], x[1]), probability[2 * h + 1] = ptx::pack<T>(x[2], x[3]);
      if (!kCareful) continue;
      const int octet = kOctets == 2 ? h : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        visible[2 * h + i] = ptx::pack<T>(sees[i] && addends.sees(octet, 0), sees[i] && addends.sees(octet, 1));
    }
    if (kCareful) count_nonfinite(value, visible, nonfinite);
    multiply_values<T, kHeadDim>(acc_o, probability, value);
    // NOTE: without a maximum no probability is exactly 1, and dividing by the exact sum would err by a fifth more.
    const uint32_t ones = ptx::pack<T>(1, 1);
    ptx::mma_16816<T>(acc_sum, probability, ones, ones);
  }

  /// NaN counts 1, infinity 2^8, -infinity 2^16 of the smallest weight: at most 255 keys are seen, so a float holds all
  /// three counts. They leave `value`, so that 0 * NaN does not reach the queries that do not see them.
  __device__ __forceinline__ void count_nonfinite(uint32_t (&value)[kHeadDim / 16][4], const uint32_t (&visible)[4],
                                                  float (&nonfinite)[kHeadDim / 8][4]) const {
    constexpr uint32_t kInfinity = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
    const auto weight = [](uint32_t half) {
      return !is_nonfinite_half<T>(half)     ? 0.0f
             : half == kInfinity             ? kSmallestWeight * 256
             : half == (kInfinity | 0x8000u) ? kSmallestWeight * 65536
                                             : kSmallestWeight;
    };
    uint32_t weights[kHeadDim / 16][4];
#pragma unroll
    for (int j = 0; j < kHeadDim / 16; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weights[j][i] = ptx::pack<T>(weight(value[j][i] & 0xffff), weight(value[j][i] >> 16));
        value[j][i] = without_nonfinite<T>(value[j][i]);
      }
    multiply_values<T, kHeadDim>(nonfinite, visible, weights);
  }

  /// All key rows of the tile, from `offset` on. kCareful: what is not seen is left out by selection, not by adding
  /// -infinity, and non-finite values are counted.
  template <bool kCareful>
  __device__ __forceinline__ void pass(uint32_t offset, const TileRows<kShape>& rows,
                                       float (&nonfinite)[kHeadDim / 8][4]) {
    set_zero(acc_o);
    row_sum[0] = row_sum[1] = 0;
    acc_sum[0] = acc_sum[1] = acc_sum[2] = acc_sum[3] = 0;
    const uint32_t bias_pitch = kBias ? p.bias_table.pitch : 0;
    uint32_t bias = rows.bias;
#pragma unroll 1
    for (int row = 0; row < rows.rows; row += kStep, bias += kStep * bias_pitch) {
      uint32_t of[kStep];  // rows past the last one repeat it and are masked
      of[0] = offset;
#pragma unroll
      for (int i = 1; i < kStep; ++i) of[i] = row + i < rows.rows ? next_row(of[i - 1]) : of[i - 1];
      float s[2][2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = kOctets == 2 ? k : 2 * k + h;
          scores(s[k][h], of[i], bias + i * bias_pitch, kOctets == 2 ? h : 0);
        }
#pragma unroll
      for (int k = 0; k < 2; ++k)
        add_step<kCareful>(s[k], row + (kOctets == 2 ? k : 2 * k), of[kOctets == 2 ? k : 2 * k],
                           of[kOctets == 2 ? k : 2 * k + 1], rows, nonfinite);
      offset = next_row(of[kStep - 1]);
    }
    row_sum[0] = add_over_quad(row_sum[0]), row_sum[1] = add_over_quad(row_sum[1]);
  }

  /// The true maximum as reference, of rows that are not `good`.
  __device__ __forceinline__ void take_maximum(uint32_t offset, const TileRows<kShape>& rows, bool good0, bool good1) {
    float maximum[2] = {-INFINITY, -INFINITY};
    uint32_t bias = rows.bias;
#pragma unroll 1
    for (int row = 0; row < rows.rows; ++row, offset = next_row(offset), bias += p.bias_table.pitch)
#pragma unroll
      for (int h = 0; h < kOctets; ++h) {
        float s[4];
        scores(s, offset, bias, h);
        if (rows.sees(0, row)) maximum[0] = fmaxf(maximum[0], fmaxf(s[0], s[1]));
        if (rows.sees(1, row)) maximum[1] = fmaxf(maximum[1], fmaxf(s[2], s[3]));
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[i] = fmaxf(maximum[i], __shfl_xor_sync(~0u, maximum[i], 1));
      maximum[i] = fmaxf(maximum[i], __shfl_xor_sync(~0u, maximum[i], 2));
      if (kBias && maximum[i] == -INFINITY) maximum[i] = 0;  // the bias leaves it no key
    }
    if (!good0) reference[0] = maximum[0] * p.scale_log2;
    if (!good1) reference[1] = maximum[1] * p.scale_log2;
  }

  __device__ __forceinline__ bool is_good(int row) const {
    const bool in_range =
        kMaximumFirst ? row_sum[row] == row_sum[row] : (row_sum[row] > 1e-20f) & (row_sum[row] < 1e20f);
    return in_range & (finite_witness(acc_o, row) == 0);
  }

  /// Rows whose sums were good keep their reference and hence their bits.
  __device__ __forceinline__ void compute_again(uint32_t offset, const TileRows<kShape>& rows) {
    float nonfinite[kHeadDim / 8][4];
#pragma unroll 1
    for (int attempt = 0; attempt < 2; ++attempt) {
      set_zero(nonfinite);
      pass<true>(offset, rows, nonfinite);
      const bool good0 = is_good(0), good1 = is_good(1);
      if (attempt == 1 || __all_sync(~0u, good0 && good1)) break;
      take_maximum(offset, rows, quad_all(good0), quad_all(good1));
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int count = int(nonfinite[n][e] / kSmallestWeight);
        if (count & 255) acc_o[n][e] = NAN;
        if (count >> 8 & 255) acc_o[n][e] += INFINITY;
        if (count >> 16) acc_o[n][e] -= INFINITY;
      }
  }

  __device__ __forceinline__ bool quad_all(bool x) const {
    return (__ballot_sync(~0u, x) >> (at.lane & ~3) & 15) == 15;
  }

  /// Whether the results are right; if not, they need `again`.
  __device__ __forceinline__ bool attend(uint32_t offset, const TileRows<kShape>& rows) {
    reference[0] = reference[1] = 0;
    if (kMaximumFirst) take_maximum(offset, rows, false, false);
    float unused[kHeadDim / 8][4];
    pass<false>(offset, rows, unused);
    return __all_sync(~0u, is_good(0) && is_good(1));
  }

  /// NOTE: a function of its own, so that its registers are not spilled in every tile.
  __device__ static __noinline__ void again(WindowForward& tile, uint32_t offset, TileRows<kShape> rows) {
    tile.compute_again(offset, rows);
  }
};

template <class T, int kHeadDim, Shape kShape, bool kRing, bool kBias>
struct WindowForwardBlock {
  using Tile = WindowForward<T, kHeadDim, kShape, kRing, kBias>;
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2;

  const WindowParams& p;
  const Place at;
  int batch, z;
  Unit unit;  // of this warp
  uint32_t shared_k, shared_v, spans, bias;
  RowLoader<kHeadDim, true> ring;

  __device__ __forceinline__ WindowForwardBlock(const WindowParams& params, uint32_t shared)
      : p(params), at(params, kShape) {
    int block = blockIdx.x, plane = p.by_blocks.split(block);
    batch = p.by_z.split(plane), z = plane;
    const WindowMap map(p, WindowKernel::forward, kHeadDim, at.unit);
    unit = decode_unit<false>(p, block * p.tiling.units + at.unit);
    shared_k = shared + map.first, shared_v = shared + map.second;
    spans = shared + map.spans, bias = shared + map.bias + at.unit * p.bias_table.bytes();
    if (unit.ny > 0) load_rows(), fill_row_spans<false>(at, spans, unit);
    ptx::cp_async_commit();
    if (kBias && unit.ny > 0) fill_bias<T, false>(at, bias, p, unit.head);
    const int tail = first_of_tail(p, at, unit);
    if (tail < 0) return;
    fill_zero(at, shared_k + tail * kKeyBytes, kTailKeys * kKeyBytes);
    fill_zero(at, shared_v + tail * kKeyBytes, kTailKeys * kKeyBytes);
  }

  __device__ __forceinline__ void load_rows() {
    const T* k = plane_base<const T>(p.k, batch, z, unit.head / p.heads_per_kv);
    const T* v = plane_base<const T>(p.v, batch, z, unit.head / p.heads_per_kv);
    if (!kRing) return load_box<kHeadDim>(p, at, unit, p.k, k, p.v, v, shared_k, shared_v);
    ring = RowLoader<kHeadDim, true>(p, at, unit, p.k, k, p.v, v, shared_k, shared_v);
    ring.load(p, p.k, p.v, p.tiling.rows);
    clear_missing_channels<kHeadDim>(p, at, shared_k, shared_v);
  }

  __device__ __forceinline__ void run() {
    const int step = p.tiling.step_rows(), steps = (unit.ny + step - 1) / step;
    const bool has_columns = at.x < unit.nx;
    const int x = unit.x0 + detail::min(at.column, unit.nx - 1);
    const LaneChannels<kHeadDim> channels(p, at);
    const Column<const T> q(p, p.q, batch, z, unit, x, channels.first);
    const Column<T> out(p, p.out, batch, z, unit, x, stored_channel(at.t));
    const Column<float> lse(p, p.lse, batch, z, unit, x);
    uint4 next[2][kWords];
    const auto load_queries = [&](int y) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        channels.load(next[i], q.at(detail::min(y + at.row + i * second_row(kShape), unit.ny - 1)));
    };
    if (has_columns) load_queries(at.y);

    const Span first = seen_from<false>(unit.x, unit.x0 + detail::min(at.x, unit.nx - 1));
    const Span mine = seen_from<false>(unit.x, x);
    Tile tile(p, at);
    tile.addends.set(p, at, {mine.begin - first.begin, mine.end - first.begin}, first.begin - x, bias);
    const LaneAddresses<kHeadDim, kShape> lane(at, has_columns ? first.begin - unit.box_x.begin : 0);
    tile.lane_k = shared_k + lane.row, tile.lane_v = shared_v + lane.transposed;
    tile.row_bytes = p.tiling.pitch * kKeyBytes, tile.ring_bytes = p.tiling.rows * tile.row_bytes;

    if (!kRing) {
      ptx::cp_async_wait<0>();
      __syncthreads();
    }
    for (int i = 0; i < steps; ++i) {
      if (kRing) advance_ring(i, steps, step);
      const int y = i * step + at.y;
      if (!has_columns || y >= unit.ny) continue;
      // Unmasked: what stands in place of channels that do not exist is the query's own, and keys have zeros there.
      make_fragments<kHeadDim>(tile.q, next, p.zero);
      load_queries(y + step);
      TileRows<kShape> rows(spans, at, y, unit.ny);
      if constexpr (kBias) set_bias_row(rows, p, unit, y);
      int slot = rows.first_row;
      if (kRing) p.by_rows.split(slot);
      const uint32_t offset = slot * tile.row_bytes;
      const auto store = [&](const Tile& result) {
        const Exist exist = tokens_exist(kShape, at, unit, y);  // not before: it would cost the loop registers
        // The bias may leave a query no key: 0, not 0 * infinity.
        const auto factor = [](float sum) { return ptx::reciprocal_approx(kBias ? fmaxf(sum, 1e-37f) : sum); };
        store_tile<T, kHeadDim>(out.at(y + at.row), second_row(kShape) * out.row, p, at, result.acc_o,
                                factor(result.acc_sum[0]), factor(result.acc_sum[2]), exist);
        if (p.lse.ptr && exist.first && at.t == 0)
          store_lse(result, lse.at(y + at.row), exist.second ? second_row(kShape) * lse.row : 0);
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

  /// The rows of this step are here, and those of the next one under way.
  __device__ __forceinline__ void advance_ring(int i, int steps, int step) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < steps) {
      const int last = detail::min((i + 2) * step, unit.ny) - 1;
      ring.load(p, p.k, p.v, int(ptx::load_shared_32(spans + last * 8 + 4)));
    }
    ptx::cp_async_commit();
  }

  /// NOTE: without a second row, once more the first.
  __device__ __forceinline__ void store_lse(const Tile& tile, float* lse, int to_second) const {
    constexpr float kLn2 = 0.693147180559945f;
    const float first = kLn2 * (tile.reference[0] + ptx::log2_approx(tile.row_sum[0]));
    const float second = kLn2 * (tile.reference[1] + ptx::log2_approx(tile.row_sum[1]));
    ptx::store_global_32(lse + to_second, to_second ? second : first);
    ptx::store_global_32(lse, first);
  }
};

template <class T, int kHeadDim, Shape kShape, bool kRing, bool kBias>
__device__ __forceinline__ void run_window_forward(const WindowParams& p) {
  extern __shared__ __align__(128) unsigned char smem[];
  ptx::let_next_kernel_start();
  WindowForwardBlock<T, kHeadDim, kShape, kRing, kBias> block(p, ptx::shared_address(smem));
  if (!kRing || block.unit.ny > 0) block.run();
  ptx::wait_for_previous_kernel();  // so that a kernel behind this one finds both done
}

/// NOTE: a bias has instances of its own: in one kernel with the others it made those spill registers.
template <class T, int kHeadDim, Shape kShape, bool kRing, bool kBias>
__global__ void __launch_bounds__(kRing ? 32 * most_flat_warps(kHeadDim) : 128, kHeadDim == 32 ? 4 : 2)
    window_forward_kernel(const __grid_constant__ WindowParams p) {
  run_window_forward<T, kHeadDim, kShape, kRing, kBias>(p);
}

/// Fewer warps fit beside so many keys, so they have registers for both. Groups that need no ring see few columns.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kMostSquareWarps * 32, kHeadDim == 32 ? 2 : 1)
    window_forward_square_kernel(const __grid_constant__ WindowParams p) {
  if (p.bias_table.y > 0) return run_window_forward<T, kHeadDim, Shape::square, true, true>(p);
  run_window_forward<T, kHeadDim, Shape::square, true, false>(p);
}

template <class T, int kHeadDim, bool kBias>
void launch_window_forward(const WindowParams& params, void* stream, cuda::Start start) {
  const auto go = [&](auto kernel) {
    launch_window(kernel, params, window_shared_bytes(params, WindowKernel::forward), stream, start);
  };
  if (params.tiling.shape == Shape::square) return go(window_forward_square_kernel<T, kHeadDim>);
  if (params.tiling.ring) return go(window_forward_kernel<T, kHeadDim, Shape::flat, true, kBias>);
  if (kHeadDim == 32 && params.tiling.shape == Shape::narrow)
    return go(window_forward_kernel<T, 32, Shape::narrow, false, kBias>);
  go(window_forward_kernel<T, kHeadDim, Shape::flat, false, kBias>);
}

void launch_window_forward(const WindowParams& params, DType dtype, void* stream, bool overlapping) {
  const auto start = overlapping ? cuda::Start::overlapping : cuda::Start::after_previous;
  dispatch_window(dtype, params.head_dim, [&](auto element, auto channels) {
    using T = decltype(element);
    if (params.bias_table.y > 0) return launch_window_forward<T, channels, true>(params, stream, start);
    launch_window_forward<T, channels, false>(params, stream, start);
  });
}

}  // namespace natten::cuda_portable
