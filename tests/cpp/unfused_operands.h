// SPDX-License-Identifier: MIT
// The tensors of a problem of unfused attention, sums over all pairs that the dense attention's `sees` allows, and the
// passes of a plan compared with them.
#pragma once
#include <cmath>
#include <map>
#include <vector>

#include "natten/unfused.h"
#include "operands.h"

namespace test {

/// A sum and what it is measured against: the sum of the magnitudes of its terms, and how many there are.
struct Sum {
  double value = 0, magnitude = 0;
  int terms = 0;
  void add(double term) { value += term, magnitude += std::abs(term), ++terms; }
};

class UnfusedOperands {
 public:
  UnfusedOperands(const Case& c, natten::DType dtype, uint32_t seed, int64_t guard = Tensor::kGuard);

  /// Elements of an attention tensor, times channels.
  static double work(const natten::Problem& problem);
  /// Sums what every pass should give; without it passes only run.
  void expect();
  /// All four passes by a plan: guard bands, poisoned outputs and workspaces, the same bits in two orders of threads,
  /// and, after `expect`, every element.
  void check(const natten::Plan& plan);

  Operands operands;
  Tensor attn, weights;

 private:
  using Sums = std::map<Shape, Sum>;
  struct Slot;

  template <class Visit>
  void for_each_slot(Visit visit);
  Sums scores(const Tensor& query, const Tensor& key, const Tensor& extra, const Tensor& bias, int dim, double scale);
  template <class Add>
  void for_each_weight(Add add);
  Shape with_head(Shape key, int64_t head) const;
  void compare(const char* name, const Tensor& tensor, const Sums& sums, double unused = 0);
  template <class Args>
  void run(void (*pass)(const natten::Problem&, const Args&, const natten::Plan&, const natten::Executor&, void*),
           const Args& args, const natten::Plan& plan, const std::vector<Tensor*>& outputs);
  void check_scores(const natten::Plan& plan);
  void check_weighing(const natten::Plan& plan);
  static std::vector<Slot> slots_of(const natten::Problem& p, const dense::Problem& d, const Shape& query);

  int64_t guard_;
  bool expected_ = false;
  Sums attn_sums_, dattn_, out_, dq_, dk_, dv_, dextra_k_, dextra_v_, dbias_;
};

}  // namespace test
