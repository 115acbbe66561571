// SPDX-License-Identifier: MIT
// Host side of the "window" kernels: what they can run, how planes are cut, and the order of the launches.
#include "cuda/portable/window.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/portable/boxes.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr int kMostWindow = 13;
constexpr int kMostKeys = 127;           // of a query: see count_nonfinite in window_forward.cu
constexpr int kStepColumns = 16;         // of keys, that 8 queries see
constexpr int64_t kMostPlane = 1 << 29;  // elements, so that offsets in bytes fit 32 bits
constexpr int64_t kMostStride = int64_t{1} << 32;
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int kMostSummed = 7;   // window of which a bias has a gradient: see LaneSums
constexpr int kLeastStrip = 16;  // tokens below each other
constexpr int kStripStart = 4;   // what a block does before its first row is worth that many
// A table of spans of that many rows does not cost a block its place on a multiprocessor.
constexpr int most_strip(int head_dim) { return head_dim == 32 ? 256 : 96; }
constexpr int kBlocksPerSm = 8;  // of dq where each has sums: few enough tables, even work

// Positions that `tile` neighbours see together: at most.
int seen_by(const Axis& group, int tile) { return group.window + tile - 1 + group.stride - 1; }

int round_up(int n, int to) { return detail::ceil_div(n, to) * to; }

Axis longest_group(const Axis& a) { return group_axis(a, 0); }

// Positions that see a tile of keys, at most: exact near both ends, where windows shift, and for as many tiles between
// as it takes until stride groups and tiles meet in the same way again.
int seeing(const Axis& axis, int tile) {
  int most = 1;
  for (const int residue : {0, num_groups(axis) - 1}) {
    const Axis g = group_axis(axis, residue);
    const int tiles = detail::ceil_div(g.extent, tile), near = detail::ceil_div(2 * g.window, tile) + g.stride + 1;
    for (int i = 0; i < tiles; ++i) {
      if (i > near && i < tiles - near) i = tiles - near;
      const int last = std::min((i + 1) * tile, g.extent) - 1;
      most = std::max(most, query_span(g, last).end - query_span(g, i * tile).begin);
    }
  }
  return most;
}

bool fits_groups(const Axis& y, const Axis& x) { return y.extent <= 16 && x.extent <= 16; }

// A unit is a whole group. Few warps with many tiles each: what a warp does first is not small.
void set_group_tiling(const Axis& y, const Axis& x, WindowTiling& t) {
  t.tile_y = round_up(y.extent, 2), t.tile_x = round_up(x.extent, 8);
  t.units = t.tile_x == 8 ? 2 : 1;
  t.row_pairs = t.tile_x == 8 ? 1 : std::min(2, t.tile_y / 2);
}

// Warps of the forward kernel that registers let a multiprocessor hold, and the most of a block (see its launch bounds).
constexpr int most_ring_warps(int head_dim) { return head_dim == 32 ? 16 : 12; }
constexpr int most_block_warps(int head_dim) { return head_dim == 32 ? 4 : 6; }

// Blocks of `params` that a multiprocessor holds.
int blocks_per_sm(const WindowParams& params, int head_dim) {
  constexpr size_t kReserved = 1024;  // of each block, by CUDA
  const size_t shared = cuda::current_device()->max_shared_bytes + kReserved;
  const int by_shared = int(shared / (window_shared_bytes(params, {head_dim}) + kReserved));
  return std::min(by_shared, most_ring_warps(head_dim) / (params.threads() / 32));
}

// The arrangement of warps of which most fit; returns the blocks per multiprocessor.
int set_ring_warps(const Axis& y, const Axis& x, WindowParams& params, int head_dim) {
  WindowTiling& t = params.tiling;
  t.pitch = round_up(std::min(seen_by(x, t.tile_x), x.extent), 8);
  t.tile_y = std::min(y.extent, most_strip(head_dim));
  const auto set = [&](int row_pairs) {
    t.row_pairs = row_pairs;
    t.rows = seen_by(y, 4 * row_pairs);  // of this step and the next
    return blocks_per_sm(params, head_dim);
  };
  const int most = most_block_warps(head_dim) / params.octets();
  int best = std::min(most, 4 / params.octets()), blocks = set(best);
  for (int row_pairs = best + 1; row_pairs <= most; ++row_pairs)
    if (const int n = set(row_pairs); n * row_pairs > blocks * best) best = row_pairs, blocks = n;
  set(best);
  return std::max(blocks, 1);
}

// Strips of a plane's columns: wide enough for few halo columns, full in their last copy.
// `parts`: how many strips below each other. Returns how many of them run at the same time.
int64_t set_ring_tiling(const Problem& p, const Axis& y, const Axis& x, int parts, WindowParams& params) {
  WindowTiling& t = params.tiling;
  t.ring = true;
  const int rest = x.extent % 16;
  t.tile_x = rest == 0 || rest > 8 ? 16 : 8;
  const int64_t slots = int64_t{set_ring_warps(y, x, params, p.head_dim)} * cuda::current_device()->num_sms;
  t.tile_y = round_up(detail::ceil_div(y.extent, parts), 2 * t.row_pairs);
  return slots;
}

int least_parts(const Problem& p, const Axis& y) { return detail::ceil_div(y.extent, most_strip(p.head_dim)); }

// Samples that run in the same number of parts.
struct Zone {
  int first = 0, samples = 0, parts = 1;
};

// How samples are cut into strips, so that the GPU is busy to the end: most of them in long strips, for what a block
// does first is worth some rows; the rest in short ones that fill up what the long ones leave free.
struct Zones {
  Zone of[2];
};

Zones cut_to_strips(const Problem& p, const Axis& y, const Axis& x) {
  Zones zones;
  WindowParams params;
  if (p.has_bias) params.bias_table = WindowBias(y.window, x.window);
  const int64_t slots = set_ring_tiling(p, y, x, 1, params);
  const int step = 2 * params.tiling.row_pairs;
  const int64_t strips = int64_t{p.axes[0].extent} * p.heads * num_groups(p.axes[1]) * num_groups(p.axes[2]) *
                         detail::ceil_div(x.extent, params.tiling.tile_x);  // of a sample
  const auto rows = [&](int parts) { return round_up(detail::ceil_div(y.extent, parts), step) + kStripStart; };
  int64_t shortest = INT64_MAX;  // in rows
  const auto consider = [&](int64_t time, const Zone& first, const Zone& second) {
    if (time < shortest) shortest = time, zones = {{first, second}};
  };
  const int batch = int(p.batch), least = least_parts(p, y);
  const int most = std::clamp(y.extent / kLeastStrip, least, least + 15);
  for (int parts = least; parts <= most; ++parts)
    consider(detail::ceil_div(strips * batch * parts, slots) * rows(parts), {0, batch, parts}, {});
  for (int parts = least; parts < least + 2; ++parts) {
    const int64_t rounds = strips * batch * parts / slots;
    const int samples = int(rounds * slots / (strips * parts)), rest = batch - samples;
    if (samples == 0 || rest == 0) continue;
    const int64_t free = rounds * slots - samples * strips * parts;
    for (int more = parts + 1; more <= most; ++more) {
      const int64_t left = std::max<int64_t>(rest * strips * more - free * (rows(parts) / rows(more)), 0);
      consider(rounds * rows(parts) + detail::ceil_div(left, slots) * rows(more), {0, samples, parts},
               {samples, rest, more});
    }
  }
  return zones;
}

void set_backward_tiling(const Problem& p, const Axis& y, const Axis& x, bool of_keys, WindowTiling& t) {
  t.tile_y = std::min(8, round_up(y.extent, 2)), t.tile_x = std::min(16, round_up(x.extent, 8));
  t.units = 1, t.row_pairs = std::min(2, t.tile_y / 2);
  if (of_keys && p.heads_per_kv() > 1) {
    t.row_pairs = t.tile_y / 2;  // a tile for each warp
    return;
  }
  if (fits_groups(y, x)) set_group_tiling(y, x, t);
}

void set_units(const Problem& p, const Axis& y, const Axis& x, WindowParams& params, int heads) {
  WindowTiling& t = params.tiling;
  t.tiles_y = detail::ceil_div(y.extent, t.tile_y), t.tiles_x = detail::ceil_div(x.extent, t.tile_x);
  params.units_per_plane = heads * t.tiles_y * t.tiles_x * num_groups(p.axes[1]) * num_groups(p.axes[2]);
  const int blocks_per_plane = detail::ceil_div(params.units_per_plane, t.units);
  params.num_blocks = int64_t{blocks_per_plane} * p.batch * params.planes_z;
  params.grid = int(params.num_blocks);
  params.by_blocks = FastDiv(blocks_per_plane), params.by_z = FastDiv(params.planes_z);
  params.by_heads = FastDiv(heads), params.by_groups_x = FastDiv(num_groups(p.axes[2]));
  params.by_tiles_x = FastDiv(t.tiles_x), params.by_tiles_y = FastDiv(t.tiles_y);
  params.by_rows = FastDiv(t.rows);
  params.by_octets = FastDiv(params.octets()), params.by_unit_warps = FastDiv(params.octets() * t.row_pairs);
  const int row_threads = t.pitch * 4, threads = params.threads() / t.units;  // see RowLoader
  params.by_row_threads = FastDiv(row_threads);
  params.rows_at_once = std::max(threads / row_threads, 1), params.row_parts = detail::ceil_div(row_threads, threads);
}

Plane plane(const TensorView& t) {
  return {t.ptr,
          uint32_t(t.strides[0]),
          uint32_t(t.strides[1]),
          uint32_t(t.strides[4]),
          int(t.strides[2]),
          int(t.strides[3])};
}

// Loads are of 16 bytes and offsets inside a plane of 32 bits.
bool fits(const Problem& p, const TensorView& t, int64_t multiple) {
  if (!t) return true;
  bool good = reinterpret_cast<uintptr_t>(t.ptr) % (multiple * 2) == 0;
  for (int i = 0; i < 5; ++i)
    good = good && (t.strides[i] >= 0 && t.strides[i] < kMostStride && t.strides[i] % multiple == 0);
  return good && t.strides[2] * p.axes[1].extent + t.strides[3] * p.axes[2].extent < kMostPlane;
}

void set_bias_table(const Problem& p, WindowParams& params) {
  params.bias_table = WindowBias(longest_group(p.axes[1]).window, longest_group(p.axes[2]).window);
  params.by_bias_columns = FastDiv(2 * params.bias_table.x);
}

WindowParams common_params(const Problem& p, const ForwardArgs& args) {
  WindowParams params;
  params.y = p.axes[1], params.x = p.axes[2], params.planes_z = p.axes[0].extent;
  params.by_dilation_y = FastDiv(p.axes[1].dilation), params.by_dilation_x = FastDiv(p.axes[2].dilation);
  params.heads_per_kv = p.heads_per_kv();
  params.q = plane(args.q), params.k = plane(args.k), params.v = plane(args.v);
  params.out = plane(args.out), params.lse = plane(args.lse);
  params.scale = float(p.scale), params.scale_log2 = float(p.scale * kLog2e);
  params.bias = plane(args.bias), params.inverse_scale = float(1 / p.scale);
  if (p.has_bias) set_bias_table(p, params);
  return params;
}

ForwardArgs samples_from(const Problem& p, ForwardArgs args, int first) {
  for (TensorView* t : {&args.q, &args.k, &args.v, &args.out, &args.lse})
    if (*t)
      t->ptr = static_cast<char*>(t->ptr) + first * t->strides[0] * (t == &args.lse ? sizeof(float) : size_of(p.dtype));
  return args;
}

WindowParams zone_params(Problem p, const ForwardArgs& args, const Zone& zone) {
  p.batch = zone.samples;
  WindowParams params = common_params(p, samples_from(p, args, zone.first));
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  if (fits_groups(y, x)) {
    WindowTiling& t = params.tiling;
    set_group_tiling(y, x, t);
    t.rows = y.extent, t.pitch = t.tile_x;
  } else {
    set_ring_tiling(p, y, x, zone.parts, params);
  }
  set_units(p, y, x, params, p.heads);
  return params;
}

Zones forward_zones(const Problem& p) {
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  return fits_groups(y, x) ? Zones{{{0, int(p.batch), 1}, {}}} : cut_to_strips(p, y, x);
}

WindowParams backward_params(const Problem& p, const BackwardArgs& args, void* stats) {
  WindowParams params = common_params(p, args);
  params.dout = plane(args.dout), params.dlse = plane(args.dlse);
  params.dq = plane(args.dq), params.dk = plane(args.dk), params.dv = plane(args.dv);
  const int64_t row = int64_t{p.axes[2].extent} * p.heads, plane_size = row * p.axes[1].extent;
  params.stats = {stats, uint32_t(plane_size * p.axes[0].extent), uint32_t(plane_size), 1, int(row), p.heads};
  return params;
}

WindowParams dkdv_params(const Problem& p, const BackwardArgs& args, void* stats) {
  WindowParams params = backward_params(p, args, stats);
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  WindowTiling& t = params.tiling;
  set_backward_tiling(p, y, x, true, t);
  t.rows = seeing(p.axes[1], t.tile_y), t.pitch = round_up(seeing(p.axes[2], t.tile_x), 8);
  if (p.heads_per_kv() > 1) set_bias_table(p, params);  // see window_dkdv.cu
  set_units(p, y, x, params, p.heads_kv);
  return params;
}

// Blocks that sum the gradient of a bias keep their head and columns: each does every `grid`-th set of units, and that
// many sets are some rows of all heads and columns.
void set_bias_grid(const Problem& p, WindowParams& params) {
  const int columns = p.heads * num_groups(p.axes[2]) * params.tiling.tiles_x / params.tiling.units;
  const int64_t pieces = int64_t{kBlocksPerSm} * cuda::current_device()->num_sms / columns;
  params.grid = int(columns * std::clamp<int64_t>(pieces, 1, params.num_blocks / columns));
  params.bias_sum_tables = params.grid * params.tiling.units / p.heads;
}

WindowParams dq_params(const Problem& p, const BackwardArgs& args, void* stats, float* bias_sums) {
  WindowParams params = backward_params(p, args, stats);
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  WindowTiling& t = params.tiling;
  set_backward_tiling(p, y, x, false, t);
  const auto set_rows = [&] {
    t.rows = std::min(seen_by(y, t.tile_y), y.extent), t.pitch = round_up(std::min(seen_by(x, t.tile_x), x.extent), 8);
    set_units(p, y, x, params, p.heads);
  };
  if (p.has_bias && p.heads * num_groups(p.axes[2]) % 2 != 0) t.units = 1;
  set_rows();
  if (!p.has_bias) return params;
  if (t.tile_y == 8 && y.extent > 16) {
    // Sums take memory per warp: larger tiles take less of it for the halo, if two still fit.
    const WindowTiling small = t;
    t.tile_y = 16, t.row_pairs = 4;
    set_rows();
    if (2 * window_shared_bytes(params, {p.head_dim, false, true}) > size_t(cuda::current_device()->max_shared_bytes))
      t = small, set_rows();
  }
  params.bias_sums = bias_sums;
  set_bias_grid(p, params);
  return params;
}

size_t stats_bytes(const Problem& p) { return size_t(p.batch) * p.tokens() * p.heads * 16; }

bool fits_shared(const Problem& p, Pass pass) {
  const size_t most = size_t(cuda::current_device()->max_shared_bytes);
  if (pass == Pass::forward) {
    const Zone longest{0, int(p.batch), least_parts(p, longest_group(p.axes[1]))};
    return window_shared_bytes(zone_params(p, {}, longest), {p.head_dim}) <= most;
  }
  return window_shared_bytes(dq_params(p, {}, nullptr, nullptr), {p.head_dim, false, true}) <= most &&
         window_shared_bytes(dkdv_params(p, {}, nullptr), {p.head_dim, true, false}) <= most;
}

}  // namespace

size_t window_shared_bytes(const WindowParams& p, const WindowShared& what) {
  const size_t units = p.tiling.units, keys = units * p.tiling.rows * p.tiling.pitch + kTailKeys;
  size_t bytes = keys * (4 * what.head_dim + (what.stats ? 16 : 0)) + units * p.tiling.tile_y * sizeof(Span);
  if (p.bias_table.y == 0) return bytes;
  bytes += units * p.bias_table.bytes();
  if (what.bias_sums) bytes += p.threads() / 32 * p.bias_table.sum_bytes() + units * p.tiling.tile_x * sizeof(Span);
  return bytes;
}

const char* why_not_window(const Problem& p, Pass pass) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "it runs bfloat16 and float16 only";
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (p.head_dim != p.head_dim_v || (p.head_dim != 32 && p.head_dim != 64)) return "head_dim is neither 32 nor 64";
  if (p.axes[0].window != 1) return "the window has more than one plane";
  if (p.extra_keys > 0) return "there are additional keys";
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  if (p.axes[1].window > kMostWindow || p.axes[2].window > kMostWindow) return "the window is larger than 13";
  if (!p.has_window()) return "kernel_size 0 has no windows";
  if (std::min(seen_by(x, 8), x.extent) > kStepColumns) return "8 neighbours along the last axis see more than 16 keys";
  if (y.window * x.window > kMostKeys) return "a query sees more than 127 keys";
  if (!(p.scale > 1e-6 && p.scale < 1e6)) return "the scale is not between 1e-6 and 1e6";
  if (double(p.batch) * p.tokens() * p.heads > double(kMostBlocks)) return "there are more than 2^31 queries";
  if (pass == Pass::backward && p.has_bias && x.window > kMostSummed)
    return "there is a relative position bias, and the window is wider than 7";
  if (int64_t{p.axes[1].extent} * p.axes[2].extent * p.heads >= kMostPlane) return "a plane has more than 2^29 rows";
  return fits_shared(p, pass) ? nullptr : "it needs more shared memory than this GPU has";
}

Int3 window_tile(const Problem& p, Pass pass) {
  if (pass == Pass::forward) {
    const WindowTiling t = zone_params(p, {}, forward_zones(p).of[0]).tiling;
    return {1, t.tile_y, t.tile_x};
  }
  WindowTiling t;
  set_backward_tiling(p, longest_group(p.axes[1]), longest_group(p.axes[2]), true, t);
  return {1, t.tile_y, t.tile_x};
}

bool window_forward(const Problem& p, const ForwardArgs& args, void* stream) {
  for (const TensorView& t : {args.q, args.k, args.v, args.out})
    if (!fits(p, t, 8)) return false;
  if (!fits(p, args.lse, 1) || !fits(p, args.bias, 1)) return false;
  for (const Zone& zone : forward_zones(p).of)
    if (zone.samples > 0)
      launch_window_forward(zone_params(p, args, zone), p.dtype, p.head_dim, stream, zone.first > 0);
  return true;
}

size_t window_workspace(const Problem& p, Pass pass) {
  if (pass == Pass::forward) return 0;
  const WindowParams params = dq_params(p, {}, nullptr, nullptr);
  return stats_bytes(p) + size_t(params.bias_sum_tables) * p.heads * bias_entries(p) * sizeof(float);
}

bool window_backward(const Problem& p, const BackwardArgs& args, void* stream, void* workspace) {
  for (const TensorView& t : {args.q, args.k, args.v, args.out, args.dout, args.dq, args.dk, args.dv})
    if (!fits(p, t, 8)) return false;
  for (const TensorView& t : {args.lse, args.dlse, args.bias})
    if (!fits(p, t, 1)) return false;
  float* sums = args.dbias ? reinterpret_cast<float*>(static_cast<char*>(workspace) + stats_bytes(p)) : nullptr;
  const WindowParams params = dq_params(p, args, workspace, sums);
  launch_window_dq(params, p.dtype, p.head_dim, stream);
  if (params.bias_sums) launch_reduce_bias(p, sums, params.bias_sum_tables, args.dbias, stream);
  if (args.dk || args.dv) launch_window_dkdv(dkdv_params(p, args, workspace), p.dtype, p.head_dim, stream);
  return true;
}

}  // namespace natten::cuda_portable
