// SPDX-License-Identifier: MIT
// Host side of the "boxes" kernels: what they can run, in which tiles, and their order.
#include "cuda/portable/boxes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "cuda/device.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr int64_t kMostItems = (int64_t{1} << 31) - 1;  // of a grid
constexpr int64_t kMostTokens = int64_t{1} << 30;       // flat indices of a box are ints
constexpr int64_t kMostBiasEntries = int64_t{1} << 26;  // and so are those of a bias table
constexpr int64_t kMostBiasSums = int64_t{1} << 24;     // floats of all tables of sums, unless one per head is more
constexpr int kWarps = kThreads / 32;

int block_n(const Problem& p) { return block_columns(size_of(p.dtype), bucket(p)); }

}  // namespace

Rows rows(const Problem& p, const TensorView& view, int dim, bool of_keys) {
  const int chunk = 16 / size_of(p.dtype);
  bool vector = dim % chunk == 0 && reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0;
  for (int i = 0; i < 5; ++i) vector = vector && view.strides[i] % chunk == 0;
  return {view, dim, vector, of_keys};
}

int64_t bias_entries(const Problem& p) {
  int64_t entries = p.has_bias ? 1 : 0;
  for (const Axis& a : p.axes) entries *= 2 * int64_t{a.window} - 1;
  return entries;
}

void set_items(BoxesParams& params) {
  const Problem& p = params.problem;
  const Int3 tile = params.tile;
  const int heads = params.side == Side::queries ? p.heads : p.heads_kv;
  const auto tiles = [](const Axis& a, int extent, int tile) {
    return detail::ceil_div(detail::ceil_div(extent, a.dilation), tile);
  };
  params.num_items = 0;
  for (int i = 0; i < params.num_samples; ++i) {
    BoxesSample& s = params.samples[i];
    s.first_item = params.num_items;
    s.num_tiles = {tiles(p.axes[0], s.extent.z, tile.z), tiles(p.axes[1], s.extent.y, tile.y),
                   tiles(p.axes[2], s.extent.x, tile.x)};
    Int3 groups{std::min(p.axes[0].dilation, s.extent.z), std::min(p.axes[1].dilation, s.extent.y),
                std::min(p.axes[2].dilation, s.extent.x)};
    if (params.side == Side::extra_keys)
      s.num_tiles = {1, 1, detail::ceil_div(s.extra_keys, tile.x)}, groups = {1, 1, 1};
    params.num_items += int(s.num_tiles.volume() * groups.volume() * p.batch * heads);
    if (params.num_samples > 1) continue;
    const Int3 t = s.num_tiles;
    params.by_tiles[0] = FastDiv(t.z), params.by_tiles[1] = FastDiv(t.y), params.by_tiles[2] = FastDiv(t.x);
    params.by_groups[0] = FastDiv(groups.z), params.by_groups[1] = FastDiv(groups.y);
    params.by_groups[2] = FastDiv(groups.x), params.by_heads = FastDiv(heads);
  }
}

int64_t positions_seen(const Axis& group, Side side, int tile) {
  const int first = group.extent / 2 / tile * tile, last = std::min(first + tile, group.extent) - 1;
  if (side == Side::queries) return key_span(group, last).end - key_span(group, first).begin;
  return query_span(group, last).end - query_span(group, first).begin;
}

namespace {

// Whether a GPU has the shared memory: columns of two tensors in two stages, `tensors` of the tile, and tables.
bool fits(const Problem& p, int tensors, int warp_tiles, int more_bytes = 0) {
  constexpr int kTables = 8192;
  const int rows = 4 * block_n(p) + tensors * warp_tiles * kBlockM;
  return rows * bucket(p) * size_of(p.dtype) + kTables + more_bytes <= cuda::current_device()->max_shared_bytes;
}

struct Tiling {
  Int3 tile{1, 1, 1};
  int warp_tiles = 1;
};

// An axis of the longest dilation group: positions that 1, 2, 4, .. neighbours on it see together, and their tiles.
struct TiledAxis {
  int extent;
  double seen[8];

  TiledAxis(const Axis& axis, Side side) : extent(group_axis(axis, 0).extent) {
    for (int log = 0; log < 8; ++log) seen[log] = double(positions_seen(group_axis(axis, 0), side, size(log)));
  }
  int size(int log) const { return std::min(1 << log, extent); }
  double tiles(int log) const { return detail::ceil_div(extent, size(log)); }
};

// What a tile costs whose sides have these logarithms, in blocks of columns for 4 warps of 16 rows each. Rows are
// worked on whether they exist or not, a block of columns by the warps whose rows see some of it.
double cost_of_tile(const TiledAxis (&axes)[3], const int (&log)[3], int warp_tiles, int block_n) {
  const int warp_rows = warp_tiles == 2 ? 5 : 4;  // logarithms as well
  const int warp_y = std::clamp(warp_rows - log[2], 0, log[1]);
  const int warp_z = std::clamp(warp_rows - log[2] - log[1], 0, log[0]);
  const double row = axes[2].seen[log[2]] / block_n;
  const double all = std::ceil(axes[0].seen[log[0]] * axes[1].seen[log[1]] * row);
  const double begins = warp_y == log[1] ? 1 : axes[0].seen[warp_z];  // of runs of columns, each within a block
  const double of_warp = std::min(all, axes[0].seen[warp_z] * axes[1].seen[warp_y] * row + begins);
  // A fifth is loads and tables. Twice the rows of a warp are less than twice the work: they share fragments. A block's
  // worth is for what surrounds the blocks.
  return 1 + 0.2 * all + (warp_tiles == 2 ? 1.3 : 0.8) * of_warp;
}

// The shape of a tile, and the rows of a warp, that make the least work. Not of how many samples or heads there are:
// results of one do not depend on the others.
Tiling choose_tiling(const Problem& p, Side side, int most_warp_tiles) {
  const TiledAxis axes[3] = {{p.axes[0], side}, {p.axes[1], side}, {p.axes[2], side}};
  Tiling best;
  double least = HUGE_VAL;
  for (int warp_tiles = 1; warp_tiles <= most_warp_tiles; ++warp_tiles) {
    const int rows = warp_tiles == 2 ? 7 : 6;
    for (int z = 0; z <= rows; ++z)
      for (int y = 0; z + y <= rows; ++y) {
        const int x = rows - z - y;
        const double tiles = axes[0].tiles(z) * axes[1].tiles(y) * axes[2].tiles(x);
        const double cost = tiles * cost_of_tile(axes, {z, y, x}, warp_tiles, block_n(p));
        if (cost < least) least = cost, best = {{axes[0].size(z), axes[1].size(y), axes[2].size(x)}, warp_tiles};
      }
  }
  return best;
}

Tiling forward_tiling(const Problem& p) {
  const int most = most_warp_tiles(size_of(p.dtype), bucket(p));
  return choose_tiling(p, Side::queries, fits(p, 1, most) ? most : 1);
}

void set_tiling(BoxesParams& params, Side side, const Tiling& tiling) {
  params.side = side;
  params.tile = tiling.tile, params.warp_tiles = tiling.warp_tiles;
  params.tile_x = FastDiv(params.tile.x), params.tile_y = FastDiv(params.tile.y);
  set_items(params);
}

BoxesParams forward_params(const Problem& p, const ForwardArgs& args, std::span<const BoxesSample> samples, bool tf32) {
  BoxesParams params;
  params.tf32 = tf32;
  params.problem = p;
  params.num_samples = int(samples.size());
  std::copy(samples.begin(), samples.end(), params.samples);
  params.q = rows(p, args.q, p.head_dim);
  params.k = rows(p, args.k, p.head_dim, true), params.v = rows(p, args.v, p.head_dim_v, true);
  params.extra_k = rows(p, args.extra_k, p.head_dim, true);
  params.extra_v = rows(p, args.extra_v, p.head_dim_v, true);
  params.out = rows(p, args.out, p.head_dim_v);
  params.bias = args.bias, params.lse = args.lse;
  params.scale_log2 = float(p.scale * kLog2e);
  return params;
}

// From the first query of the first sample to the last one of any.
int64_t tokens_of(std::span<const BoxesSample> samples) {
  int64_t tokens = 0;
  for (const BoxesSample& s : samples) tokens = std::max(tokens, s.first_query + s.extent.volume());
  return tokens;
}

size_t stats_bytes(const Problem& p, int64_t tokens) {
  return (size_t(p.batch) * tokens * p.heads * sizeof(RowStats) + 63) / 64 * 64;
}

// Of all queries; packed ones are a line.
void run_row_stats(BoxesParams params, int64_t tokens, void* stream) {
  if (params.num_samples > 1)
    params.problem.axes[0] = params.problem.axes[1] = {}, params.problem.axes[2] = {int(tokens)};
  launch_row_stats(params, stream);
}

}  // namespace

int bias_pieces(const Problem& p) {
  if (!p.has_bias) return 0;
  const cuda::DeviceInfo* device = cuda::current_device();
  const int64_t blocks = device ? 2 * int64_t{device->num_sms} : 1;
  const int64_t fit = kMostBiasSums / (p.heads * kWarps * bias_entries(p));
  return int(std::clamp<int64_t>(std::min(blocks / p.heads + 1, fit), 1, 1024));
}

Int3 boxes_tile(const Problem& p, Pass pass) {
  return (pass == Pass::forward ? forward_tiling(p) : choose_tiling(p, Side::queries, 1)).tile;
}

const char* why_not_boxes(const Problem& p, Pass pass) {
  if (p.dtype == DType::f64) return "it does not run float64";
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (p.head_dim > kMaxHeadDim || p.head_dim_v > kMaxHeadDim) return "head_dim is more than 256";
  // Tiles of longer rows fit in the shared memory of few GPUs, with one block of threads on each multiprocessor.
  if (p.dtype == DType::f32 && bucket(p) > kMaxHeadDimF32) return "head_dim is more than 128 in float32";
  if (p.tokens() >= kMostTokens || p.extra_keys >= kMostTokens) return "there are more than 2^30 tokens";
  if (bias_entries(p) > kMostBiasEntries) return "the relative position bias has more than 2^26 entries per head";
  // Tiles of one token are the most that there can be.
  if (double(p.batch) * double(p.tokens()) * p.heads > double(kMostItems)) return "there are more than 2^31 queries";
  const bool backward = pass == Pass::backward;
  if (!fits(p, backward ? 2 : 1, 1, backward && p.has_bias ? 16384 : 0))
    return "it needs more shared memory than this GPU has";
  return nullptr;
}

BoxesSample only_sample(const Problem& p) {
  BoxesSample sample;
  sample.extent = p.grid(), sample.extra_keys = p.extra_keys;
  return sample;
}

size_t boxes_workspace(const Problem& p, Pass pass, std::span<const BoxesSample> samples) {
  if (pass == Pass::forward) return 0;
  const size_t sums = size_t(p.heads) * bias_pieces(p) * kWarps * bias_entries(p) * sizeof(float);
  return stats_bytes(p, tokens_of(samples)) + sums;
}

void boxes_forward(const Problem& p, const ForwardArgs& args, std::span<const BoxesSample> samples, bool tf32,
                   void* stream) {
  BoxesParams params = forward_params(p, args, samples, tf32);
  set_tiling(params, Side::queries, forward_tiling(p));
  launch_forward(params, stream);
}

void boxes_backward(const Problem& p, const BackwardArgs& args, std::span<const BoxesSample> samples, bool tf32,
                    void* stream, void* workspace) {
  BoxesParams params = forward_params(p, args, samples, tf32);
  const int64_t tokens = tokens_of(samples), y = samples.size() > 1 ? 0 : p.axes[2].extent, z = y * p.axes[1].extent;
  params.stats = {workspace, {tokens * p.heads, z, y, 1, tokens, 1}};
  params.dout = rows(p, args.dout, p.head_dim_v), params.dlse = args.dlse;
  run_row_stats(params, tokens, stream);

  set_tiling(params, Side::queries, choose_tiling(p, Side::queries, 1));
  params.dq = rows(p, args.dq, p.head_dim);
  if (args.dbias && p.has_bias) {
    params.bias_sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + stats_bytes(p, tokens));
    params.bias_pieces = bias_pieces(p);
    params.bias_entries = int(bias_entries(p));
  }
  if (params.dq.view || params.bias_sums) launch_dq(params, stream);
  if (params.bias_sums) launch_reduce_bias(p, params.bias_sums, params.bias_pieces * kWarps, args.dbias, stream);

  if (p.has_window() && (args.dk || args.dv)) {
    set_tiling(params, Side::keys, choose_tiling(p, Side::keys, 1));
    params.dk = rows(p, args.dk, p.head_dim, true), params.dv = rows(p, args.dv, p.head_dim_v, true);
    launch_dkdv(params, stream);
  }
  if (p.extra_keys > 0 && (args.dextra_k || args.dextra_v)) {
    set_tiling(params, Side::extra_keys, {{1, 1, std::min(p.extra_keys, kBlockM)}});
    params.dk = rows(p, args.dextra_k, p.head_dim, true), params.dv = rows(p, args.dextra_v, p.head_dim_v, true);
    launch_dkdv(params, stream);
  }
}

}  // namespace natten::cuda_portable
