// SPDX-License-Identifier: MIT
#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <ostream>
#include <utility>

namespace test {
namespace {

using natten::Axis;

// The same axis in two orders of arguments: most cases have no stride.
Axis axis(int extent, int window, int dilation = 1, bool causal = false, int stride = 1) {
  return {extent, window, stride, dilation, causal};
}
Axis strided(int extent, int window, int stride, int dilation = 1, bool causal = false) {
  return {extent, window, stride, dilation, causal};
}

constexpr bool kCausal = true;

void add_windows(std::vector<Case>& list) {
  // Even and odd windows in every rank (T-2), no two axes alike (T-7).
  list.push_back({.name = "1d_odd", .axes = {axis(37, 7)}, .batch = 2, .heads = 2, .dlse = true});
  list.push_back({.name = "1d_even", .axes = {axis(37, 6)}, .batch = 2, .heads = 2});
  list.push_back({.name = "2d_odd", .axes = {axis(9, 3), axis(21, 5)}, .batch = 2, .heads = 2, .dlse = true});
  list.push_back({.name = "2d_even", .axes = {axis(9, 4), axis(21, 2)}, .batch = 2, .heads = 2});
  list.push_back({.name = "2d_mixed_parity", .axes = {axis(11, 4), axis(19, 7)}, .heads = 2, .dlse = true});
  list.push_back({.name = "3d_odd", .axes = {axis(4, 3), axis(5, 3), axis(18, 5)}, .heads = 2, .dlse = true});
  list.push_back({.name = "3d_even", .axes = {axis(3, 2), axis(6, 4), axis(17, 6)}, .heads = 2});
  // Window 1, whole axes, axes of length 1, larger than the axis (T-9, T-12, T-24).
  list.push_back({.name = "1d_window_1", .axes = {axis(19, 1)}, .heads = 2, .dlse = true});
  list.push_back({.name = "2d_window_1_on_y", .axes = {axis(6, 1), axis(18, 3)}, .dlse = true});
  list.push_back({.name = "2d_window_1_on_x", .axes = {axis(18, 3), axis(6, 1)}});
  list.push_back({.name = "2d_whole_grid", .axes = {axis(6, 6), axis(17, 17)}, .heads = 2, .dlse = true});
  list.push_back({.name = "2d_one_less_than_the_grid", .axes = {axis(6, 5), axis(17, 16)}});
  list.push_back({.name = "1d_whole_causal", .axes = {axis(33, 33, 1, kCausal)}, .dlse = true});
  list.push_back({.name = "2d_whole_causal", .axes = {axis(5, 5, 1, kCausal), axis(18, 18, 1, kCausal)}});
  list.push_back({.name = "1d_oversize", .axes = {axis(9, 14)}, .bias = true, .dlse = true});
  list.push_back({.name = "2d_oversize_in_some_groups", .axes = {axis(10, 4, 3), axis(17, 6, 3)}, .bias = true});
  list.push_back({.name = "2d_oversize_causal_stride",
                  .axes = {strided(7, 9, 5, 2), strided(13, 6, 4, 3, kCausal)},
                  .bias = true,
                  .dlse = true});
  list.push_back({.name = "1d_one_token", .axes = {axis(1, 1)}, .dlse = true});
  list.push_back({.name = "3d_one_token_big_window", .axes = {axis(1, 3), axis(1, 4), axis(1, 7)}, .bias = true});
  list.push_back({.name = "2d_one_row", .axes = {axis(1, 3), axis(23, 5)}, .heads = 2, .dlse = true});
  list.push_back({.name = "2d_one_column", .axes = {axis(23, 5), axis(1, 3)}});
}

void add_axes(std::vector<Case>& list) {
  // Dilation that divides, that does not, that leaves groups of one token (T-3).
  list.push_back({.name = "1d_dilated", .axes = {axis(41, 5, 4)}, .heads = 2, .dlse = true});
  list.push_back({.name = "1d_dilation_as_long_as_the_axis", .axes = {axis(9, 3, 9)}});
  list.push_back({.name = "1d_dilation_longer_than_the_axis", .axes = {axis(9, 3, 30)}, .dlse = true});
  list.push_back({.name = "2d_dilated", .axes = {axis(13, 3, 4), axis(22, 4, 3)}, .heads = 2, .dlse = true});
  list.push_back({.name = "2d_dilated_on_y", .axes = {axis(14, 5, 2), axis(19, 3)}, .batch = 2});
  list.push_back({.name = "2d_dilated_on_x", .axes = {axis(7, 3), axis(35, 5, 2)}, .batch = 2});
  list.push_back({.name = "3d_dilated", .axes = {axis(5, 2, 2), axis(7, 3, 2), axis(20, 3, 3)}, .dlse = true});
  // Stride (T-4).
  list.push_back({.name = "1d_stride", .axes = {strided(29, 6, 4)}, .dlse = true});
  list.push_back({.name = "1d_blocked", .axes = {strided(24, 6, 6)}});
  list.push_back({.name = "2d_stride", .axes = {strided(11, 5, 2), strided(18, 4, 3)}, .heads = 2, .dlse = true});
  list.push_back({.name = "2d_stride_dilated_causal",
                  .axes = {strided(14, 3, 2, 3), strided(19, 5, 4, 2, kCausal)},
                  .bias = true,
                  .dlse = true});
  list.push_back({.name = "3d_stride", .axes = {strided(4, 2, 2), strided(6, 3, 2), strided(9, 5, 3, 1, kCausal)}});
  // Causal on every subset of the axes (T-5).
  for (int mask = 1; mask < 8; ++mask) {
    const bool z = mask & 4, y = mask & 2, x = mask & 1;
    list.push_back({.name = "3d_causal_" + std::to_string(mask),
                    .axes = {axis(4, 3, 1, z), axis(5, 2, 1, y), axis(18, 4, 1, x)},
                    .dlse = mask % 2 == 0});
    if (!z)
      list.push_back({.name = "2d_causal_" + std::to_string(mask),
                      .axes = {axis(10, 4, 1, y), axis(21, 5, 2, x)},
                      .bias = mask == 3,
                      .dlse = mask % 2 == 1});
  }
  list.push_back({.name = "1d_causal", .axes = {axis(40, 9, 1, kCausal)}, .batch = 2, .heads = 2, .dlse = true});
  list.push_back({.name = "1d_causal_dilated", .axes = {axis(40, 6, 3, kCausal)}, .bias = true});
}

void add_shapes(std::vector<Case>& list) {
  // Wider than one and two strips of 64 columns; tall; bands because there are fewer planes than threads.
  list.push_back({.name = "2d_wide_70", .axes = {axis(4, 3), axis(70, 7)}, .dlse = true});
  list.push_back({.name = "2d_wide_130", .axes = {axis(3, 2), axis(130, 5)}, .bias = true});
  list.push_back({.name = "2d_wide_200_window_31", .axes = {axis(3, 3), axis(200, 31)}, .head_dim = 4});
  list.push_back({.name = "2d_wide_causal", .axes = {axis(3, 2, 1, kCausal), axis(140, 6, 1, kCausal)}, .dlse = true});
  list.push_back({.name = "1d_long", .axes = {axis(300, 63)}, .dlse = true});
  list.push_back({.name = "1d_long_causal", .axes = {axis(290, 20, 1, kCausal)}, .heads = 2});
  list.push_back({.name = "2d_tall", .axes = {axis(150, 9), axis(4, 3)}, .dlse = true});
  list.push_back({.name = "2d_tall_dilated", .axes = {axis(90, 5, 4), axis(5, 3, 2)}, .bias = true});
  list.push_back({.name = "2d_one_plane", .axes = {axis(40, 7), axis(24, 7)}, .head_dim = 16, .dlse = true});
  list.push_back({.name = "2d_wide_window", .axes = {axis(30, 13), axis(31, 31)}, .head_dim = 4, .dlse = true});
  list.push_back({.name = "3d_volume", .axes = {axis(6, 3), axis(8, 5), axis(20, 7)}, .batch = 2, .dlse = true});
  list.push_back({.name = "3d_deep", .axes = {axis(20, 5), axis(4, 3), axis(6, 3)}, .bias = true});
  list.push_back({.name = "2d_batch_0", .axes = {axis(5, 3), axis(6, 3)}, .batch = 0, .extra = 2, .bias = true});
  list.push_back({.name = "2d_empty_axis", .axes = {axis(0, 3), axis(6, 3)}, .batch = 2, .extra = 2, .bias = true});
  list.push_back({.name = "2d_many_planes", .axes = {axis(3, 3), axis(5, 3)}, .batch = 9, .heads = 4, .head_dim = 4});
}

void add_heads(std::vector<Case>& list) {
  for (const int d : {1, 4, 12, 20, 32, 40, 64, 80, 128, 180})
    list.push_back({.name = "2d_head_dim_" + std::to_string(d),
                    .axes = {axis(7, 3), axis(18, 5)},
                    .heads = 2,
                    .head_dim = d,
                    .dlse = d % 8 == 0});
  list.push_back({.name = "1d_head_dim_33", .axes = {axis(50, 11)}, .head_dim = 33, .dlse = true});
  list.push_back({.name = "3d_head_dim_48", .axes = {axis(3, 3), axis(4, 3), axis(17, 3)}, .head_dim = 48});
  // Values longer and shorter than keys (T-44).
  for (const auto& [d, dv] : {std::pair{8, 24}, {24, 8}, {16, 1}, {3, 40}, {64, 32}})
    list.push_back({.name = "2d_head_dim_" + std::to_string(d) + "_values_" + std::to_string(dv),
                    .axes = {axis(6, 3), axis(19, 4)},
                    .heads = 2,
                    .head_dim = d,
                    .head_dim_v = dv,
                    .dlse = true});
  // Shared key heads (T-43).
  for (const int kv : {1, 2, 4})
    list.push_back({.name = "2d_heads_8_kv_" + std::to_string(kv),
                    .axes = {axis(5, 3), axis(18, 3)},
                    .batch = 2,
                    .heads = 8,
                    .heads_kv = kv,
                    .extra = kv,
                    .bias = kv == 2,
                    .dlse = true});
  list.push_back({.name = "1d_multi_query", .axes = {axis(35, 8)}, .heads = 6, .heads_kv = 1, .dlse = true});
}

void add_extras(std::vector<Case>& list) {
  // Relative position bias (T-42) and additional keys (T-41).
  list.push_back({.name = "1d_bias", .axes = {axis(35, 7)}, .batch = 2, .heads = 3, .bias = true, .dlse = true});
  list.push_back({.name = "2d_bias", .axes = {axis(9, 5), axis(19, 3)}, .batch = 2, .heads = 2, .bias = true});
  list.push_back({.name = "3d_bias", .axes = {axis(4, 3), axis(5, 3), axis(9, 4)}, .heads = 2, .bias = true});
  list.push_back({.name = "2d_bias_dilated", .axes = {axis(13, 3, 2), axis(20, 4, 3)}, .heads = 2, .bias = true});
  list.push_back({.name = "2d_extra", .axes = {axis(6, 3), axis(18, 5)}, .batch = 2, .heads = 2, .extra = 5});
  list.push_back({.name = "2d_extra_bias_dlse",
                  .axes = {axis(6, 3), axis(18, 5)},
                  .batch = 2,
                  .heads = 2,
                  .head_dim_v = 12,
                  .extra = 37,
                  .bias = true,
                  .dlse = true});
  list.push_back({.name = "1d_extra_causal", .axes = {axis(20, 4, 1, kCausal)}, .extra = 1, .dlse = true});
  list.push_back({.name = "2d_only_extra", .axes = {axis(5, 0), axis(18, 0)}, .batch = 2, .heads = 2, .extra = 7});
  list.push_back({.name = "1d_only_extra_gqa",
                  .axes = {axis(21, 0)},
                  .heads = 4,
                  .heads_kv = 2,
                  .head_dim_v = 5,
                  .extra = 130,
                  .dlse = true});
  // Numbers (T-51).
  list.push_back({.name = "2d_scale_0", .axes = {axis(6, 3), axis(17, 3)}, .dlse = true, .scale = 0.0});
  list.push_back({.name = "2d_scale_negative", .axes = {axis(6, 3), axis(17, 3)}, .bias = true, .scale = -0.7});
  list.push_back({.name = "2d_scale_1", .axes = {axis(6, 3), axis(17, 3)}, .head_dim = 32, .scale = 1.0});
  list.push_back(
      {.name = "2d_logits_1e4", .axes = {axis(6, 3), axis(17, 5)}, .extra = 2, .scale = 1.0, .amplitude = 60});
  list.push_back({.name = "2d_logits_tiny", .axes = {axis(6, 3), axis(17, 5)}, .dlse = true, .amplitude = 1e-3});
}

void add_layouts(std::vector<Case>& list) {
  for (const Layout layout :
       {Layout::packed, Layout::heads_first, Layout::expanded_heads, Layout::expanded_batch, Layout::misaligned}) {
    const std::string name = to_string(layout);
    list.push_back({.name = "2d_" + name,
                    .axes = {axis(7, 3), axis(19, 5)},
                    .batch = 2,
                    .heads = 2,
                    .head_dim = 20,
                    .dlse = true,
                    .layout = layout});
    list.push_back({.name = "1d_" + name,
                    .axes = {axis(45, 4, 2, kCausal)},
                    .batch = 2,
                    .heads = 2,
                    .extra = 3,
                    .bias = true,
                    .dlse = true,
                    .layout = layout});
    list.push_back({.name = "3d_strided_" + name,
                    .axes = {strided(3, 2, 2), strided(5, 3, 1), strided(8, 4, 3)},
                    .batch = 2,
                    .heads = 4,
                    .heads_kv = 2,
                    .head_dim_v = 6,
                    .layout = layout});
  }
}

/// Turns the extras on and off as the list goes, so that each of them meets every kind of tile edge.
Case swept(std::vector<Axis> axes, size_t index) {
  Case c{.name = "sweep_" + std::to_string(index), .axes = std::move(axes), .head_dim = 4};
  c.bias = index % 3 == 0;
  c.dlse = index % 2 == 0;
  c.extra = index % 5 == 0 ? 2 : 0;
  return c;
}

std::vector<Case> sweep_1d() {
  std::vector<Case> list;
  for (const int extent : {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 49})
    for (const int window : {2, 3, 5, 8, extent - 1, extent, extent + 3})
      for (const int dilation : {1, 2, 3})
        for (const int stride : {1, 2, window})
          for (const bool causal : {false, true})
            if (window > 0 && stride <= window)
              list.push_back(swept({strided(extent, window, stride, dilation, causal)}, list.size()));
  return list;
}

std::vector<Case> sweep_2d() {
  std::vector<Case> list;
  for (const auto& [ny, nx] : {std::pair{3, 15}, {5, 16}, {4, 17}, {2, 33}, {6, 7}})
    for (const auto& [ky, kx] : {std::pair{3, 5}, {2, 4}, {1, 6}, {4, 3}})
      for (const auto& [dy, dx] : {std::pair{1, 1}, {2, 1}, {1, 3}, {2, 2}})
        for (const auto& [sy, sx] : {std::pair{1, 1}, {2, 1}, {1, 2}})
          for (int causal = 0; causal < 4; ++causal)
            list.push_back(swept(
                {strided(ny, ky, std::min(sy, ky), dy, causal & 2), strided(nx, kx, std::min(sx, kx), dx, causal & 1)},
                list.size()));
  return list;
}

std::vector<Case> sweep_3d() {
  std::vector<Case> list;
  const int extents[][3] = {{3, 4, 9}, {2, 5, 17}}, windows[][3] = {{2, 3, 3}, {3, 2, 5}, {1, 3, 4}};
  for (const auto& n : extents)
    for (const auto& k : windows)
      for (const int dilation : {1, 2})
        for (const int stride : {1, 2})
          for (int causal = 0; causal < 8; ++causal)
            list.push_back(
                swept({strided(n[0], k[0], std::min(stride, k[0]), 1, causal & 4),
                       strided(n[1], k[1], 1, dilation, causal & 2), strided(n[2], k[2], stride, dilation, causal & 1)},
                      list.size()));
  return list;
}

struct SmallWindow {
  const char* name;
  std::vector<natten::Axis> axes;
};

std::vector<SmallWindow> small_windows() {
  return {
      {"plane", {axis(21, 7), axis(37, 7)}},
      {"tall", {axis(59, 7), axis(19, 7)}},
      {"one_group", {axis(14, 7), axis(14, 7)}},
      {"narrow_group", {axis(9, 7), axis(8, 7)}},
      {"dilated_groups", {axis(29, 5, 4), axis(30, 7, 5)}},
      {"dilated_plane", {axis(43, 7, 2), axis(41, 7, 2)}},
      {"even", {axis(17, 6), axis(19, 4)}},
      {"wide_window", {axis(20, 3), axis(23, 9)}},
      {"tall_window", {axis(40, 13), axis(18, 9)}},
      {"large_in_group", {axis(12, 9), axis(14, 13)}},
      {"stride", {strided(25, 7, 3), strided(33, 6, 2)}},
      {"causal", {axis(25, 7, 1, kCausal), axis(20, 7, 1, kCausal)}},
      {"causal_strided_dilated", {strided(20, 7, 2, 2, kCausal), strided(27, 6, 3, 1, kCausal)}},
      {"planes", {axis(3, 1), axis(10, 5), axis(21, 5)}},
      {"row", {axis(70, 9)}},
  };
}

// Windows that need square tiles: 8 neighbours see more than 16 columns.
std::vector<SmallWindow> wide_windows() {
  return {
      {"plane_13", {axis(18, 13), axis(33, 13)}},
      {"even_12_10", {axis(15, 12), axis(21, 10)}},
      {"long_group_11", {axis(31, 11, 2), axis(35, 11, 2)}},
      {"low_window_13", {axis(10, 3), axis(41, 13)}},
      {"row_13", {axis(43, 13)}},
      {"causal_13", {axis(17, 13, 1, kCausal), axis(22, 13, 1, kCausal)}},
      {"stride_11", {strided(21, 11, 3), strided(30, 11, 5)}},
      {"causal_strided_dilated_12", {strided(27, 11, 2, 2, kCausal), strided(37, 12, 3, 2, kCausal)}},
      {"narrow_stride_5", {axis(9, 5), strided(29, 7, 5)}},
  };
}

}  // namespace

natten::Problem Case::problem(natten::DType dtype) const {
  natten::Problem p;
  p.dtype = dtype;
  p.batch = batch;
  p.heads = heads;
  p.heads_kv = heads_kv ? heads_kv : heads;
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v ? head_dim_v : head_dim;
  const bool no_window = axes.back().window == 0;
  for (size_t i = 0; i < 3; ++i) {
    if (no_window) p.axes[i].window = 0;
    if (i + axes.size() >= 3) p.axes[i] = axes[i + axes.size() - 3];
  }
  p.extra_keys = extra;
  p.has_bias = bias;
  p.scale = scale.value_or(1.0 / std::sqrt(head_dim));
  return p;
}

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

const std::vector<Case>& small_window_cases() {
  static const std::vector<Case> cases = [] {
    std::vector<Case> list;
    for (const SmallWindow& w : small_windows())
      for (const int head_dim : {32, 64}) {
        const bool far = list.size() % 3 == 2;  // logits far from zero
        list.push_back({.name = std::string(w.name) + "_" + std::to_string(head_dim),
                        .axes = w.axes,
                        .batch = 2,
                        .heads = 2,
                        .heads_kv = list.size() % 5 == 4 ? 1 : 2,
                        .head_dim = head_dim,
                        .dlse = !far,
                        .amplitude = far ? 12.0 : 1.0,
                        .layout = list.size() % 7 == 6 ? Layout::packed : Layout::contiguous});
      }
    // With a bias (T-42) and shared key heads (T-43), each alone and together.
    for (const SmallWindow& w : small_windows())
      for (const int kv : {0, 1, 2}) {
        const int i = int(list.size());
        list.push_back({.name = std::string(w.name) + (kv ? "_heads_4_kv_" + std::to_string(kv) : "_bias"),
                        .axes = w.axes,
                        .batch = 2,
                        .heads = kv ? 4 : 2 + i % 2,
                        .heads_kv = kv,
                        .head_dim = i % 4 < 2 ? 32 : 64,
                        .bias = kv != 1,
                        .dlse = i % 3 == 0,
                        .amplitude = i % 5 == 4 ? 12.0 : 1.0});
      }
    // Blocks that sum the bias's gradient do several sets of units, the first of some of them in a group that is too
    // short to have any.
    list.push_back({.name = "empty_first_units_bias",
                    .axes = {{}, {33, 7, 1, 2}, {16, 7}},
                    .batch = 5,
                    .heads = 3,
                    .head_dim = 32,
                    .bias = true});
    // Wide windows, and channels that do not exist (T-7), of every multiple of 8.
    int head_dim = 0;
    for (const bool bias : {false, true})
      for (const SmallWindow& w : wide_windows()) {
        const int i = int(list.size());
        head_dim = head_dim % 64 + 8;
        list.push_back({.name = std::string(w.name) + "_dim_" + std::to_string(head_dim) + (bias ? "_bias" : ""),
                        .axes = w.axes,
                        .batch = 1 + i % 2,
                        .heads = 2,
                        .heads_kv = 1 + i / 2 % 2,
                        .head_dim = head_dim,
                        .bias = bias,
                        .dlse = i % 3 == 0,
                        .amplitude = i % 4 == 3 ? 12.0 : 1.0,
                        .layout = i % 5 == 4 ? Layout::packed : Layout::contiguous});
      }
    list.push_back({.name = "wide_window_of_large_stride",
                    .axes = {{}, axis(6, 1), axis(48, 13, 1, false, 8)},
                    .batch = 1,
                    .heads = 1,
                    .head_dim = 64});
    for (const int d : {8, 24, 40, 48, 56})
      for (const bool bias : {false, true})
        list.push_back({.name = "dim_" + std::to_string(d) + (bias ? "_bias" : ""),
                        .axes = {axis(d == 8 ? 7 : 18, 5), axis(d == 8 ? 8 : 19, 7)},
                        .batch = 2,
                        .heads = 2,
                        .head_dim = d,
                        .bias = bias,
                        .dlse = !bias});
    return list;
  }();
  return cases;
}

const std::vector<Case>& named_cases() {
  static const std::vector<Case> cases = [] {
    std::vector<Case> list;
    for (auto* add : {add_windows, add_axes, add_shapes, add_heads, add_extras, add_layouts}) add(list);
    return list;
  }();
  return cases;
}

std::vector<Case> sweep_cases(int rank) { return rank == 1 ? sweep_1d() : rank == 2 ? sweep_2d() : sweep_3d(); }

}  // namespace test
