// SPDX-License-Identifier: MIT
// What the host tells the "window" kernels: small windows on planes, close to the speed of memory.
//
// Source of the design and its measurements: docs/design/2026-11-24-cuda-portable.md. In short:
//
//   * A warp works on 16 queries, 2 rows x 8 columns, or 4 x 4 if windows are wider than 9. Their windows touch at
//     most 16 columns (two octets) of any key row, so a key row is one step of 16 keys and the loop divides nothing.
//   * The column mask depends on lane and octet only: two register quads (0 or -infinity) that are the *addend* of
//     the first mma. The row mask touches the first and last rows only. Both come from tables of spans, so border,
//     causality and stride cost nothing and need no code of their own.
//   * Wide planes: a block of threads walks down a strip of columns, key rows stream through a ring in shared memory.
//     Small groups: a block holds whole groups.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/fast_div.h"
#include "natten/attention.h"

namespace natten::cuda_portable {

constexpr int kMostSquareWarps = 8;  ///< of a block, forward; by their registers, two of those fit (one of 64 channels)
constexpr int kTailKeys = 16;        ///< zeros behind the last row: a step may read that far past a row's end

/// A tensor by element strides, which fit 32 bits, as do offsets inside a plane (y and x are of tokens).
struct Plane {
  void* ptr = nullptr;
  uint32_t batch = 0, z = 0, head = 0;
  int y = 0, x = 0;
};

/// The 16 queries (or keys) of a warp's tile, and the 16 keys (or queries) of one step.
enum class Shape {
  narrow,  ///< 2 x 8 tokens of groups with at most 8 columns: a step is two rows of 8
  flat,    ///< 2 x 8 tokens: a step is 16 columns of a row
  square,  ///< 4 x 4 tokens, which see fewer columns: steps as in `flat`
};
NATTEN_HD constexpr int tile_rows(Shape shape) { return shape == Shape::square ? 4 : 2; }
NATTEN_HD constexpr int second_row(Shape shape) { return tile_rows(shape) / 2; }  ///< from a lane's first token on
NATTEN_HD constexpr int tile_columns(Shape shape) { return 16 / tile_rows(shape); }
NATTEN_HD constexpr int step_octets(Shape shape) { return shape == Shape::narrow ? 1 : 2; }

/// How a plane is cut into units, and a block of threads into warps. A unit is a tile of one head and dilation group.
struct WindowTiling {
  Shape shape = Shape::flat;
  int tile_y = 0, tile_x = 0;    ///< tokens of a unit: whole tiles of warps
  int tiles_y = 0, tiles_x = 0;  ///< of the longest group
  int units = 1;                 ///< of one block of threads
  int warps_y = 1;               ///< warps of a unit below each other
  bool ring = false;
  int rows = 0, pitch = 0;  ///< of the other side in shared memory, per unit; pitch is a multiple of 8

  NATTEN_HD int warps_x() const { return tile_x / tile_columns(shape); }
  NATTEN_HD int step_rows() const { return warps_y * tile_rows(shape); }  ///< that all warps do together
};

constexpr int kBiasSumPitch = 256;  ///< bytes per dy of a warp's sums: two floats of every lane

/// Tables of a relative position bias in shared memory, and of sums for its gradient (window_bias.cuh). The n rows of a
/// tile meet dy = 2 - y - n .. y + n - 2; iterations of the forward kernel may read three more.
struct WindowBias {
  int y = 0, x = 0;  ///< windows, cut to the longest group; 0: no bias
  int origin = 0;    ///< row of dy = 0
  uint32_t pitch = 0, kind_bytes = 0;

  WindowBias() = default;
  WindowBias(int window_y, int window_x, Shape shape)
      : y(window_y), x(window_x), origin(window_y + tile_rows(shape) - 2), pitch(2 * window_x * 8) {
    kind_bytes = (rows() * pitch + 127) / 128 * 128;
  }
  NATTEN_HD int rows() const { return 2 * origin + 4; }
  NATTEN_HD int bytes() const { return 3 * int(kind_bytes); }
  NATTEN_HD int sum_bytes() const { return (2 * y + 2) * kBiasSumPitch; }
};

struct WindowParams {
  int head_dim = 0;  ///< channels beyond it are zeros in registers and shared memory
  Axis y, x;
  int planes_z = 1;  ///< planes of a sample
  int heads_per_kv = 1;
  Plane q, k, v, out, dout, dq, dk, dv, lse, dlse;
  Plane stats;  ///< 16 bytes per query: -lse / scale and -delta, each in three elements (see dkdv)
  WindowTiling tiling;
  int units_per_plane = 0;
  int64_t num_blocks = 0;
  int grid = 0;  ///< blocks that are launched: fewer than `num_blocks` if each does several (dq with a bias)
  Plane bias;    ///< [y, x, head]
  WindowBias bias_table;
  FastDiv by_bias_columns;
  float inverse_scale = 1;
  float* bias_sums = nullptr;  ///< [heads, tables, entries] of dS
  int bias_sum_tables = 0;     ///< per head
  FastDiv by_blocks, by_z, by_heads, by_groups_x, by_tiles_x, by_tiles_y, by_rows, by_warps_x, by_unit_warps;
  FastDiv by_dilation_y, by_dilation_x;
  FastDiv by_row_threads;               ///< threads that load a row of the other side
  int rows_at_once = 1, row_parts = 1;  ///< rows that the threads of a unit load in a pass, or passes of a row
  float scale = 1, scale_log2 = 1;
  uint32_t zero = 0;  ///< 0, unknown to the compiler: see ptx::opaque
  float zero_float = 0;

  NATTEN_HD int threads() const { return tiling.warps_x() * tiling.warps_y * tiling.units * 32; }
};

/// Channels that instances for `head_dim` have in registers and shared memory.
constexpr int channel_bucket(int head_dim) { return head_dim <= 32 ? 32 : 64; }

/// Warps of a block, forward, at most: where shared memory lets few blocks on a multiprocessor, they are larger.
constexpr int most_flat_warps(int channels) { return channels == 32 ? 4 : 6; }

enum class WindowKernel { forward, dq, dkdv };

/// Where things lie in the shared memory of a block, in bytes: two boxes of rows of all units, each with zeros behind,
/// statistics of those rows (in dk, dv), spans of the tiles' rows, tables of the bias, sums for its gradient (in dq).
/// The first four are those of `unit`.
struct WindowMap {
  int first, second, stats, spans, bias, bias_sums, end;

  NATTEN_HD WindowMap(const WindowParams& p, WindowKernel kernel, int channels, int unit = 0) {
    const WindowTiling& t = p.tiling;
    const int rows = t.rows * t.pitch, all = t.units * rows, row_bytes = channels * 2;
    const int of_stats = kernel == WindowKernel::dkdv ? 16 : 0;
    const int boxes = (all + kTailKeys) * (2 * row_bytes + of_stats);
    first = unit * rows * row_bytes, second = first + (all + kTailKeys) * row_bytes;
    stats = (all + kTailKeys) * 2 * row_bytes + unit * rows * of_stats;
    spans = boxes + unit * t.tile_y * int(sizeof(Span));
    bias = boxes + t.units * t.tile_y * int(sizeof(Span));
    bias_sums = bias + t.units * p.bias_table.bytes(), end = bias_sums;
    if (kernel == WindowKernel::dq && p.bias_table.y > 0)
      end += p.threads() / 32 * p.bias_table.sum_bytes() + t.units * t.tile_x * int(sizeof(Span));
  }
};

inline size_t window_shared_bytes(const WindowParams& p, WindowKernel kernel) {
  return size_t(WindowMap(p, kernel, channel_bucket(p.head_dim)).end);
}

// Launches on `stream`.
/// `overlapping`: starts while the kernel before, of other samples, still runs.
void launch_window_forward(const WindowParams& params, DType dtype, void* stream, bool overlapping);
void launch_window_dq(const WindowParams& params, DType dtype, void* stream);
void launch_window_dkdv(const WindowParams& params, DType dtype, void* stream);

}  // namespace natten::cuda_portable
