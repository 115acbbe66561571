// SPDX-License-Identifier: MIT
// On the CPU a packed call is cut into units, one key head of one sample each, in which nothing is shared with another
// unit. Every engine runs a unit as it would run any problem, on one thread; threads take the next unit when they are
// done, the largest first. On the GPU a backend may run its samples together; else they follow one another.
#include "natten/packed.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/backend.h"

namespace natten {
namespace {

void skip_heads(TensorView& t, int heads, DType dtype) {
  if (t) t.ptr = static_cast<char*>(t.ptr) + heads * t.strides[4] * size_of(dtype);
}

void skip_heads(const Problem& p, int head_kv, ForwardArgs& args) {
  const int head = head_kv * p.heads_per_kv();
  for (TensorView* t : {&args.q, &args.bias, &args.out}) skip_heads(*t, head, p.dtype);
  for (TensorView* t : {&args.k, &args.v, &args.extra_k, &args.extra_v}) skip_heads(*t, head_kv, p.dtype);
  skip_heads(args.lse, head, accumulator_of(p.dtype));
}

void skip_heads(const Problem& p, int head_kv, BackwardArgs& args) {
  skip_heads(p, head_kv, static_cast<ForwardArgs&>(args));
  const int head = head_kv * p.heads_per_kv();
  for (TensorView* t : {&args.dout, &args.dq, &args.dbias}) skip_heads(*t, head, p.dtype);
  for (TensorView* t : {&args.dk, &args.dv, &args.dextra_k, &args.dextra_v}) skip_heads(*t, head_kv, p.dtype);
  skip_heads(args.dlse, head, accumulator_of(p.dtype));
}

void run(const ForwardSample& s, const Executor& executor, void* workspace) {
  forward(s.problem, s.args, s.plan, executor, workspace);
}
void run(const BackwardSample& s, const Executor& executor, void* workspace) {
  backward(s.problem, s.args, s.plan, executor, workspace);
}

constexpr Pass pass_of(const ForwardSample&) { return Pass::forward; }
constexpr Pass pass_of(const BackwardSample&) { return Pass::backward; }

template <class Sample>
size_t bytes_of(const Sample& s, int num_threads) {
  constexpr size_t kAlignment = 64;
  return (workspace_bytes(s.problem, pass_of(s), s.plan, num_threads) + kAlignment - 1) / kAlignment * kAlignment;
}

bool is_on_gpu(const Plan& plan) { return backend_of(plan).device == DeviceKind::cuda; }

/// Calls visit(backend, its samples) for every backend that a plan names.
template <class Sample, class Visit>
void for_each_backend(std::span<const Sample> samples, Visit&& visit) {
  for (const Backend* backend : kBackends) {
    std::vector<Sample> own;
    for (const Sample& s : samples)
      if (s.plan.backend == backend->name) own.push_back(s);
    if (!own.empty()) visit(*backend, std::span<const Sample>(own));
  }
}

void run_packed(const PackedKernels& kernels, std::span<const ForwardSample> own, const Executor& executor,
                void* workspace) {
  kernels.forward(own, executor, workspace);
}
void run_packed(const PackedKernels& kernels, std::span<const BackwardSample> own, const Executor& executor,
                void* workspace) {
  kernels.backward(own, executor, workspace);
}
size_t packed_workspace(const PackedKernels&, std::span<const ForwardSample>) { return 0; }
size_t packed_workspace(const PackedKernels& kernels, std::span<const BackwardSample> own) {
  return kernels.workspace_bytes(own);
}

/// One key head of a sample, as a sample of its own.
template <class Sample>
struct Unit {
  const Sample* of;
  int head_kv;
  double work;

  Sample sample() const {
    Sample unit = *of;
    unit.problem.heads = of->problem.heads_per_kv(), unit.problem.heads_kv = 1;
    skip_heads(of->problem, head_kv, unit.args);
    return unit;
  }
};

/// What threads take: units, the largest first. The first `num_shared` are run by all threads together.
template <class Sample>
struct Units {
  std::vector<Unit<Sample>> list;
  size_t num_shared = 0;
  size_t bytes_per_thread = 0, bytes = 0;

  Units(std::span<const Sample> samples, int num_threads) {
    double all = 0;
    for (const Sample& s : samples) {
      const double work = approximate_work(s.problem);
      for (int h = 0; h < s.problem.heads_kv; ++h) list.push_back({&s, h, work / s.problem.heads_kv});
      all += work;
    }
    std::stable_sort(list.begin(), list.end(), [](const auto& a, const auto& b) { return a.work > b.work; });
    // NOTE: gradients are sums, and the cut of a problem says in which order they are taken. The cut must not depend on
    // threads, so a unit of the backward pass is one thread's whatever its size.
    if (num_threads > 1 && std::is_same_v<Sample, ForwardSample>)
      while (num_shared < list.size() && list[num_shared].work * 2 * num_threads > all)
        bytes = std::max(bytes, bytes_of(list[num_shared++].sample(), num_threads));
    for (size_t i = num_shared; i < list.size(); ++i)
      if (i == num_shared || list[i].of != list[i - 1].of)
        bytes_per_thread = std::max(bytes_per_thread, bytes_of(list[i].sample(), 1));
    bytes = std::max(bytes, bytes_per_thread * num_threads);
  }
};

template <class Sample>
size_t packed_bytes(std::span<const Sample> samples, int num_threads) {
  if (samples.empty()) return 0;
  if (!is_on_gpu(samples[0].plan)) return Units<Sample>(samples, num_threads).bytes;
  size_t bytes = 0;
  for (const Sample& s : samples) bytes = std::max(bytes, bytes_of(s, 1));
  for_each_backend(samples, [&](const Backend& backend, std::span<const Sample> own) {
    if (backend.packed) bytes = std::max(bytes, packed_workspace(*backend.packed, own));
  });
  return bytes;
}

template <class Sample>
void run_all(std::span<const Sample> samples, const Executor& executor, void* workspace) {
  if (samples.empty()) return;
  if (is_on_gpu(samples[0].plan)) {
    return for_each_backend(samples, [&](const Backend& backend, std::span<const Sample> own) {
      if (backend.packed) return run_packed(*backend.packed, own, executor, workspace);
      for (const Sample& s : own) run(s, executor, workspace);
    });
  }
  const Units<Sample> units(samples, executor.num_threads);
  for (size_t i = 0; i < units.num_shared; ++i) run(units.list[i].sample(), executor, workspace);
  const Executor serial = serial_executor();
  std::atomic<size_t> next = units.num_shared;
  executor.run(executor.num_threads, [&](int64_t thread) {
    char* memory = static_cast<char*>(workspace) + thread * units.bytes_per_thread;
    for (size_t i = next++; i < units.list.size(); i = next++) run(units.list[i].sample(), serial, memory);
  });
}

}  // namespace

size_t workspace_bytes(std::span<const ForwardSample> samples, int num_threads) {
  return packed_bytes(samples, num_threads);
}
size_t workspace_bytes(std::span<const BackwardSample> samples, int num_threads) {
  return packed_bytes(samples, num_threads);
}

void forward(std::span<const ForwardSample> samples, const Executor& executor, void* workspace) {
  run_all(samples, executor, workspace);
}
void backward(std::span<const BackwardSample> samples, const Executor& executor, void* workspace) {
  run_all(samples, executor, workspace);
}

}  // namespace natten
