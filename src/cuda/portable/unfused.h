// SPDX-License-Identifier: MIT
// What the host tells the kernels of the unfused operators (core/backend.h: products).
//
// A block of threads works on a tile of 8, 16 or 32 *octets*: 8 neighbours along the last axis each, in a run-time
// arrangement; a warp takes a pair of them at a time. The other side is a box of positions, the *field*; its rows
// along the last axis come to shared memory, and a step is 16 positions of one of them. Inside such a row a slot is a
// number of the lane plus the column, so nothing is divided in the inner loops, whatever the rank, dilation, stride or
// causality:
//
//   slot = ((key.z - begin.z) * window.y + key.y - begin.y) * window.x + key.x - begin.x,  begin: of the query's spans
//
// Where the field comes to shared memory at once, so do the slots of a warp's rows, as they stand in the attention
// tensor, which is read and written in pieces of 16 bytes. Otherwise slots are read and written where they are.
#pragma once
#include "cuda/portable/boxes.h"

namespace natten::cuda_portable {

constexpr int kMostOctets = 32;        ///< of a tile
constexpr int kMostOctetsX = 8;        ///< side by side
constexpr int kMostStagedSlots = 256;  ///< of a query
constexpr int kMostColumns = 64;       ///< of a box row in shared memory at a time
constexpr int kStep = 16;

/// Positions of the field in shared memory at a time, at most.
constexpr int most_keys(int head_dim) { return head_dim == 32 ? 544 : head_dim == 64 ? 384 : 192; }

struct UnfusedParams {
  BoxesParams boxes;  ///< problem, side and tiles; `q`: the queries' rows, `k` and `extra_k` those of keys; `bias`
  TensorView weights;
  int slots = 0, window_slots = 0;  ///< of a query: all, and without those of additional keys
  int slot_strides[3] = {};         ///< per axis
  int chunk_keys = 0;               ///< positions of the field in shared memory at a time
  bool staged = false;              ///< slots pass through shared memory if the box is there at once
  bool has_unused = false;          ///< some query has slots without a key
  float scale = 1, unused = 0;
  int num_pairs = 0;         ///< of octets of a tile; a multiple of the warps
  Int3 pair;                 ///< tokens of a pair of octets, which are neighbours along one axis
  FastDiv pairs_y, pairs_x;  ///< pairs of a tile
  FastDiv window_y, window_x, heads_per_kv;
  uint32_t zero = 0;  ///< 0, unknown to the compiler: see ptx::opaque

  /// Of a warp's slots in shared memory: 16 rows, and what it takes to align each octet as in the tensor.
  NATTEN_HD int octet_bytes() const { return 8 * slots * 2 + 16; }
  NATTEN_HD int staged_bytes() const { return staged ? 2 * octet_bytes() : 0; }
};

// Launches on `stream`; each file of that name instantiates its kernels.
void launch_scores(const UnfusedParams& params, void* stream);
void launch_weigh(const UnfusedParams& params, void* stream);
void launch_sum_bias(const UnfusedParams& params, void* stream);

}  // namespace natten::cuda_portable
