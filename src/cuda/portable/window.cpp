// SPDX-License-Identifier: MIT
// Host side of the "window" kernels: what they can run, how planes are cut, and the order of the launches.
#include "cuda/portable/window.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "cuda/device.h"
#include "cuda/portable/boxes.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr int kMostWindow = 13;
static_assert(kMostWindow * kMostWindow <= 255, "see count_nonfinite in window_forward.cu");
constexpr int kMostHeadDim = 64;
constexpr int kStepColumns = 16;         // of keys, that the queries of a warp's tile see
constexpr int64_t kMostPlane = 1 << 29;  // elements, so that offsets in bytes fit 32 bits
constexpr int64_t kMostStride = int64_t{1} << 32;
constexpr int64_t kMostTokens = int64_t{1} << 30;  // as boxes, which run what does not fit
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int kMostSummed = 7;   // window of which a bias has a gradient: see LaneSums
constexpr int kBlocksPerSm = 8;  // of dq where each has sums: few enough tables, even work

// Positions that `tile` neighbours see together, at most: their windows and what lies between leaders of stride groups.
int seen_by(const Axis& group, int tile) { return group.window + tile - 1 + group.stride - 1; }

// The same for tiles that begin at multiples of `tile`.
int seen_by_aligned(const Axis& group, int tile) {
  if (tile % group.stride == 0) return group.window + tile - group.stride;
  return group.window + detail::ceil_div(tile - 1, group.stride) * group.stride;
}

// Whether the columns that a warp's tile sees are no more than a step has.
bool is_one_step(const Axis& x, Shape shape) {
  return std::min(seen_by_aligned(x, tile_columns(shape)), x.extent) <= kStepColumns;
}

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
  t.warps_y = t.tile_x == 8 ? 1 : std::min(2, t.tile_y / 2);
}

Shape choose_shape(const Problem& p, const Axis& x) {
  if (!is_one_step(x, Shape::flat)) return Shape::square;
  return x.extent <= 8 && channel_bucket(p.head_dim) == 32 ? Shape::narrow : Shape::flat;
}

void set_bias_table(const Problem& p, WindowParams& params) {
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  params.bias_table = WindowBias(y.window, x.window, choose_shape(p, x));
  params.by_bias_columns = FastDiv(2 * params.bias_table.x);
}

// The most tokens of a strip below each other: the table of their spans must not cost a block its place.
int most_strip(int head_dim) { return channel_bucket(head_dim) == 32 ? 128 : 96; }
int least_parts(const Problem& p, const Axis& y) { return detail::ceil_div(y.extent, most_strip(p.head_dim)); }

// Rows and columns of a strip's ring: what this step and the next one see.
void set_ring(const Axis& y, const Axis& x, WindowTiling& t) {
  t.rows = seen_by(y, 2 * t.step_rows());
  t.pitch = round_up(std::min(seen_by_aligned(x, t.tile_x), x.extent), 8);
}

// Blocks that a multiprocessor holds: shared memory, of which each takes 1 KiB more than it asks for, and registers
// for `most_warps` decide.
int blocks_per_sm(const WindowParams& params, int most_warps) {
  const int by_memory = (cuda::current_device()->max_shared_bytes + 1024) /
                        int(window_shared_bytes(params, WindowKernel::forward) + 1024);
  return std::min(by_memory, most_warps / (params.threads() / 32));
}

// Blocks of each multiprocessor. Wide enough for few halo columns, and full in its last copy; of 64 channels as many
// warps below each other as keep a multiprocessor busiest.
int set_flat_columns(const Axis& y, const Axis& x, WindowParams& params) {
  WindowTiling& t = params.tiling;
  const int rest = x.extent % 16;
  t.tile_x = rest == 0 || rest > 8 ? 16 : 8;
  const int most = most_flat_warps(channel_bucket(params.head_dim)), most_warps = most == 4 ? 16 : 12;
  int best = 0, blocks = 0;
  for (int warps = 4 / t.warps_x(); warps <= most / t.warps_x(); ++warps) {
    t.warps_y = warps;
    set_ring(y, x, t);
    if (const int n = blocks_per_sm(params, most_warps); n * warps > blocks * best || best == 0)
      best = warps, blocks = n;
  }
  t.warps_y = best;
  set_ring(y, x, t);
  return std::max(blocks, 1);
}

// The same for square tiles, one below the other: as many side by side as keep a multiprocessor busiest, and of those
// that load the fewest columns.
int set_square_columns(const Axis& y, const Axis& x, WindowParams& params) {
  WindowTiling& t = params.tiling;
  const int most_warps = channel_bucket(params.head_dim) == 32 ? 2 * kMostSquareWarps : kMostSquareWarps;
  WindowTiling best;
  int blocks = 1;
  std::pair<double, int> most{-1, 0};
  for (int warps = kMostSquareWarps; warps > 0; --warps) {
    t.tile_x = warps * tile_columns(t.shape);
    set_ring(y, x, t);
    if (t.pitch > 8 * warps) continue;  // a pass of its threads loads a row
    const int fit = blocks_per_sm(params, most_warps), strips = detail::ceil_div(x.extent, t.tile_x);
    const std::pair busy{double(fit * warps) * x.extent / (strips * t.tile_x), -strips * t.pitch};
    if (busy > most) most = busy, best = t, blocks = std::max(fit, 1);
  }
  t = best;
  return blocks;
}

// Cuts planes into strips, `parts` of them below each other. Returns how many of them run at the same time.
int64_t set_strips(const Problem& p, const Axis& y, const Axis& x, int parts, WindowParams& params) {
  WindowTiling& t = params.tiling;
  t.ring = true, t.shape = choose_shape(p, x);
  if (t.shape == Shape::narrow) t.shape = Shape::flat;
  t.tile_y = std::min(y.extent, most_strip(p.head_dim));
  const int blocks = t.shape == Shape::square ? set_square_columns(y, x, params) : set_flat_columns(y, x, params);
  t.tile_y = round_up(detail::ceil_div(y.extent, parts), t.step_rows());
  return int64_t{blocks} * cuda::current_device()->num_sms;
}

// Samples whose planes are cut into the same number of parts.
struct Zone {
  int first = 0, samples = 0, parts = 1;
};

// How samples are cut, so that the GPU is busy to the end: most of them into long strips, for what a block does first
// is worth some rows; the rest into short ones that fill up what the long ones leave free.
struct Zones {
  Zone of[2];
};

Zones cut_samples(const Problem& p, const Axis& y, const Axis& x) {
  constexpr int kLeastRows = 16;
  WindowParams params;
  params.head_dim = p.head_dim;
  if (p.has_bias) set_bias_table(p, params);
  const int64_t slots = set_strips(p, y, x, 1, params);
  const WindowTiling& t = params.tiling;
  const int64_t strips = int64_t{p.axes[0].extent} * p.heads * num_groups(p.axes[1]) * num_groups(p.axes[2]) *
                         detail::ceil_div(x.extent, t.tile_x);  // of a sample
  const int first_rows = t.shape == Shape::square ? 8 : 4;      // worth what a block does first
  const auto rows = [&](int parts) { return round_up(detail::ceil_div(y.extent, parts), t.step_rows()) + first_rows; };
  const auto waves = [&](int64_t blocks) { return (blocks + slots - 1) / slots; };
  Zones zones;
  int64_t shortest = std::numeric_limits<int64_t>::max();  // in rows
  const auto consider = [&](int64_t time, const Zone& first, const Zone& second) {
    if (time < shortest) shortest = time, zones = {{first, second}};
  };
  const int batch = int(p.batch), least = least_parts(p, y);
  const int most = std::clamp(y.extent / kLeastRows, least, least + 15);
  for (int parts = least; parts <= most; ++parts)
    consider(waves(strips * batch * parts) * rows(parts), {0, batch, parts}, {});
  for (int parts = least; parts < least + 2; ++parts) {
    const int64_t full = strips * batch * parts / slots;  // waves
    const int samples = int(full * slots / (strips * parts)), rest = batch - samples;
    if (samples == 0 || rest == 0) continue;
    const int64_t free = full * slots - samples * strips * parts;
    for (int more = parts + 1; more <= most; ++more) {
      const int64_t left = std::max<int64_t>(rest * strips * more - free * (rows(parts) / rows(more)), 0);
      consider(full * rows(parts) + waves(left) * rows(more), {0, samples, parts}, {samples, rest, more});
    }
  }
  return zones;
}

void set_backward_tiling(const Problem& p, const Axis& y, const Axis& x, bool of_keys, WindowTiling& t) {
  t.shape = choose_shape(p, x);
  t.tile_y = std::min(8, round_up(y.extent, tile_rows(t.shape))), t.tile_x = std::min(16, round_up(x.extent, 8));
  t.units = 1, t.warps_y = t.tile_y / tile_rows(t.shape);  // a tile for each warp
  if (t.shape == Shape::square || (of_keys && p.heads_per_kv() > 1)) return;
  t.warps_y = std::min(2, t.warps_y);
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
  params.by_warps_x = FastDiv(t.warps_x()), params.by_unit_warps = FastDiv(t.warps_x() * t.warps_y);
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

// Biases and statistics are divided by it.
bool is_scale_good(const Problem& p) { return p.scale > 1e-6 && p.scale < 1e6; }

// Loads are of 16 bytes and offsets inside a plane of 32 bits.
bool fits(const Problem& p, const TensorView& t, int64_t multiple) {
  if (!t) return true;
  bool good = reinterpret_cast<uintptr_t>(t.ptr) % (multiple * 2) == 0;
  for (int i = 0; i < 5; ++i)
    good = good && (t.strides[i] >= 0 && t.strides[i] < kMostStride && t.strides[i] % multiple == 0);
  return good && t.strides[2] * p.axes[1].extent + t.strides[3] * p.axes[2].extent < kMostPlane;
}

WindowParams common_params(const Problem& p, const ForwardArgs& args) {
  WindowParams params;
  params.head_dim = p.head_dim;
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
  const auto move = [first](TensorView& t, size_t size) {
    if (t) t.ptr = static_cast<char*>(t.ptr) + first * t.strides[0] * int64_t(size);
  };
  for (TensorView* t : {&args.q, &args.k, &args.v, &args.out}) move(*t, size_of(p.dtype));
  move(args.lse, sizeof(float));
  return args;
}

WindowParams forward_params(Problem p, const ForwardArgs& args, const Zone& zone) {
  p.batch = zone.samples;
  WindowParams params = common_params(p, samples_from(p, args, zone.first));
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  if (fits_groups(y, x)) {
    WindowTiling& t = params.tiling;
    t.shape = choose_shape(p, x);
    set_group_tiling(y, x, t);
    t.rows = y.extent, t.pitch = t.tile_x;
  } else {
    set_strips(p, y, x, zone.parts, params);
  }
  set_units(p, y, x, params, p.heads);
  return params;
}

Zones forward_zones(const Problem& p) {
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  return fits_groups(y, x) ? Zones{{{0, int(p.batch), 1}, {}}} : cut_samples(p, y, x);
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
  if (p.heads_per_kv() > 1 && t.shape != Shape::square) set_bias_table(p, params);  // see window_dkdv.cu
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
    t.tile_y = 16, t.warps_y = 4;
    set_rows();
    if (2 * window_shared_bytes(params, WindowKernel::dq) > size_t(cuda::current_device()->max_shared_bytes))
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
    const WindowParams params = forward_params(p, {}, longest);
    if (params.tiling.ring && params.row_parts > 1) return false;  // its loader makes one pass of a row
    return window_shared_bytes(params, WindowKernel::forward) <= most;
  }
  return window_shared_bytes(dq_params(p, {}, nullptr, nullptr), WindowKernel::dq) <= most &&
         window_shared_bytes(dkdv_params(p, {}, nullptr), WindowKernel::dkdv) <= most;
}

}  // namespace

const char* why_not_window(const Problem& p, Pass pass) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "it runs bfloat16 and float16 only";
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (p.tokens() >= kMostTokens) return "there are more than 2^30 tokens";
  if (p.head_dim > kMostHeadDim || p.head_dim % 8 != 0) return "head_dim is more than 64, or no multiple of 8";
  if (p.head_dim != p.head_dim_v) return "values are not as long as keys";
  if (p.axes[0].window != 1) return "the window has more than one plane";
  if (p.extra_keys > 0) return "there are additional keys";
  const Axis x = longest_group(p.axes[2]);
  if (p.axes[1].window > kMostWindow || p.axes[2].window > kMostWindow) return "the window is larger than 13";
  if (!p.has_window()) return "kernel_size 0 has no windows";
  if (!is_one_step(x, Shape::square)) return "4 neighbours along the last axis see more than 16 keys";
  if (double(p.batch) * p.tokens() * p.heads > double(kMostBlocks)) return "there are more than 2^31 queries";
  if (pass == Pass::backward && p.has_bias && (x.window > kMostSummed || choose_shape(p, x) == Shape::square))
    return "there is a relative position bias, and the window is wider than 7 or strided";
  if (int64_t{p.axes[1].extent} * p.axes[2].extent * p.heads >= kMostPlane) return "a plane has more than 2^29 rows";
  return fits_shared(p, pass) ? nullptr : "it needs more shared memory than this GPU has";
}

Int3 window_tile(const Problem& p, Pass pass) {
  const WindowTiling t =
      (pass == Pass::forward ? forward_params(p, {}, forward_zones(p).of[0]) : dkdv_params(p, {}, nullptr)).tiling;
  return {1, t.tile_y, t.tile_x};
}

bool window_forward(const Problem& p, const ForwardArgs& args, void* stream) {
  if (!is_scale_good(p)) return false;
  for (const TensorView& t : {args.q, args.k, args.v, args.out})
    if (!fits(p, t, 8)) return false;
  if (!fits(p, args.lse, 1) || !fits(p, args.bias, 1)) return false;
  for (const Zone& zone : forward_zones(p).of)
    if (zone.samples > 0) launch_window_forward(forward_params(p, args, zone), p.dtype, stream, zone.first > 0);
  return true;
}

size_t window_workspace(const Problem& p, Pass pass) {
  if (pass == Pass::forward) return 0;
  const WindowParams params = dq_params(p, {}, nullptr, nullptr);
  return stats_bytes(p) + size_t(params.bias_sum_tables) * p.heads * bias_entries(p) * sizeof(float);
}

bool window_backward(const Problem& p, const BackwardArgs& args, void* stream, void* workspace) {
  if (!is_scale_good(p)) return false;
  for (const TensorView& t : {args.q, args.k, args.v, args.out, args.dout, args.dq, args.dk, args.dv})
    if (!fits(p, t, 8)) return false;
  for (const TensorView& t : {args.lse, args.dlse, args.bias})
    if (!fits(p, t, 1)) return false;
  float* sums = args.dbias ? reinterpret_cast<float*>(static_cast<char*>(workspace) + stats_bytes(p)) : nullptr;
  const WindowParams params = dq_params(p, args, workspace, sums);
  launch_window_dq(params, p.dtype, stream);
  if (params.bias_sums) launch_reduce_bias(p, sums, params.bias_sum_tables, args.dbias, stream);
  if (args.dk || args.dv) launch_window_dkdv(dkdv_params(p, args, workspace), p.dtype, stream);
  return true;
}

}  // namespace natten::cuda_portable
