// SPDX-License-Identifier: MIT
// The one list of attention problems. Each is run forward, backward and for determinism on every plan that can run it.
#pragma once
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

#include "natten/problem.h"
#include "tensors.h"

namespace test {

struct Case {
  std::string name;
  std::vector<natten::Axis> axes;  ///< slowest first, one to three
  int batch = 1;
  int heads = 1;
  int heads_kv = 0;  ///< 0: as many as `heads`
  int head_dim = 8;
  int head_dim_v = 0;  ///< 0: as `head_dim`
  int extra = 0;       ///< additional keys
  bool bias = false;
  bool dlse = false;
  std::optional<double> scale = std::nullopt;  ///< default: 1 / sqrt(head_dim)
  double amplitude = 1.0;                      ///< standard deviation of q and k
  Layout layout = Layout::contiguous;

  natten::Problem problem(natten::DType dtype) const;
};

std::ostream& operator<<(std::ostream& out, const Case& c);

/// Hand-picked problems, each of which stands for a class of bugs.
const std::vector<Case>& named_cases();
/// What the CUDA kernels for small windows run: rows and columns around the sizes of their tiles.
const std::vector<Case>& small_window_cases();
/// Every combination of small sizes around the tile edges (T-1), with small heads.
std::vector<Case> sweep_cases(int rank);

}  // namespace test
