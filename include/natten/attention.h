// SPDX-License-Identifier: MIT
// Running a problem. Checks stand in `validate`, the choice of kernel in `choose_plan`; what is here only computes.
#pragma once
#include <cstddef>
#include <functional>

#include "natten/plan.h"
#include "natten/problem.h"

namespace natten {

/// A tensor by address and strides, the latter in elements of [batch, z, y, x, head, channel]. The last one must be 1.
/// Any other stride is legal: 0 for an expanded axis, slices of a packed qkv, heads before the grid. A null `ptr` means
/// that an optional tensor is absent or that a gradient is not wanted.
struct TensorView {
  void* ptr = nullptr;
  int64_t strides[6] = {0, 0, 0, 0, 0, 1};
  explicit operator bool() const { return ptr != nullptr; }
};

/// Element type is Problem::dtype, but that of lse and dlse is accumulator_of(dtype).
struct ForwardArgs {
  TensorView q;                 ///< [batch, z, y, x, heads, head_dim]
  TensorView k;                 ///< [batch, z, y, x, heads_kv, head_dim]
  TensorView v;                 ///< [batch, z, y, x, heads_kv, head_dim_v]
  TensorView bias;              ///< [-, 2 * window - 1 (z, y, x), heads]: strides[4] is that of heads
  TensorView extra_k, extra_v;  ///< [batch, -, -, extra_keys, heads_kv, head_dim or head_dim_v]
  TensorView out;               ///< [batch, z, y, x, heads, head_dim_v]
  TensorView lse;               ///< [batch, z, y, x, heads]: natural log of the softmax's denominator
};

/// `out` and `lse` are those of the forward pass. Gradients are overwritten, not added to.
struct BackwardArgs : ForwardArgs {
  TensorView dout, dlse;                             ///< dlse is optional
  TensorView dq, dk, dv, dbias, dextra_k, dextra_v;  ///< shaped like their inputs; a null one is skipped
};

/// Threads, injected by the caller: torch's pool inside torch, anything else outside of it.
struct Executor {
  int num_threads = 1;
  /// Calls task(0) .. task(count - 1), in any order, at the same time or not; returns when all are done. Tasks never
  /// throw.
  std::function<void(int64_t count, const std::function<void(int64_t)>& task)> run;
  void* stream = nullptr;  ///< CUDA stream; CUDA engines only
};

/// Runs everything on the calling thread.
Executor serial_executor();
/// Starts `num_threads` threads for each call.
Executor thread_executor(int num_threads);

/// Memory that `forward` or `backward` needs beside its arguments, with 64-byte alignment. Its content does not matter.
size_t workspace_bytes(const Problem& problem, Pass pass, const Plan& plan, int num_threads);

/// Results are the same bits for every number of threads and in every repetition. A NaN or infinity in a key or value
/// reaches only the queries whose window holds it. Queries that see no key get out 0 and lse -infinity.
void forward(const Problem& problem, const ForwardArgs& args, const Plan& plan, const Executor& executor,
             void* workspace);
void backward(const Problem& problem, const BackwardArgs& args, const Plan& plan, const Executor& executor,
              void* workspace);

}  // namespace natten
