// SPDX-License-Identifier: MIT
// Host side of the kernels of the unfused operators: what they can run, in which tiles, and their launches.
#include "cuda/portable/unfused.h"

#include <algorithm>
#include <cmath>

#include "cuda/device.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr int kMostHeadDim = 128;
constexpr int64_t kMostInt = (int64_t{1} << 31) - 1;
constexpr int64_t kMostTokens = int64_t{1} << 30;  // positions and slots are ints
constexpr int64_t kMostSlots = int64_t{1} << 24;
constexpr int64_t kMostBiasEntries = int64_t{1} << 26;
constexpr double kBlocksPerSm = 4;      // that keep a GPU busy
constexpr int kMostSharedTable = 2048;  // entries of a warp's table of bias sums in shared memory

const char* why_not(const Problem& p) {
  if (const char* reason = why_not_this_gpu()) return reason;
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "it runs bfloat16 and float16 only";
  if (p.batch == 0 || p.tokens() == 0) return "there are no queries";
  if (std::max(p.head_dim, p.head_dim_v) > kMostHeadDim) return "head_dim is more than 128";
  if (p.tokens() >= kMostTokens || p.extra_keys >= kMostTokens) return "there are more than 2^30 tokens";
  if (num_slots(p) > kMostSlots) return "a query has more than 2^24 slots";
  if (bias_entries(p) > kMostBiasEntries) return "the relative position bias has more than 2^26 entries per head";
  if (double(p.batch) * double(p.tokens()) * p.heads > double(kMostInt)) return "there are more than 2^31 queries";
  return nullptr;
}

// Channels that a kernel is compiled for.
int bucket(int dim) { return dim <= 32 ? 32 : dim <= 64 ? 64 : 128; }

// Tokens of a pair of octets: neighbours along y if possible, so that they share what belongs to columns.
Int3 pair_of(Int3 octets) {
  if (octets.y > 1) return {1, 2, 8};
  return octets.x > 1 ? Int3{1, 1, 16} : Int3{2, 1, 8};
}

// Positions that `tile` queries see, at most.
int64_t most_seen(const Axis& axis, int tile) {
  const Axis g = group_axis(axis, 0);
  return std::min<int64_t>(int64_t{g.window} + tile + g.stride - 2, g.extent);
}

// Positions of the field of any tile, if it (at most `most`) and the slots pass through shared memory; otherwise 0.
// What queries see of keys is not known that easily.
int staged_field(const Problem& p, Side side, Int3 tile, int most) {
  if (side != Side::queries || !p.has_window() || p.extra_keys > 0 || num_slots(p) > kMostStagedSlots) return 0;
  const int64_t columns = (most_seen(p.axes[2], tile.x) + 7) / 8 * 8;
  const int64_t rows = most_seen(p.axes[0], tile.z) * most_seen(p.axes[1], tile.y);
  return columns > kMostColumns || rows > most / columns ? 0 : int(columns * rows);
}

// Octets per axis, z, y, x, that make the least work: steps of the warps, and loads for all of them. More octets than
// warps take at once if the field stays in shared memory meanwhile, and blocks remain for the whole GPU.
Int3 choose_octets(const Problem& p, Side side) {
  constexpr int kLeast = 2 * kThreads / 32;
  if (side == Side::extra_keys) return {1, 1, kLeast};
  const Axis z = group_axis(p.axes[0], 0), y = group_axis(p.axes[1], 0), x = group_axis(p.axes[2], 0);
  const int keys = most_keys(bucket(std::max(p.head_dim, p.head_dim_v)));
  const auto seen = [side](const Axis& a, int tile) { return double(positions_seen(a, side, tile)); };
  const auto count = [&](int tz, int ty, int tx) {
    return double(detail::ceil_div(z.extent, tz)) * detail::ceil_div(y.extent, ty) * detail::ceil_div(x.extent, tx);
  };
  const double planes =
      double(p.batch) * p.heads * num_groups(p.axes[0]) * num_groups(p.axes[1]) * num_groups(p.axes[2]);
  const double enough = kBlocksPerSm * cuda::current_device()->num_sms;
  Int3 best;
  double least = HUGE_VAL;
  for (int octets = kLeast; octets <= kMostOctets; octets *= 2)
    for (int tz = 1; tz <= octets; tz *= 2)
      for (int ty = 1; tz * ty <= octets; ty *= 2) {
        const int tx = octets / tz / ty;
        if (tx > kMostOctetsX) continue;
        const double tiles = count(tz, ty, 8 * tx);
        const Int3 pair = pair_of({tz, ty, tx});
        const double pairs = (tiles * (octets / 2) + count(pair.z, pair.y, pair.x)) / 2;  // half the price if empty
        const double steps = seen(z, pair.z) * seen(y, pair.y) * std::ceil(seen(x, pair.x) / kStep);
        const double loads = seen(z, tz) * seen(y, ty) * std::ceil(seen(x, 8 * tx) / 8);
        if (octets > kLeast && (tiles * planes < enough || !staged_field(p, side, {tz, ty, 8 * tx}, keys))) continue;
        // In warps' work of a step: what surrounds the loops, per tile and pair, steps, and 16 bytes for each thread.
        const double cost = tiles * (6 + loads / 12) + pairs / 4 * (5 + steps);
        if (cost < least) least = cost, best = {tz, ty, tx};
      }
  return best;
}

// `head_dim`: channels of the kernel.
void set_tile(UnfusedParams& params, Side side, int head_dim) {
  BoxesParams& b = params.boxes;
  const Int3 octets = choose_octets(b.problem, side);
  params.pair = pair_of(octets), params.num_pairs = int(octets.volume() / 2);
  b.side = side, b.tile = {octets.z, octets.y, 8 * octets.x};
  params.pairs_y = FastDiv(b.tile.y / params.pair.y), params.pairs_x = FastDiv(b.tile.x / params.pair.x);
  set_items(b);
  const int most = most_keys(head_dim), field = staged_field(b.problem, side, b.tile, most);
  params.staged = field > 0, params.chunk_keys = field > 0 ? field : most;
}

// Does some query have fewer keys than its window has slots?
bool has_unused(const Problem& p) {
  if (!p.has_window()) return false;
  for (const Axis& a : p.axes)
    if (a.window > 1 && (a.causal || group_axis(a, num_groups(a) - 1).extent < a.window)) return true;
  return false;
}

UnfusedParams params_of(const Problem& p, const Product& t) {
  UnfusedParams params;
  BoxesParams& b = params.boxes;
  b.problem = p;
  b.samples[0] = only_sample(p);
  b.q = rows(p, t.queries, t.dim), b.k = rows(p, t.keys, t.dim), b.extra_k = rows(p, t.extra, t.dim);
  b.bias = t.bias;
  b.problem.has_bias = bool(t.bias);  // not where the bias of a problem plays no part in a product
  params.weights = t.weights;
  params.slots = int(num_slots(p)), params.window_slots = params.slots - p.extra_keys;
  params.slot_strides[0] = p.axes[1].window * p.axes[2].window, params.slot_strides[1] = p.axes[2].window;
  params.slot_strides[2] = 1;
  params.window_y = FastDiv(p.axes[1].window), params.window_x = FastDiv(p.axes[2].window);
  params.heads_per_kv = FastDiv(p.heads_per_kv());
  params.has_unused = has_unused(p);
  params.scale = float(t.scale), params.unused = float(t.unused);
  return params;
}

// --- as the core calls them ---
void list_plans(const Problem& p, PlanList& list) {
  if (const char* reason = why_not(p)) return list.rejections.push_back({"portable", reason});
  const Int3 octets = choose_octets(p, Side::queries);
  list.plans.push_back({"portable", "octets", {octets.z, octets.y, 8 * octets.x}});
}

size_t workspace_bytes(const Problem& p, const Plan&, int) {
  return size_t(p.heads) * bias_pieces(p) * (kThreads / 32) * bias_entries(p) * sizeof(float);
}

// Strides of tokens, in elements, are ints in the kernels; whoever has larger ones gets the plain kernels.
bool fits(const Problem& p, const Product& t) {
  for (const TensorView* view : {&t.weights, &t.queries, &t.keys, &t.extra})
    for (int a = 0; *view && a < 3; ++a)
      if (std::abs(double(view->strides[1 + a])) * p.axes[a].dilation >= double(kMostInt)) return false;
  return true;
}

void scores(const Problem& p, const Product& t, const Plan& plan, const Executor& executor, void* workspace) {
  if (!fits(p, t)) return cuda_reference::kBackend.unfused->scores(p, t, plan, executor, workspace);
  UnfusedParams params = params_of(p, t);
  set_tile(params, Side::queries, bucket(t.dim));
  launch_scores(params, executor.stream);
}

void weigh_keys(const Problem& p, const Product& t, const Plan& plan, const Executor& executor, void* workspace) {
  if (!fits(p, t)) return cuda_reference::kBackend.unfused->weigh_keys(p, t, plan, executor, workspace);
  UnfusedParams params = params_of(p, t);
  set_tile(params, Side::queries, std::min(bucket(t.dim), 64));
  launch_weigh(params, executor.stream);
}

void weigh_queries(const Problem& p, const Product& t, const Plan& plan, const Executor& executor, void* workspace) {
  if (!fits(p, t)) return cuda_reference::kBackend.unfused->weigh_queries(p, t, plan, executor, workspace);
  UnfusedParams params = params_of(p, t);
  for (const Side side : {Side::keys, Side::extra_keys}) {
    if (side == Side::keys ? !t.keys || !p.has_window() : !t.extra || p.extra_keys == 0) continue;
    set_tile(params, side, std::min(bucket(t.dim), 64));
    launch_weigh(params, executor.stream);
  }
}

void sum_bias(const Problem& p, const Product& t, const Plan&, const Executor& executor, void* workspace) {
  UnfusedParams params = params_of(p, t);
  params.boxes.bias_sums = static_cast<float*>(workspace);
  params.boxes.bias_pieces = bias_pieces(p), params.boxes.bias_entries = int(bias_entries(p));
  params.staged = params.boxes.bias_entries <= kMostSharedTable;
  launch_sum_bias(params, executor.stream);
  launch_reduce_bias(p, params.boxes.bias_sums, params.boxes.bias_pieces * (kThreads / 32), t.bias, executor.stream);
}

}  // namespace

const UnfusedKernels kUnfused{list_plans, workspace_bytes, scores, weigh_keys, weigh_queries, sum_bias};

}  // namespace natten::cuda_portable
