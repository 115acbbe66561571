// SPDX-License-Identifier: MIT
// What all ops of the binding share: tensors as views, allocation, threads, errors.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "natten/attention.h"
#include "natten/error.h"
#include "torch_stable.h"

#ifndef NATTEN_OP_NAMESPACE  // one macro names the op namespace, so that a hub build can rename it
#define NATTEN_OP_NAMESPACE natten
#endif
// NOTE: the headers of torch 2.10 stringise the namespace without expanding it; this level expands it first.
#define NATTEN_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define NATTEN_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

namespace natten::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

[[noreturn]] inline void fail(const std::string& sentence) { throw Error(ErrorKind::invalid_argument, sentence); }

inline natten::DType dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return natten::DType::f32;
    case ScalarType::Double:
      return natten::DType::f64;
    case ScalarType::BFloat16:
      return natten::DType::bf16;
    case ScalarType::Half:
      return natten::DType::f16;
    default:
      throw Error(ErrorKind::unsupported, "this dtype is not supported: use float32, float64, bfloat16 or float16");
  }
}

inline ScalarType lse_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline Tensor empty(const Tensor& like, const Ints& sizes, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

inline int narrow(int64_t value, const char* name) {
  if (value < -(1 << 30) || value > (1 << 30))
    fail(std::string(name) + " " + std::to_string(value) + " is out of range");
  return int(value);
}

// Everything that decides how a call is run, in the order of the schemas. An empty list stands for ones (causal:
// falses), because torch takes a quarter of a microsecond to hand over each entry.
struct Parameters {
  Ints window, stride, dilation;
  std::vector<bool> causal;
  double scale;
  bool oversize;
  std::string plan;
  Parameters(Ints w, Ints s, Ints d, std::vector<bool> c, double scale, bool oversize, std::string plan)
      : window(std::move(w)),
        stride(std::move(s)),
        dilation(std::move(d)),
        causal(std::move(c)),
        scale(scale),
        oversize(oversize),
        plan(std::move(plan)) {
    if (stride.empty()) stride.assign(window.size(), 1);
    if (dilation.empty()) dilation.assign(window.size(), 1);
    if (causal.empty()) causal.assign(window.size(), false);
  }
  int64_t rank() const { return int64_t(window.size()); }

  void check_ranks() const {
    if (rank() < 1 || rank() > 3) fail("the grid must have 1 to 3 axes, but kernel_size has " + std::to_string(rank()));
    for (size_t size : {stride.size(), dilation.size(), causal.size()})
      if (int64_t(size) != rank())
        fail("kernel_size, stride, dilation and is_causal must have one entry for each axis");
  }
  natten::Axis axis(int64_t d, int64_t extent) const {
    return {narrow(extent, "grid axis"), narrow(window[d], "kernel_size"), narrow(stride[d], "stride"),
            narrow(dilation[d], "dilation"), causal[d]};
  }
};

// NOTE: the dispatcher does not compare devices: one CUDA tensor among CPU tensors reaches the CUDA kernel.
inline void check_device(const char* name, const Tensor& t, const Tensor& q) {
  if (!(t.device() == q.device())) fail(std::string(name) + " is on another device than query: move it there");
}

inline void check_alike(const char* name, const Tensor& t, const Tensor& q) {
  check_device(name, t, q);
  if (t.scalar_type() != q.scalar_type()) fail(std::string(name) + " has another dtype than query: cast it");
}

inline void check_shape(const char* name, const Tensor& t, const Ints& expected) {
  bool same = t.dim() == int64_t(expected.size());
  for (size_t d = 0; same && d < expected.size(); ++d) same = t.size(d) == expected[d];
  if (same) return;
  std::string text = "[";
  for (size_t d = 0; d < expected.size(); ++d) text += (d ? ", " : "") + std::to_string(expected[d]);
  fail(std::string(name) + " has shape " + shape_of(t) + ", but must have " + text + "]");
}

inline void check_bias(const Tensor& bias, const Tensor& q, int64_t heads, const Ints& window) {
  check_alike("the relative position bias", bias, q);
  Ints sizes{heads};
  for (int64_t w : window) sizes.push_back(2 * w - 1);
  check_shape("the relative position bias", bias, sizes);
}

// What the backward pass takes beside the inputs: tensors of `sizes` [batch, grid..., heads, head_dim_v], or without
// the last one.
inline void check_results(const Tensor& q, const Tensor& out, const Tensor& dout, const Tensor& lse,
                          const OptionalTensor& dlse, Ints sizes) {
  for (auto [name, t] : {std::pair{"out", &out}, {"dout", &dout}}) {
    check_alike(name, *t, q);
    check_shape(name, *t, sizes);
  }
  sizes.pop_back();
  for (auto [name, t] : {std::pair{"lse", &lse}, {"dlse", dlse ? &*dlse : &lse}}) {
    check_device(name, *t, q);
    if (t->scalar_type() != lse_dtype(q)) fail(std::string(name) + " must be float32, or float64 for float64 inputs");
    check_shape(name, *t, sizes);
  }
}

// The gradient's tensor; of an absent input an empty one.
inline Tensor empty_like(const OptionalTensor& t, const Tensor& q) {
  Ints sizes{0};
  if (t) sizes.clear();
  for (int64_t d = 0; t && d < t->dim(); ++d) sizes.push_back(t->size(d));
  return empty(q, sizes);
}

constexpr int64_t kNone = -1;

// A tensor as the core sees it, by the places of its axes: the batch (or kNone), `rank` axes of the grid, which move to
// the end of z, y, x, and heads.
inline TensorView view_of(const Tensor& t, int64_t batch, int64_t grid, int64_t rank, int64_t heads) {
  const auto strides = t.strides();
  TensorView view{t.data_ptr(), {0, 0, 0, 0, strides[heads], 1}};
  if (batch != kNone) view.strides[0] = strides[batch];
  for (int64_t d = 0; d < rank; ++d) view.strides[4 - rank + d] = strides[grid + d];
  return view;
}
inline TensorView bias_view(const Tensor& t, int64_t rank) { return view_of(t, kNone, 1, rank, 0); }

// torch's own threads: torch.set_num_threads and OMP_NUM_THREADS hold, nothing is spawned here. Waking them takes
// longer than a problem of a few microseconds.
inline natten::Executor torch_executor(double work) {
  if (work < 1 << 19) return natten::serial_executor();
  uint32_t threads = 1;
  TORCH_SUBSET_CALL(torch_get_num_threads(&threads));
  return {int(threads), [](int64_t count, const std::function<void(int64_t)>& task) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) task(i);
            });
          }};
}

// Memory for one call. It stays with the calling thread, because fresh pages cost 5 % of a 56x56 forward.
class Workspace {
 public:
  Workspace(const DeviceScope& device, size_t bytes) {
    if (device.is_cuda()) {
      on_device_ = device.allocate(bytes);
    } else if (bytes > cache().bytes) {
      cache().memory.reset(std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
      cache().bytes = cache().memory ? bytes : 0;
      if (!cache().memory)
        throw Error(ErrorKind::unsupported,
                    "there is no memory for a workspace of " + std::to_string(bytes) + " bytes");
    }
  }
  ~Workspace() {
    if (cache().bytes > kKeep) cache() = {};
  }
  void* data() const { return on_device_ ? on_device_->data_ptr() : cache().memory.get(); }

 private:
  static constexpr size_t kAlignment = 4096, kKeep = size_t{64} << 20;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Cache {
    std::unique_ptr<void, Free> memory;
    size_t bytes = 0;
  };
  static Cache& cache() {
    static thread_local Cache cache;
    return cache;
  }
  OptionalTensor on_device_;
};

template <class F>
auto with_prefixed_errors(F&& f) {
  try {
    return f();
  } catch (const Error& e) {
    const char* kinds[] = {"invalid_argument", "unsupported", "cuda"};
    throw std::runtime_error(std::string("natten[") + kinds[int(e.kind())] + "] " + e.what());
  }
}

}  // namespace natten::binding
