// SPDX-License-Identifier: MIT
// Host side of the "boxes" kernels: what they can run, in which tiles, and their order.
#include "cuda/portable/boxes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

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

int bucket(const Problem& p) {
  const int dim = std::max(p.head_dim, p.head_dim_v);
  return dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
}

int block_n(const Problem& p) { return bucket(p) <= 128 ? 64 : 32; }

}  // namespace

Rows rows(const TensorView& view, int dim) {
  bool vector = dim % 8 == 0 && reinterpret_cast<uintptr_t>(view.ptr) % 16 == 0;
  for (int i = 0; i < 5; ++i) vector = vector && view.strides[i] % 8 == 0;
  return {view, dim, vector};
}

int64_t bias_entries(const Problem& p) {
  int64_t entries = p.has_bias ? 1 : 0;
  for (const Axis& a : p.axes) entries *= 2 * int64_t{a.window} - 1;
  return entries;
}

void set_items(BoxesParams& params) {
  const Problem& p = params.problem;
  const bool extra = params.side == Side::extra_keys;
  const int heads = params.side == Side::queries ? p.heads : p.heads_kv;
  int tiles[3];
  int64_t items = p.batch * heads;
  for (int a = 0; a < 3; ++a) {
    const int extent = !extra ? group_axis(p.axes[a], 0).extent : a == 2 ? p.extra_keys : 1;
    const int groups = extra ? 1 : num_groups(p.axes[a]), tile = a == 0   ? params.tile.z
                                                                 : a == 1 ? params.tile.y
                                                                          : params.tile.x;
    tiles[a] = detail::ceil_div(extent, tile);
    params.by_tiles[a] = FastDiv(tiles[a]), params.by_groups[a] = FastDiv(groups);
    items *= int64_t{tiles[a]} * groups;
  }
  params.by_heads = FastDiv(heads);
  params.num_items = int(items);
}

int64_t positions_seen(const Axis& group, Side side, int tile) {
  const int first = group.extent / 2 / tile * tile, last = std::min(first + tile, group.extent) - 1;
  if (side == Side::queries) return key_span(group, last).end - key_span(group, first).begin;
  return query_span(group, last).end - query_span(group, first).begin;
}

namespace {

// The shape of a tile that makes the least work; kBlockM rows of it are worked on whether they exist or not.
Int3 choose_tile(const Problem& p, Side side) {
  const Axis z = group_axis(p.axes[0], 0), y = group_axis(p.axes[1], 0), x = group_axis(p.axes[2], 0);
  const int n = block_n(p);
  Int3 best{1, 1, 1};
  double least = HUGE_VAL;
  for (int tz = 1; tz <= kBlockM; tz *= 2)
    for (int ty = 1; tz * ty <= kBlockM; ty *= 2) {
      const Int3 t{std::min(tz, z.extent), std::min(ty, y.extent), std::min(kBlockM / tz / ty, x.extent)};
      const double tiles =
          double(detail::ceil_div(z.extent, t.z)) * detail::ceil_div(y.extent, t.y) * detail::ceil_div(x.extent, t.x);
      const double columns = double(positions_seen(z, side, t.z)) * double(positions_seen(y, side, t.y)) *
                             double(positions_seen(x, side, t.x));
      const double cost = tiles * (n + std::ceil(columns / n) * n);  // a block's worth for what surrounds the blocks
      if (cost < least) least = cost, best = t;
    }
  return best;
}

void set_tile(BoxesParams& params, Side side) {
  const Problem& p = params.problem;
  params.side = side;
  params.tile = side == Side::extra_keys ? Int3{1, 1, std::min(p.extra_keys, kBlockM)} : choose_tile(p, side);
  params.tile_x = FastDiv(params.tile.x), params.tile_y = FastDiv(params.tile.y);
  set_items(params);
}

BoxesParams forward_params(const Problem& p, const ForwardArgs& args) {
  BoxesParams params;
  params.problem = p;
  params.q = rows(args.q, p.head_dim), params.k = rows(args.k, p.head_dim), params.v = rows(args.v, p.head_dim_v);
  params.extra_k = rows(args.extra_k, p.head_dim), params.extra_v = rows(args.extra_v, p.head_dim_v);
  params.out = rows(args.out, p.head_dim_v);
  params.bias = args.bias, params.lse = args.lse;
  params.scale_log2 = float(p.scale * kLog2e);
  return params;
}

size_t stats_bytes(const Problem& p) { return size_t(p.batch) * p.tokens() * p.heads * sizeof(RowStats); }

}  // namespace

int bias_pieces(const Problem& p) {
  if (!p.has_bias) return 0;
  const cuda::DeviceInfo* device = cuda::current_device();
  const int64_t blocks = device ? 2 * int64_t{device->num_sms} : 1;
  const int64_t fit = kMostBiasSums / (p.heads * kWarps * bias_entries(p));
  return int(std::clamp<int64_t>(std::min(blocks / p.heads + 1, fit), 1, 1024));
}

Int3 boxes_tile(const Problem& p) { return choose_tile(p, Side::queries); }

const char* why_not_boxes(const Problem& p, Pass pass) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "it runs bfloat16 and float16 only";
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (p.head_dim > kMaxHeadDim || p.head_dim_v > kMaxHeadDim) return "head_dim is more than 256";
  if (p.tokens() >= kMostTokens || p.extra_keys >= kMostTokens) return "there are more than 2^30 tokens";
  if (bias_entries(p) > kMostBiasEntries) return "the relative position bias has more than 2^26 entries per head";
  // Tiles of one token are the most that there can be.
  if (double(p.batch) * double(p.tokens()) * p.heads > double(kMostItems)) return "there are more than 2^31 queries";
  const int columns = 4 * block_n(p), tile = (pass == Pass::forward ? 1 : 2) * kBlockM;
  const int shared = (columns + tile) * bucket(p) * 2 + (p.has_bias && pass == Pass::backward ? 16384 : 0) + 4096;
  if (shared > cuda::current_device()->max_shared_bytes) return "it needs more shared memory than this GPU has";
  return nullptr;
}

size_t boxes_workspace(const Problem& p, Pass pass) {
  if (pass == Pass::forward) return 0;
  const size_t sums = size_t(p.heads) * bias_pieces(p) * kWarps * bias_entries(p) * sizeof(float);
  return (stats_bytes(p) + 63) / 64 * 64 + sums;
}

void boxes_forward(const Problem& p, const ForwardArgs& args, void* stream) {
  BoxesParams params = forward_params(p, args);
  set_tile(params, Side::queries);
  launch_forward(params, stream);
}

void boxes_backward(const Problem& p, const BackwardArgs& args, void* stream, void* workspace) {
  BoxesParams params = forward_params(p, args);
  const int64_t x = 1, y = p.axes[2].extent * x, z = p.axes[1].extent * y, head = p.axes[0].extent * z;
  params.stats = {workspace, {head * p.heads, z, y, x, head, 1}};
  params.dout = rows(args.dout, p.head_dim_v), params.dlse = args.dlse;
  launch_row_stats(params, stream);

  set_tile(params, Side::queries);
  params.dq = rows(args.dq, p.head_dim);
  if (args.dbias && p.has_bias) {
    params.bias_sums = reinterpret_cast<float*>(static_cast<char*>(workspace) + (stats_bytes(p) + 63) / 64 * 64);
    params.bias_pieces = bias_pieces(p);
    params.bias_entries = int(bias_entries(p));
  }
  if (params.dq.view || params.bias_sums) launch_dq(params, stream);
  if (params.bias_sums) launch_reduce_bias(params, args.dbias, stream);

  if (p.has_window() && (args.dk || args.dv)) {
    set_tile(params, Side::keys);
    params.dk = rows(args.dk, p.head_dim), params.dv = rows(args.dv, p.head_dim_v);
    launch_dkdv(params, stream);
  }
  if (p.extra_keys > 0 && (args.dextra_k || args.dextra_v)) {
    set_tile(params, Side::extra_keys);
    params.dk = rows(args.dextra_k, p.head_dim), params.dv = rows(args.dextra_v, p.head_dim_v);
    launch_dkdv(params, stream);
  }
}

}  // namespace natten::cuda_portable
