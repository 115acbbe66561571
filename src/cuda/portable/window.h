// SPDX-License-Identifier: MIT
// What the host tells the "window" kernels: small windows on planes, close to the speed of memory.
//
// Source of the design and its measurements: docs/design/2026-11-24-cuda-portable.md. In short:   * A warp works on
// 16 queries, 2 rows x 8 columns. Their windows touch at most 16 columns (two octets) of any key row,
//     so a key row is one step of 16 keys and nothing is divided inside the loop.
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

/// A tensor by element strides; those of y and x are of tokens and fit 32 bits, as do offsets inside a plane.
struct Plane {
  void* ptr = nullptr;
  int64_t batch = 0, z = 0, head = 0;
  int y = 0, x = 0;
};

/// How a plane is cut into units, and a block of threads into warps. A unit is a tile of one head and dilation group.
struct WindowTiling {
  int tile_y = 0, tile_x = 0;    ///< tokens of a unit; tile_x is a multiple of 8
  int tiles_y = 0, tiles_x = 0;  ///< of the longest group
  int units = 1;                 ///< of one block of threads
  int row_pairs = 1;             ///< warps below each other; tile_x / 8 of them stand side by side
  bool ring = false;
  int rows = 0, pitch = 0;  ///< of the other side in shared memory, per unit; pitch is a multiple of 8
};

struct WindowParams {
  Axis y, x;
  int planes_z = 1;  ///< planes of a sample
  int heads = 1, heads_per_kv = 1;
  Plane q, k, v, out, dout, dq, dk, dv, lse, dlse;
  Plane stats;  ///< 16 bytes per query: -lse / scale and -delta, each in three elements (see dkdv)
  WindowTiling tiling;
  int units_per_plane = 0, blocks_per_plane = 0;
  int64_t num_blocks = 0;
  FastDiv by_blocks, by_z, by_heads, by_groups_x, by_tiles_x, by_tiles_y, by_rows, by_octets, by_unit_warps;
  FastDiv by_row_threads;               ///< threads that load a row of the other side
  int rows_at_once = 1, row_parts = 1;  ///< rows that the threads of a unit load in a pass, or passes of a row
  float scale = 1, scale_log2 = 1;
  uint32_t zero = 0;  ///< 0, unknown to the compiler: see ptx::opaque
  float zero_float = 0;

  int octets() const { return tiling.tile_x / 8; }
  int threads() const { return octets() * tiling.row_pairs * tiling.units * 32; }
};

/// Bytes of shared memory for `tensors` boxes of rows, statistics of the columns, and spans.
size_t window_shared_bytes(const WindowParams& p, int tensors, int head_dim, bool stats);

// Launches on `stream`.
void launch_window_forward(const WindowParams& params, DType dtype, int head_dim, void* stream);
void launch_window_dq(const WindowParams& params, DType dtype, int head_dim, void* stream);
void launch_window_dkdv(const WindowParams& params, DType dtype, int head_dim, void* stream);

}  // namespace natten::cuda_portable
