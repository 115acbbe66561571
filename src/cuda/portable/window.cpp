// SPDX-License-Identifier: MIT
// Host side of the "window" kernels: what they can run, how planes are cut, and the order of the launches.
#include "cuda/portable/window.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/device.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr int kMostWindow = 13;
constexpr int kMostKeys = 127;           // of a query: see count_nonfinite in window_forward.cu
constexpr int kStepColumns = 16;         // of keys, that 8 queries see
constexpr int64_t kMostPlane = 1 << 29;  // elements, so that offsets in bytes fit 32 bits
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;
constexpr int kTailKeys = 16;

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

void set_forward_tiling(const Problem& p, const Axis& y, const Axis& x, WindowTiling& t) {
  if (fits_groups(y, x)) {
    t.tile_y = round_up(y.extent, 2), t.tile_x = round_up(x.extent, 8);
    t.units = t.tile_x == 8 ? 2 : 1;
    t.row_pairs = t.tile_x == 8 ? 1 : std::min(3, t.tile_y / 2);
    t.rows = y.extent, t.pitch = t.tile_x;
    return;
  }
  // A strip: wide enough for few halo columns, full in its last copy, and as long as the GPU stays busy to the end.
  t.ring = true;
  const int rest = x.extent % 16;
  t.tile_x = rest == 0 || rest > 8 ? 16 : 8;
  t.row_pairs = t.tile_x == 8 ? 4 : 2;
  const int step = 2 * t.row_pairs, sms = cuda::current_device()->num_sms;
  const int64_t slots = int64_t{sms} * (p.head_dim == 32 ? 4 : 3);
  const int64_t strips = p.batch * p.axes[0].extent * p.heads * num_groups(p.axes[1]) * num_groups(p.axes[2]) *
                         detail::ceil_div(x.extent, t.tile_x);
  const int64_t most = std::max(y.extent / 28, 1);
  const int64_t parts = strips * most >= 3 * slots ? (6 * slots + strips - 1) / strips : 2 * int64_t{sms} / strips;
  t.tile_y = round_up(detail::ceil_div(y.extent, int(std::clamp<int64_t>(parts, 1, most))), step);
  t.rows = seen_by(y, 2 * step);  // of this step and the next
  t.pitch = round_up(std::min(seen_by(x, t.tile_x), x.extent), 8);
}

void set_backward_tiling(const Axis& y, const Axis& x, WindowTiling& t) {
  t.tile_y = std::min(8, round_up(y.extent, 2)), t.tile_x = std::min(16, round_up(x.extent, 8));
  t.units = 1, t.row_pairs = std::min(2, t.tile_y / 2);
  if (!fits_groups(y, x)) return;
  t.tile_y = round_up(y.extent, 2);
  t.units = t.tile_x == 8 ? 2 : 1;
  t.row_pairs = std::min(t.tile_x == 8 ? 2 : 4, t.tile_y / 2);
}

void set_units(const Problem& p, const Axis& y, const Axis& x, WindowParams& params, int heads) {
  WindowTiling& t = params.tiling;
  t.tiles_y = detail::ceil_div(y.extent, t.tile_y), t.tiles_x = detail::ceil_div(x.extent, t.tile_x);
  params.heads = heads;
  params.units_per_plane = heads * t.tiles_y * t.tiles_x * num_groups(p.axes[1]) * num_groups(p.axes[2]);
  params.blocks_per_plane = detail::ceil_div(params.units_per_plane, t.units);
  params.num_blocks = int64_t{params.blocks_per_plane} * p.batch * params.planes_z;
  params.by_blocks = FastDiv(params.blocks_per_plane), params.by_z = FastDiv(params.planes_z);
  params.by_heads = FastDiv(heads), params.by_groups_x = FastDiv(num_groups(p.axes[2]));
  params.by_tiles_x = FastDiv(t.tiles_x), params.by_tiles_y = FastDiv(t.tiles_y);
  params.by_rows = FastDiv(t.rows);
  params.by_octets = FastDiv(params.octets()), params.by_unit_warps = FastDiv(params.octets() * t.row_pairs);
  const int row_threads = t.pitch * 4, threads = params.threads() / t.units;  // see RowLoader
  params.by_row_threads = FastDiv(row_threads);
  params.rows_at_once = std::max(threads / row_threads, 1), params.row_parts = detail::ceil_div(row_threads, threads);
}

Plane plane(const TensorView& t) {
  return {t.ptr, t.strides[0], t.strides[1], t.strides[4], int(t.strides[2]), int(t.strides[3])};
}

// Loads are of 16 bytes and offsets inside a plane of 32 bits.
bool fits(const Problem& p, const TensorView& t, int64_t multiple) {
  if (!t) return true;
  bool good = reinterpret_cast<uintptr_t>(t.ptr) % (multiple * 2) == 0;
  for (int i = 0; i < 5; ++i) good = good && (t.strides[i] >= 0 && t.strides[i] % multiple == 0);
  return good && t.strides[2] * p.axes[1].extent + t.strides[3] * p.axes[2].extent < kMostPlane;
}

WindowParams common_params(const Problem& p, const ForwardArgs& args) {
  WindowParams params;
  params.y = p.axes[1], params.x = p.axes[2], params.planes_z = p.axes[0].extent;
  params.heads_per_kv = p.heads_per_kv();
  params.q = plane(args.q), params.k = plane(args.k), params.v = plane(args.v);
  params.out = plane(args.out), params.lse = plane(args.lse);
  params.scale = float(p.scale), params.scale_log2 = float(p.scale * kLog2e);
  return params;
}

WindowParams forward_params(const Problem& p, const ForwardArgs& args) {
  WindowParams params = common_params(p, args);
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  set_forward_tiling(p, y, x, params.tiling);
  set_units(p, y, x, params, p.heads);
  return params;
}

WindowParams backward_params(const Problem& p, const BackwardArgs& args, bool of_keys, void* stats) {
  WindowParams params = common_params(p, args);
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  WindowTiling& t = params.tiling;
  set_backward_tiling(y, x, t);
  t.rows = of_keys ? seeing(p.axes[1], t.tile_y) : std::min(seen_by(y, t.tile_y), y.extent);
  t.pitch = round_up(of_keys ? seeing(p.axes[2], t.tile_x) : std::min(seen_by(x, t.tile_x), x.extent), 8);
  params.dout = plane(args.dout), params.dlse = plane(args.dlse);
  params.dq = plane(args.dq), params.dk = plane(args.dk), params.dv = plane(args.dv);
  const int64_t row = int64_t{p.axes[2].extent} * p.heads, plane_size = row * p.axes[1].extent;
  params.stats = {stats, plane_size * p.axes[0].extent, plane_size, 1, int(row), p.heads};
  set_units(p, y, x, params, p.heads);
  return params;
}

bool fits_shared(const Problem& p, Pass pass) {
  const size_t most = size_t(cuda::current_device()->max_shared_bytes);
  if (pass == Pass::forward) return window_shared_bytes(forward_params(p, {}), 2, p.head_dim, false) <= most;
  return window_shared_bytes(backward_params(p, {}, false, nullptr), 2, p.head_dim, false) <= most &&
         window_shared_bytes(backward_params(p, {}, true, nullptr), 2, p.head_dim, true) <= most;
}

}  // namespace

size_t window_shared_bytes(const WindowParams& p, int tensors, int head_dim, bool stats) {
  const size_t keys = size_t(p.tiling.units) * p.tiling.rows * p.tiling.pitch + kTailKeys;
  return keys * (tensors * head_dim * 2 + (stats ? 16 : 0)) + size_t(p.tiling.units) * p.tiling.tile_y * sizeof(Span);
}

const char* why_not_window(const Problem& p, Pass pass) {
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "it runs bfloat16 and float16 only";
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (p.head_dim != p.head_dim_v || (p.head_dim != 32 && p.head_dim != 64)) return "head_dim is neither 32 nor 64";
  if (p.axes[0].window != 1) return "the window has more than one plane";
  if (p.has_bias || p.extra_keys > 0) return "there is a relative position bias or additional keys";
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  if (p.axes[1].window > kMostWindow || p.axes[2].window > kMostWindow) return "the window is larger than 13";
  if (!p.has_window()) return "kernel_size 0 has no windows";
  if (std::min(seen_by(x, 8), x.extent) > kStepColumns) return "8 neighbours along the last axis see more than 16 keys";
  if (y.window * x.window > kMostKeys) return "a query sees more than 127 keys";
  if (!(p.scale > 1e-6 && p.scale < 1e6)) return "the scale is not between 1e-6 and 1e6";
  if (double(p.batch) * p.tokens() * p.heads > double(kMostBlocks)) return "there are more than 2^31 queries";
  if (pass == Pass::backward && p.heads != p.heads_kv) return "key/value heads are shared";
  if (int64_t{p.axes[1].extent} * p.axes[2].extent * p.heads >= kMostPlane) return "a plane has more than 2^29 rows";
  return fits_shared(p, pass) ? nullptr : "it needs more shared memory than this GPU has";
}

Int3 window_tile(const Problem& p, Pass pass) {
  WindowTiling t;
  const Axis y = longest_group(p.axes[1]), x = longest_group(p.axes[2]);
  pass == Pass::forward ? set_forward_tiling(p, y, x, t) : set_backward_tiling(y, x, t);
  return {1, t.tile_y, t.tile_x};
}

bool window_forward(const Problem& p, const ForwardArgs& args, void* stream) {
  for (const TensorView& t : {args.q, args.k, args.v, args.out})
    if (!fits(p, t, 8)) return false;
  if (!fits(p, args.lse, 1)) return false;
  launch_window_forward(forward_params(p, args), p.dtype, p.head_dim, stream);
  return true;
}

size_t window_workspace(const Problem& p, Pass pass) {
  return pass == Pass::forward ? 0 : size_t(p.batch) * p.tokens() * p.heads * 16;
}

bool window_backward(const Problem& p, const BackwardArgs& args, void* stream, void* workspace) {
  for (const TensorView& t : {args.q, args.k, args.v, args.out, args.dout, args.dq, args.dk, args.dv})
    if (!fits(p, t, 8)) return false;
  if (!fits(p, args.lse, 1) || !fits(p, args.dlse, 1)) return false;
  launch_window_dq(backward_params(p, args, false, workspace), p.dtype, p.head_dim, stream);
  if (args.dk || args.dv) launch_window_dkdv(backward_params(p, args, true, workspace), p.dtype, p.head_dim, stream);
  return true;
}

}  // namespace natten::cuda_portable
