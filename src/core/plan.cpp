// SPDX-License-Identifier: MIT
// Choosing a plan: every backend enumerates what it can run, best first, and says why it cannot run the rest.
#include "natten/plan.h"

#include "core/backend.h"
#include "natten/error.h"

namespace natten {
namespace {

constexpr std::string_view kPreferTf32 = "+tf32";

// `wanted` itself, or `wanted` followed by something that begins a new part of the name.
bool matches(std::string_view plan, std::string_view wanted) {
  if (!plan.starts_with(wanted)) return false;
  return plan.size() == wanted.size() || plan[wanted.size()] == '/' || plan[wanted.size()] == '-';
}

// Plans and rejections both name an engine, so a prefix of either is a name that the user may have meant.
bool is_known(std::string_view wanted, const PlanList& list) {
  const std::string_view engine = wanted.substr(0, wanted.find('/'));
  for (const Backend* backend : kBackends)
    if (engine == backend->name) {
      if (engine == wanted) return true;
      for (const Plan& plan : list.plans)
        if (matches(to_string(plan), wanted)) return true;
      for (const Rejection& rejection : list.rejections)
        if (matches(rejection.name, wanted) || matches(wanted, rejection.name)) return true;
    }
  return false;
}

bool serves(DeviceKind device) {
  for (const Backend* backend : kBackends)
    if (backend->device == device) return true;
  return false;
}

std::string known_names() {
  std::string names;
  for (const Backend* backend : kBackends) names += (names.empty() ? "" : ", ") + std::string(backend->name);
  return names;
}

const char* other_device(DeviceKind device) {
  return device == DeviceKind::cpu ? "it needs CUDA tensors" : "it needs CPU tensors";
}

Plan choose(const PlanList& list, std::string_view wanted) {
  const bool prefers_tf32 = wanted.ends_with(kPreferTf32);
  if (prefers_tf32) wanted.remove_suffix(kPreferTf32.size());
  const auto fits = [&](const Plan& plan) { return wanted.empty() || matches(to_string(plan), wanted); };
  for (const Plan& plan : list.plans)
    if (prefers_tf32 && plan.variant.ends_with("-tf32") && fits(plan)) return plan;
  for (const Plan& plan : list.plans)
    if (fits(plan)) return plan;
  if (!wanted.empty() && !is_known(wanted, list))
    throw Error(ErrorKind::invalid_argument,
                "there is no plan '" + std::string(wanted) + "' for this problem; engines: " + known_names());
  std::string message =
      wanted.empty() ? "no engine can run this problem" : "plan '" + std::string(wanted) + "' cannot run this problem";
  const char* separator = ": ";
  for (const Rejection& rejection : list.rejections) {
    message += separator + std::string(rejection.name) + ": " + rejection.reason;
    separator = "; ";
  }
  throw Error(wanted.empty() ? ErrorKind::unsupported : ErrorKind::invalid_argument, message);
}

}  // namespace

std::string to_string(const Plan& plan) {
  std::string text(plan.backend);
  if (!plan.variant.empty()) text += "/" + std::string(plan.variant);
  const Int3 q = plan.q_tile;
  if (q.volume() > 1) text += "/q" + std::to_string(q.z) + "x" + std::to_string(q.y) + "x" + std::to_string(q.x);
  return text;
}

PlanList list_plans(const Problem& problem, Pass pass, DeviceKind device) {
  PlanList list;
  for (const Backend* backend : kBackends) {
    if (backend->device == device)
      backend->list_plans(problem, pass, Wanted::all, list);
    else
      list.rejections.push_back({backend->name, other_device(device)});
  }
  if (!serves(device)) list.rejections.push_back({"cuda", "it is not in this build, see `python -m natten info`"});
  return list;
}

Plan choose_plan(const Problem& problem, Pass pass, DeviceKind device, std::string_view wanted) {
  if (wanted.empty())  // nearly always, and then what comes behind the best plan need not be looked at
    for (const Backend* backend : kBackends) {
      if (backend->device != device) continue;
      PlanList list;
      backend->list_plans(problem, pass, Wanted::best, list);
      if (!list.plans.empty()) return list.plans.front();
    }
  return choose(list_plans(problem, pass, device), wanted);
}

PlanList list_unfused_plans(const Problem& problem, DeviceKind device) {
  PlanList list;
  for (const Backend* backend : kBackends) {
    if (backend->device != device)
      list.rejections.push_back({backend->name, other_device(device)});
    else if (backend->unfused)
      backend->unfused->list_plans(problem, list);
    else
      list.rejections.push_back({backend->name, "it has no unfused operators"});
  }
  return list;
}

Plan choose_unfused_plan(const Problem& problem, DeviceKind device, std::string_view wanted) {
  return choose(list_unfused_plans(problem, device), wanted);
}

}  // namespace natten
