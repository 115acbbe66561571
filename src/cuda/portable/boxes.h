// SPDX-License-Identifier: MIT
// What the host tells the "boxes" kernels, which run every problem.
//
// A work item is a *tile*: up to kBlockM tokens, or twice as many, of one dilation group, one sample and one head, in
// the shape `BoxesParams::tile`. What its windows (or inverse windows) touch on the other side is a box of positions
// too, and the kernel walks over that box in flat order, kBlockN positions at a time; a per-axis table of bits says
// which of them each row of the tile sees. So rank, window, dilation, stride, causality and tile are all run-time.
#pragma once
#include <cstddef>

#include "cuda/fast_div.h"
#include "natten/attention.h"

namespace natten::cuda_portable {

constexpr int kThreads = 128;  ///< of a block: four warps
constexpr int kBlockM = 64;    ///< rows of a tile: 16 of each warp, or in some kernels twice that
constexpr int kMaxHeadDim = 256, kMaxHeadDimF32 = 128;
/// Distinct coordinates of a tile, all axes together: z + y + x where z * y * x <= rows.
constexpr int most_coords(int rows) { return rows + 2; }

/// Channels that a problem's kernels are compiled for: the bucket in which both head dims fit.
inline int bucket(const Problem& p) {
  const int dim = p.head_dim > p.head_dim_v ? p.head_dim : p.head_dim_v;
  return dim <= 32 && p.dtype != DType::f32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

/// Columns of a block, by bytes of an element and channels: what fits in shared memory and registers.
constexpr int block_columns(int element, int head_dim) { return element == 4 || head_dim > 128 ? 32 : 64; }

/// How many times 16 rows a warp of the forward pass can have: what the registers hold.
constexpr int most_warp_tiles(int element, int head_dim) {
  return element == 2 && (head_dim == 64 || head_dim == 128) ? 2 : 1;
}

/// A tensor of rows of `dim` elements. `vector`: 16-byte loads and stores are possible.
struct Rows {
  TensorView view;
  int dim = 0;
  bool vector = false;
  bool of_keys = false;  ///< in a packed call: a sample's rows begin at its first key, not at its first query
};

/// One sample of a packed call. What is not packed is one sample too, with rows and offsets of 0.
struct BoxesSample {
  int first_item = 0, extra_keys = 0;
  Int3 extent;                             ///< of its grid
  Int3 num_tiles;                          ///< per axis, of the longest dilation group
  int pitch_z = 0, pitch_y = 0;            ///< tokens between neighbours; views have strides of 0 along z and y then
  int64_t first_query = 0, first_key = 0;  ///< in tokens
};
constexpr int kMostSamples = 32;  ///< of one launch: the parameters of a kernel stay below 4 KB

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
  Int3 tile;           ///< shape of a tile; volume at most kBlockM * warp_tiles
  int warp_tiles = 1;  ///< 16 rows each
  FastDiv tile_x, tile_y;
  FastDiv by_tiles[3], by_groups[3], by_heads;  ///< of the number of an item of an only sample; per axis
  int num_items = 0;
  float scale_log2 = 0;        ///< scale * log2(e)
  bool tf32 = false;           ///< floats only: one product in tf32 in place of three
  TensorView stats;            ///< RowStats of every query, contiguous
  float* bias_sums = nullptr;  ///< [heads, pieces, warps, bias entries]: sums of dS
  int bias_pieces = 0, bias_entries = 0;
  int num_samples = 1;
  BoxesSample samples[kMostSamples];  ///< by first_item
};
static_assert(sizeof(BoxesParams) <= 4096);

// What the hosts of both kinds of kernels on tiles ask: these, and those of the unfused operators.
Rows rows(const Problem& p, const TensorView& view, int dim, bool of_keys = false);
/// The numbers of items and what takes them apart, from samples, side and tile.
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
/// dbias from `tables` tables of sums per head: [heads, tables, bias entries].
void launch_reduce_bias(const Problem& problem, const float* sums, int tables, const TensorView& dbias, void* stream);

}  // namespace natten::cuda_portable
