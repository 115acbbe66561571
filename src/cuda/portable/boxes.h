// SPDX-License-Identifier: MIT
// What the host tells the "boxes" kernels, which run every problem.
//
// A work item is a *tile*: up to kBlockM tokens of one dilation group, one sample and one head, in the shape
// `BoxesParams::tile`. What its windows (or inverse windows) touch on the other side is a box of positions too, and the
// kernel walks over that box in flat order, kBlockN positions at a time; a per-axis table of bits says which of them
// each row of the tile sees. So rank, window, dilation, stride, causality and tile shape are all run-time.
#pragma once
#include <cstddef>

#include "cuda/fast_div.h"
#include "natten/attention.h"

namespace natten::cuda_portable {

constexpr int kBlockM = 64;    ///< rows of a tile
constexpr int kThreads = 128;  ///< four warps of 16 rows
constexpr int kMaxHeadDim = 256;
constexpr int kMaxCoords = kBlockM + 2;  ///< distinct coordinates of a tile, all axes together: z + y + x, z*y*x <= 64

/// A tensor of rows of `dim` elements. `vector`: 16-byte loads and stores are possible.
struct Rows {
  TensorView view;
  int dim = 0;
  bool vector = false;
};

/// What the backward pass needs to know of a query beside its q and dout.
struct RowStats {
  float lse_log2;  ///< log2 of the softmax's denominator; +infinity where it is 0, so that probabilities are 0
  float delta;     ///< rowsum(dout * out) - dlse
};

/// Whose rows form the tile.
enum class Side { queries, keys, extra_keys };

struct BoxesParams {
  Problem problem;
  Rows q, k, v, extra_k, extra_v, out, dout, dq, dk, dv;  ///< dk, dv: of additional keys if those are the side
  TensorView bias, lse, dlse;
  Side side = Side::queries;
  Int3 tile;  ///< shape of a tile; volume at most kBlockM
  FastDiv tile_x, tile_y;
  FastDiv by_tiles[3], by_groups[3], by_heads;  ///< of the number of an item: tiles and dilation groups per axis
  int num_items = 0;
  float scale_log2 = 0;        ///< scale * log2(e)
  TensorView stats;            ///< RowStats of every query, contiguous
  float* bias_sums = nullptr;  ///< [heads, pieces, warps, bias entries]: sums of dS
  int bias_pieces = 0, bias_entries = 0;
};

// What the hosts of both kinds of kernels on tiles ask: these, and those of the unfused operators.
Rows rows(const TensorView& view, int dim);
/// The numbers of items and what takes them apart, from side and tile.
void set_items(BoxesParams& params);
/// Positions that a tile of `tile` along an axis sees, in the middle of the longest group.
int64_t positions_seen(const Axis& group, Side side, int tile);
int64_t bias_entries(const Problem& p);  ///< of a head; 0 without a bias
int bias_pieces(const Problem& p);       ///< of the work on a head, each with tables of sums of its own

// Launches on `stream`; each file of that name instantiates its kernels.
void launch_forward(const BoxesParams& params, void* stream);
void launch_dq(const BoxesParams& params, void* stream);
void launch_dkdv(const BoxesParams& params, void* stream);
void launch_row_stats(const BoxesParams& params, void* stream);
void launch_reduce_bias(const BoxesParams& params, const TensorView& dbias, void* stream);

}  // namespace natten::cuda_portable
