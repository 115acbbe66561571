// SPDX-License-Identifier: MIT
// Questions that Python asks the library through ctypes, with no tensor involved: what is built in, which plans a
// problem has, how many pairs it counts. Answers are JSON; a string lives until the same thread asks again.
#include <string>

#include "core/backend.h"
#include "cpu/isa.h"
#include "natten/error.h"
#include "natten/plan.h"

#define NATTEN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

const char* keep(std::string text) {
  static thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

void fill_axes(natten::Problem& p, int rank, const int64_t* extent, const int64_t* window, const int64_t* stride,
               const int64_t* dilation, const int32_t* causal) {
  for (int d = 0; d < rank; ++d)
    p.axes[3 - rank + d] = {int(extent[d]), int(window[d]), int(stride[d]), int(dilation[d]), causal[d] != 0};
}

natten::DType dtype_named(std::string_view name) {
  if (name == "float32") return natten::DType::f32;
  if (name == "float64") return natten::DType::f64;
  return name == "bfloat16" ? natten::DType::bf16 : natten::DType::f16;
}

// Why an engine cannot run a small problem here; empty if it can.
std::string reason_off(std::string_view engine) {
  natten::Problem probe;
  probe.dtype = natten::DType::bf16;
  probe.head_dim = probe.head_dim_v = 32;
  probe.axes[2] = {16, 3};
  for (const natten::Backend* backend : natten::kBackends) {
    if (backend->name != engine) continue;
    natten::PlanList list;
    backend->list_plans(probe, natten::Pass::forward, natten::Wanted::all, list);
    return list.plans.empty() ? list.rejections.front().reason : "";
  }
  if (engine == "sm90") return "this release does not have it";
  return "it is not in this build: build with NATTEN_CUDA=1 in the environment";
}

}  // namespace

NATTEN_EXPORT const char* natten_info() {
  std::string text =
      R"({"version": ")" NATTEN_VERSION R"(", "isa": )" + quoted(natten::cpu::name(natten::cpu::isas().front()));
  std::string separator = R"(, "backends": [)";
  for (const char* engine : {"sm90", "portable", "cuda-reference", "cpu", "reference"}) {
    const std::string reason = reason_off(engine);
    text += separator + R"({"name": )" + quoted(engine) + R"(, "available": )" + (reason.empty() ? "true" : "false") +
            R"(, "reason": )" + quoted(reason) + "}";
    separator = ", ";
  }
  return keep(text + "]}");
}

NATTEN_EXPORT int64_t natten_num_pairs(int rank, const int64_t* extent, const int64_t* window, const int64_t* stride,
                                       const int64_t* dilation, const int32_t* causal) {
  natten::Problem p;
  if (rank < 1 || rank > 3) return -1;
  fill_axes(p, rank, extent, window, stride, dilation, causal);
  return num_pairs(p);
}

// The keys of every token of a valid axis: rows of [first, count].
NATTEN_EXPORT void natten_key_spans(int64_t extent, int64_t window, int64_t stride, int64_t dilation, int causal,
                                    int64_t* rows) {
  const natten::Axis axis{int(extent), int(window), int(stride), int(dilation), causal != 0};
  for (int token = 0; token < axis.extent; ++token) {
    const natten::TokenKeys keys = natten::token_keys(axis, token);
    rows[2 * token] = keys.first, rows[2 * token + 1] = keys.count;
  }
}

NATTEN_EXPORT const char* natten_list_plans(int pass, int on_cuda, const char* dtype, int rank, const int64_t* extent,
                                            const int64_t* window, const int64_t* stride, const int64_t* dilation,
                                            const int32_t* causal, int heads, int heads_kv, int head_dim,
                                            int head_dim_v, int extra_keys, int has_bias) {
  natten::Problem p;
  if (rank < 1 || rank > 3) return keep(R"({"error": "the grid must have 1 to 3 axes"})");
  p.dtype = dtype_named(dtype);
  fill_axes(p, rank, extent, window, stride, dilation, causal);
  p.heads = heads, p.heads_kv = heads_kv, p.head_dim = head_dim, p.head_dim_v = head_dim_v;
  p.extra_keys = extra_keys, p.has_bias = has_bias != 0;
  try {
    validate(p);
  } catch (const natten::Error& e) {
    return keep(R"({"error": )" + quoted(e.what()) + "}");
  }
  const auto list = list_plans(p, pass == 0 ? natten::Pass::forward : natten::Pass::backward,
                               on_cuda != 0 ? natten::DeviceKind::cuda : natten::DeviceKind::cpu);
  std::string text = R"({"plans": [)", separator;
  for (const natten::Plan& plan : list.plans) text += separator + quoted(to_string(plan)), separator = ", ";
  text += R"(], "rejections": [)", separator = "";
  for (const natten::Rejection& rejection : list.rejections) {
    text += separator + R"({"name": )" + quoted(rejection.name) + R"(, "reason": )" + quoted(rejection.reason) + "}";
    separator = ", ";
  }
  return keep(text + "]}");
}
