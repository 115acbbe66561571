// SPDX-License-Identifier: MIT
// The tensors of a problem, how a plan runs on them, and how results are compared with the dense attention.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"
#include "dense.h"
#include "natten/attention.h"
#include "tensors.h"

namespace test {

/// Whose plans the tests run: the CPU's or, on the emulated GPU (cuda/emulation), those of the CUDA engines.
#ifdef NATTEN_CUDA_EMULATION
inline constexpr natten::DeviceKind kDevice = natten::DeviceKind::cuda;
#else
inline constexpr natten::DeviceKind kDevice = natten::DeviceKind::cpu;
#endif

struct Operands {
  /// Random inputs of unit variance, q and k of the case's amplitude.
  Operands(const Case& c, natten::DType dtype, uint32_t seed, int64_t guard = Tensor::kGuard);

  natten::Problem problem;
  Tensor q, k, v, bias, extra_k, extra_v, dout, dlse;  // inputs
  Tensor out, lse;                                     // outputs of the forward pass
  Tensor dq, dk, dv, dbias, dextra_k, dextra_v;        // outputs of the backward pass

  natten::BackwardArgs args() const;
  dense::Inputs dense_inputs() const;

  using Named = std::vector<std::pair<std::string, Tensor*>>;
  Named inputs(natten::Pass pass);  ///< those that are present; for the backward pass also out and lse
  Named outputs(natten::Pass pass);
};

dense::Problem to_dense(const natten::Problem& problem);

/// Whether a plan multiplies floats in TF32.
bool in_tf32(const natten::Plan& plan);

/// Poisons the outputs, runs the plan in a workspace with guard bands and reports (EXPECT) every byte that changed
/// outside of the outputs.
void run(Operands& operands, natten::Pass pass, const natten::Plan& plan,
         const natten::Executor& executor = natten::serial_executor());

/// The out and lse that `backward` gets: those of the best forward plan, which is what a user gets, in TF32 for TF32.
void run_forward_for(Operands& operands, const natten::Plan& backward);

/// Runs the tasks on the calling thread, last one first, and says that there are `num_threads`.
natten::Executor reverse_executor(int num_threads);

/// All bytes of the outputs of a pass.
std::vector<std::vector<std::byte>> snapshot(Operands& operands, natten::Pass pass);

/// What the dense attention gives for these operands, and the error that each result may have.
class Reference {
 public:
  explicit Reference(const Operands& operands);
  /// EXPECTs every output of the pass to be as near to the dense attention as its type and the plan allow.
  void check(Operands& operands, natten::Pass pass, const natten::Plan& plan) const;

 private:
  double tolerance(const std::string& name, bool tf32) const;
  double term(const std::string& name) const;

  natten::DType dtype_;
  double scale_;
  dense::Inputs inputs_;
  dense::Results exact_;
  std::vector<dense::Results> rounded_;  // for half types: what they do to a dense computation
};

}  // namespace test
