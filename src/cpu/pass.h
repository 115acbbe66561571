// SPDX-License-Identifier: MIT
// What every CPU kernel shares: the memory of a call, elements as Real, the bias of a head, threads.
#pragma once
#include <cmath>

#include "cpu/vec.h"
#include "natten/attention.h"

namespace natten::cpu::NATTEN_ISA {

/// What an element type computes in.
template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Entries of one head's bias; 0 without bias.
NATTEN_INLINE int64_t bias_entries(const Problem& p) {
  int64_t entries = p.has_bias ? 1 : 0;
  for (const Axis& a : p.axes) entries *= 2 * int64_t{a.window} - 1;
  return entries;
}

/// Elements of a row of `channels`, rounded up to whole vectors.
template <class Real>
NATTEN_INLINE int whole_vectors(int channels) {
  return (channels + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

/// lse in base 2, such that a query without keys gets weights 0.
template <class Real>
NATTEN_INLINE Real base2(Real lse) {
  return lse == Real(-INFINITY) ? Real(INFINITY) : lse * Real(kLog2E);
}

/// Hands out aligned pieces of a workspace; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

/// bytes * threads, or more than any machine has if that overflows: the allocation then fails, with an error.
NATTEN_INLINE int64_t times(int64_t bytes, int threads) {
  int64_t product;
  return __builtin_mul_overflow(bytes, threads, &product) || product > INT64_MAX / 4 ? INT64_MAX / 4 : product;
}

/// The elements of one token as Real, padded with zeros to whole vectors.
template <class Real, class T>
NATTEN_INLINE void pack_token(const T* from, int channels, Real* to) {
  for_each_vector<Real>(channels, [&](int d, int lanes) { store(to + d, load_up_to<Real>(from + d, lanes)); });
}

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
