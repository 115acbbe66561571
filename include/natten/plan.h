// SPDX-License-Identifier: MIT
// A plan says how a problem is run: which engine, which of its kernels, in which tiles. It prints as one string such as
// `cpu/sliding-avx512/q1x3x56`, which profiler, tests and logs show and by which a user can force it.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "natten/problem.h"

namespace natten {

enum class Pass { forward, backward };
enum class DeviceKind { cpu, cuda };

struct Plan {
  std::string_view backend;  ///< the folder under src/: "cpu", "reference", ...; always a string literal
  std::string_view variant;  ///< a kernel of that engine, such as "sliding-avx512"; may be empty
  Int3 q_tile;               ///< queries that are worked on together
};

/// Why an engine or one of its kernels cannot run a problem.
struct Rejection {
  std::string_view name;
  std::string reason;
};

struct PlanList {
  std::vector<Plan> plans;            ///< best first; never empty for a valid problem on the CPU
  std::vector<Rejection> rejections;  ///< each with the first requirement that failed
};

std::string to_string(const Plan& plan);

/// All plans for a valid problem on this machine.
PlanList list_plans(const Problem& problem, Pass pass, DeviceKind device);

/// The best plan or, if `wanted` is not empty, the best one whose string is `wanted` or continues it with a '/' or '-':
/// "cpu", "cpu/loops", "cpu/sliding-avx2" and the full string all work. Behind all that may stand "+tf32": then a plan
/// that multiplies floats in TF32 goes before the others, where there is one.
/// Throws Error with every engine's first unmet requirement if nothing fits: of kind invalid_argument if `wanted` was
/// given, unsupported otherwise.
Plan choose_plan(const Problem& problem, Pass pass, DeviceKind device, std::string_view wanted = {});

}  // namespace natten
