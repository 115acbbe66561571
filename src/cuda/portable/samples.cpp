// SPDX-License-Identifier: MIT
// Packed calls. Samples that lie in the same tensors and differ in nothing but their place and size share the launches
// of the "boxes" kernels, kMostSamples at a time: the kernels' parameters carry their places, so nothing is uploaded
// and a graph captures it. A sample whose plan is another kernel and which keeps the GPU busy alone, or that wants a
// gradient of the bias, has launches of its own.
#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "cuda/device.h"
#include "cuda/portable/kernels.h"

namespace natten::cuda_portable {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 24;  // of samples that share a launch: items are counted in 32 bits

std::array<TensorView*, 3> of_queries(ForwardArgs& a) { return {&a.q, &a.out, &a.lse}; }
std::array<TensorView*, 6> of_queries(BackwardArgs& a) { return {&a.q, &a.out, &a.lse, &a.dout, &a.dlse, &a.dq}; }
constexpr unsigned kFloats = 1 << 2 | 1 << 4;  // lse and dlse
std::array<TensorView*, 4> of_keys(ForwardArgs& a) { return {&a.k, &a.v, &a.extra_k, &a.extra_v}; }
std::array<TensorView*, 8> of_keys(BackwardArgs& a) {
  return {&a.k, &a.v, &a.extra_k, &a.extra_v, &a.dk, &a.dv, &a.dextra_k, &a.dextra_v};
}

// How many tokens behind the group's view the sample's begins, if it is the same tensor with its grid row-major.
std::optional<int64_t> place(const TensorView& g, const TensorView& s, int element_bytes, Int3 grid) {
  for (int d : {0, 3, 4})
    if (g.strides[d] != s.strides[d]) return std::nullopt;
  const bool row_major = (grid.y == 1 || s.strides[2] == s.strides[3] * grid.x) &&
                         (grid.z == 1 || s.strides[1] == s.strides[3] * grid.x * grid.y);
  const int64_t bytes = s.strides[3] * element_bytes;
  const int64_t apart = static_cast<char*>(s.ptr) - static_cast<char*>(g.ptr);
  if (!row_major || bytes == 0 || apart % bytes != 0) return std::nullopt;
  return apart / bytes;
}

/// Samples that share their launches, and what they have in common.
template <class Sample>
struct Group {
  const Sample* first;
  Problem problem;              // the largest one, with the most keys
  decltype(Sample::args) args;  // of the first sample
  bool tf32;                    // of the plans
  bool whole[3];                // axes on which every window is all of its axis
  bool first_is_row_major;
  int64_t tokens;  // of all samples
  std::vector<BoxesSample> samples;

  explicit Group(const Sample& sample);
  bool join(Sample sample);

 private:
  bool agrees(const Problem& p) const;
  void widen(const Problem& p);
};

template <class Sample>
bool is_tf32(const Sample& s) {
  return s.plan.variant == kBoxesTf32;
}

bool is_whole(const Problem& p, int axis) {
  const Axis& a = p.axes[axis];
  return !p.has_bias && a.window >= detail::ceil_div(a.extent, a.dilation);
}

template <class Sample>
Group<Sample>::Group(const Sample& sample)
    : first(&sample), problem(sample.problem), args(sample.args), tf32(is_tf32(sample)) {
  for (int a = 0; a < 3; ++a) whole[a] = is_whole(problem, a);
  samples.push_back(only_sample(problem));
  tokens = problem.tokens();
  const Int3 grid = problem.grid();
  const auto row_major = [&](const auto& views) {
    return std::all_of(views.begin(), views.end(), [&](const TensorView* v) { return !*v || place(*v, *v, 1, grid); });
  };
  first_is_row_major = row_major(of_queries(args)) && row_major(of_keys(args));
}

// Whether the problems differ in sizes alone.
template <class Sample>
bool Group<Sample>::agrees(const Problem& p) const {
  const Problem& g = problem;
  bool same = p.dtype == g.dtype && p.batch == g.batch && p.heads == g.heads && p.heads_kv == g.heads_kv &&
              p.head_dim == g.head_dim && p.head_dim_v == g.head_dim_v && p.scale == g.scale &&
              p.has_bias == g.has_bias && p.has_window() == g.has_window();
  for (int a = 0; a < 3; ++a) {
    const Axis &x = p.axes[a], &y = g.axes[a];
    same = same && x.stride == y.stride && x.dilation == y.dilation && x.causal == y.causal;
    same = same && (x.window == y.window || (whole[a] && is_whole(p, a)));
  }
  return same;
}

template <class Sample>
void Group<Sample>::widen(const Problem& p) {
  int windows[3];
  for (int a = 0; a < 3; ++a) {
    windows[a] = std::max(problem.axes[a].window, p.axes[a].window);
    whole[a] = whole[a] && is_whole(p, a);
  }
  const int extra = std::max(problem.extra_keys, p.extra_keys);
  if (approximate_work(p) > approximate_work(problem)) problem = p;
  for (int a = 0; a < 3; ++a) problem.axes[a].window = windows[a];
  problem.extra_keys = extra;
}

template <class Sample>
bool Group<Sample>::join(Sample sample) {
  if (int(samples.size()) == kMostSamples || !agrees(sample.problem) || tf32 != is_tf32(sample)) return false;
  if (args.bias.ptr != sample.args.bias.ptr || tokens + sample.problem.tokens() > kMostTokens) return false;
  BoxesSample added = only_sample(sample.problem);
  const Int3 grid = added.extent;
  // Bit i of `floats`: view i has floats whatever the problem's type.
  const auto places = [&](const auto& ours, const auto& theirs, unsigned floats) -> std::optional<int64_t> {
    std::optional<int64_t> all;
    for (size_t i = 0; i < ours.size(); ++i) {
      if (bool(*ours[i]) != bool(*theirs[i])) return std::nullopt;
      if (!*ours[i]) continue;
      const auto at = place(*ours[i], *theirs[i], floats >> i & 1 ? 4 : size_of(problem.dtype), grid);
      if (!at || (all && *all != *at)) return std::nullopt;
      all = at;
    }
    return all ? all : 0;
  };
  const auto query = places(of_queries(args), of_queries(sample.args), kFloats);
  const auto key = places(of_keys(args), of_keys(sample.args), 0);
  if (!query || !key || *query < 0 || *query > kMostTokens || !first_is_row_major) return false;
  added.first_query = *query, added.first_key = *key;
  widen(sample.problem);
  tokens += sample.problem.tokens();
  samples.push_back(added);
  return true;
}

bool is_shared(const Problem& p, const Plan& plan) {
  if (plan.variant != kWindow) return true;
  const int64_t tiles = p.batch * p.heads * p.tokens() / kBlockM;
  return tiles < 2 * int64_t{cuda::current_device()->num_sms};  // too few for a GPU, whatever the kernel
}

bool is_shared(const ForwardSample& s) { return is_shared(s.problem, s.plan); }
bool is_shared(const BackwardSample& s) { return !s.args.dbias && is_shared(s.problem, s.plan); }

template <class Sample>
struct Cut {
  std::vector<Group<Sample>> groups;
  std::vector<const Sample*> alone;

  explicit Cut(std::span<const Sample> samples) {
    for (const Sample& s : samples) {
      if (!is_shared(s)) {
        alone.push_back(&s);
        continue;
      }
      const bool joined = std::any_of(groups.rbegin(), groups.rend(), [&](Group<Sample>& g) { return g.join(s); });
      if (!joined) groups.emplace_back(s);
    }
    std::erase_if(groups, [&](const Group<Sample>& g) {
      if (g.samples.size() == 1) alone.push_back(g.first);
      return g.samples.size() == 1;
    });
    for (Group<Sample>& g : groups) {
      const auto flatten = [](const auto& views) {
        for (TensorView* view : views) view->strides[1] = view->strides[2] = 0;
      };
      flatten(of_queries(g.args)), flatten(of_keys(g.args));
      for (BoxesSample& s : g.samples) s.pitch_y = s.extent.x, s.pitch_z = s.extent.x * s.extent.y;
    }
  }
};

}  // namespace

size_t samples_workspace(std::span<const BackwardSample> samples) {
  const Cut<BackwardSample> cut(samples);
  size_t bytes = 0;
  for (const auto& g : cut.groups) bytes = std::max(bytes, boxes_workspace(g.problem, Pass::backward, g.samples));
  for (const BackwardSample* s : cut.alone)
    bytes = std::max(bytes, workspace_bytes(s->problem, Pass::backward, s->plan, 1));
  return bytes;
}

void run_samples(std::span<const ForwardSample> samples, const Executor& executor, void* workspace) {
  const Cut<ForwardSample> cut(samples);
  for (const auto& g : cut.groups) boxes_forward(g.problem, g.args, g.samples, g.tf32, executor.stream);
  for (const ForwardSample* s : cut.alone) forward(s->problem, s->args, s->plan, executor, workspace);
}

void run_samples(std::span<const BackwardSample> samples, const Executor& executor, void* workspace) {
  const Cut<BackwardSample> cut(samples);
  for (const auto& g : cut.groups) boxes_backward(g.problem, g.args, g.samples, g.tf32, executor.stream, workspace);
  for (const BackwardSample* s : cut.alone) backward(s->problem, s->args, s->plan, executor, workspace);
}

}  // namespace natten::cuda_portable
