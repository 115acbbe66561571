// SPDX-License-Identifier: MIT
// The frame of both sliding passes: sizes of the packed pieces, the bias of a head, threads.
#pragma once
#include "cpu/sliding.h"

namespace natten::cpu::NATTEN_ISA {

size_t sliding_forward_workspace(const Problem& p, int num_threads);
size_t sliding_backward_workspace(const Problem& p, int num_threads);
void sliding_forward(const Problem& p, const ForwardArgs& args, const Executor& executor, void* workspace);
void sliding_backward(const Problem& p, const BackwardArgs& args, const Executor& executor, void* workspace);

/// What an element type computes in.
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Entries of one head's bias; 0 without bias.
NATTEN_INLINE int64_t bias_entries(const Problem& p) {
  int64_t entries = p.has_bias ? 1 : 0;
  for (const Axis& a : p.axes) entries *= 2 * int64_t{a.window} - 1;
  return entries;
}

/// Sizes of packed pieces, in elements of Real.
template <class Real>
struct Layout {
  Schedule schedule;
  int dim, dim_v;  ///< head dims, rounded up to whole vectors
  int64_t pitch;   ///< of a transposed key row
  int64_t score_stride;
  int64_t bias_size;  ///< entries of one head's bias

  Layout(const Problem& p, Pass pass, int num_threads) {
    dim = round_up(p.head_dim);
    dim_v = round_up(p.head_dim_v);
    schedule = make_schedule(p, pass, kRows, int64_t{dim + dim_v} * int(sizeof(Real)), num_threads);
    pitch = schedule.pitch(kLanes<Real>);
    // NOTE: the few vectors more keep the rows of a group, and scores and keys, from sharing the low 12 bits of their
    // addresses: loads would wait for unrelated stores, which costs up to 20 %.
    score_stride = (schedule.window.volume() + 5) * kLanes<Real>;
    bias_size = bias_entries(p);
  }
  /// Each key belongs to one item of the backward pass.
  bool owns_keys() const { return schedule.num_bands == 1 && schedule.num_strips == 1; }
  static int round_up(int n) { return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>; }
  int64_t transposed_size(int channels) const { return channels * pitch; }
  int64_t natural_size(int channels) const { return (schedule.columns() + 1) * int64_t{channels} + kLanes<Real>; }
};

template <class T>
NATTEN_INLINE void clear(T* p, int64_t count) {
  std::memset(static_cast<void*>(p), 0, count * sizeof(T));
}

/// The bias of one head, packed and times `factor`.
template <class T, class Real>
void pack_bias(const Problem& p, const TensorView& bias, int head, Real factor, Real* to) {
  for (int z = 0; z < 2 * p.axes[0].window - 1; ++z)
    for (int y = 0; y < 2 * p.axes[1].window - 1; ++y)
      for (int x = 0; x < 2 * p.axes[2].window - 1; ++x)
        *to++ = Real(to_real(pointer<T>(bias)[offset(bias, 0, z, y, x, head)])) * factor;
}

/// dbias = the sum, in order, of `parts` partial tables of each head: [head][part][entry].
template <class T, class Real>
void reduce_bias(const Problem& p, const Real* partial, int64_t parts, const Executor& executor,
                 const TensorView& dbias) {
  const int64_t entries = bias_entries(p);
  const int height = 2 * p.axes[1].window - 1, width = 2 * p.axes[2].window - 1;
  executor.run(p.heads, [&](int64_t head) {
    for (int64_t entry = 0; entry < entries; ++entry) {
      Real sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += partial[(head * parts + part) * entries + entry];
      const int64_t to = offset(dbias, 0, entry / width / height, entry / width % height, entry % width, head);
      from_real(sum, pointer<T>(dbias)[to]);
    }
  });
}

/// Calls work(task, memory) for tasks 0 .. count - 1, a fixed share on each thread, which has memory of its own.
template <class Work>
void run_on_threads(const Executor& executor, int64_t count, char* workspace, int64_t bytes_per_thread, Work&& work) {
  const int64_t threads = count < executor.num_threads ? count : executor.num_threads;
  executor.run(threads, [&](int64_t thread) {
    for (int64_t task = thread; task < count; task += threads) work(task, workspace + thread * bytes_per_thread);
  });
}

}  // namespace natten::cpu::NATTEN_ISA
