// SPDX-License-Identifier: MIT
// Choosing plans: something runs every valid problem, names are stable and can be forced, and a refusal says why.
// Covers T-65 (backend fall-through) on the CPU.
#include "natten/plan.h"
#include "natten/unfused.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "cases.h"
#include "natten/attention.h"
#include "natten/error.h"

namespace {

using natten::DeviceKind;
using natten::DType;
using natten::Pass;
using natten::Plan;
using natten::Problem;
using test::Case;

const Case kPlain{.name = "plain", .axes = {{14, 5}, {14, 5}}, .heads = 2, .head_dim = 32};

std::vector<std::string> names(const Problem& p, Pass pass) {
  std::vector<std::string> list;
  for (const Plan& plan : natten::list_plans(p, pass, DeviceKind::cpu).plans) list.push_back(natten::to_string(plan));
  return list;
}

/// The message of the error that `call` throws, which must be of that kind.
std::string message_of(natten::ErrorKind kind, const std::function<void()>& call) {
  try {
    call();
  } catch (const natten::Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return "";
}

TEST(ListPlans, IsNeverEmptyAndHoldsTheReference) {
  for (const Case& c : test::named_cases()) {
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        const std::vector<std::string> list = names(c.problem(dtype), pass);
        ASSERT_FALSE(list.empty()) << c.name;
        EXPECT_EQ(std::count(list.begin(), list.end(), "reference"), 1) << c.name;
        EXPECT_EQ(list.back(), "reference") << c.name << ": the last resort stands last";
        EXPECT_EQ(std::set(list.begin(), list.end()).size(), list.size()) << c.name << " has a name twice";
      }
    }
  }
}

TEST(ListPlans, GivesAReasonForEachKernelThatCannotRun) {
  for (const Case& c : test::named_cases()) {
    const natten::PlanList list = natten::list_plans(c.problem(DType::bf16), Pass::backward, DeviceKind::cpu);
    for (const natten::Rejection& rejection : list.rejections) {
      EXPECT_FALSE(rejection.name.empty()) << c.name;
      EXPECT_GE(rejection.reason.size(), 8u) << c.name << " " << rejection.name;
      EXPECT_EQ(rejection.reason.find('\n'), std::string::npos);
      for (const Plan& plan : list.plans)
        EXPECT_FALSE(natten::to_string(plan).starts_with(rejection.name)) << c.name << " " << rejection.name;
    }
  }
}

TEST(ListPlans, HasTheSamePlansEveryTime) {
  const Problem p = kPlain.problem(DType::f32);
  EXPECT_EQ(names(p, Pass::forward), names(p, Pass::forward));
}

TEST(ToString, JoinsTheParts) {
  EXPECT_EQ(natten::to_string(Plan{"reference", "", {}}), "reference");
  EXPECT_EQ(natten::to_string(Plan{"cpu", "loops-avx2", {}}), "cpu/loops-avx2");
  EXPECT_EQ(natten::to_string(Plan{"cpu", "sliding-avx512", {1, 3, 56}}), "cpu/sliding-avx512/q1x3x56");
}

TEST(ChoosePlan, TakesTheFirstOfTheList) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const Problem p = kPlain.problem(DType::f32);
    EXPECT_EQ(natten::to_string(natten::choose_plan(p, pass, DeviceKind::cpu)), names(p, pass).front());
  }
}

TEST(ChoosePlan, TakesEveryNameOfTheListAndEveryPrefixOfIt) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const Problem p = kPlain.problem(DType::f32);
    const std::vector<std::string> list = names(p, pass);
    for (const std::string& name : list) {
      EXPECT_EQ(natten::to_string(natten::choose_plan(p, pass, DeviceKind::cpu, name)), name);
      for (size_t end = 1; end < name.size(); ++end) {
        if (name[end] != '/' && name[end] != '-') continue;
        const std::string prefix = name.substr(0, end);
        const std::string chosen = natten::to_string(natten::choose_plan(p, pass, DeviceKind::cpu, prefix));
        const auto first = std::find_if(list.begin(), list.end(), [&](const std::string& plan) {
          return plan == prefix || plan.starts_with(prefix + "/") || plan.starts_with(prefix + "-");
        });
        EXPECT_EQ(chosen, *first) << prefix << " must give the best plan that continues it";
      }
    }
  }
}

TEST(ChoosePlan, AForcedInstructionSetIsTheOneInThePlan) {
  const Problem p = kPlain.problem(DType::f32);
  int found = 0;
  for (const std::string engine : {"sliding", "loops"}) {
    for (const std::string isa : {"avx512", "avx2", "portable"}) {
      const std::string wanted = engine + "-" + isa;
      const std::vector<std::string> list = names(p, Pass::forward);
      const bool listed = std::any_of(list.begin(), list.end(), [&](const std::string& name) {
        return name == "cpu/" + wanted || name.starts_with("cpu/" + wanted + "/");
      });
      if (listed) {
        const Plan plan = natten::choose_plan(p, Pass::forward, DeviceKind::cpu, "cpu/" + wanted);
        EXPECT_EQ(plan.backend, "cpu");
        EXPECT_EQ(plan.variant, wanted);
        ++found;
      } else {
        const std::string message = message_of(natten::ErrorKind::invalid_argument, [&] {
          natten::choose_plan(p, Pass::forward, DeviceKind::cpu, "cpu/" + wanted);
        });
        EXPECT_NE(message.find(wanted), std::string::npos) << message;
      }
    }
  }
  EXPECT_GE(found, 2) << "sliding-portable and loops-portable run on every machine";
}

TEST(ChoosePlan, RefusesNamesThatNoEngineHas) {
  const Problem p = kPlain.problem(DType::f32);
  for (const std::string wanted :
       {"hopper", "cp", "cpux", "cpu/slid", "referenc", "cpu/loops-", "CPU", "/", " ", "cpu/"}) {
    const std::string message = message_of(natten::ErrorKind::invalid_argument,
                                           [&] { natten::choose_plan(p, Pass::forward, DeviceKind::cpu, wanted); });
    EXPECT_NE(message.find("'" + wanted + "'"), std::string::npos) << message;
    EXPECT_NE(message.find("cpu"), std::string::npos) << "does not list the engines: " << message;
    EXPECT_NE(message.find("reference"), std::string::npos) << "does not list the engines: " << message;
  }
}

TEST(ChoosePlan, SaysWhyAForcedKernelCannotRun) {
  Case strided = kPlain;
  strided.axes[1].stride = 3;
  const std::string message = message_of(natten::ErrorKind::invalid_argument, [&] {
    natten::choose_plan(strided.problem(DType::f32), Pass::forward, DeviceKind::cpu, "cpu/sliding-portable");
  });
  EXPECT_NE(message.find("cpu/sliding-portable"), std::string::npos) << message;
  EXPECT_NE(message.find("stride"), std::string::npos) << "the first unmet requirement is missing: " << message;
}

TEST(ChoosePlan, ListsEveryEngineWhenNothingFits) {
  const std::string message = message_of(natten::ErrorKind::unsupported, [] {
    natten::choose_plan(kPlain.problem(DType::f32), Pass::forward, DeviceKind::cuda);
  });
  for (const std::string engine : {"cpu", "reference"})
    EXPECT_NE(message.find(engine + ": "), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
}

TEST(Workspace, OfNoThreadCountIsLargerThanMemory) {
  for (const Case& c : test::named_cases()) {
    const Problem p = c.problem(DType::f32);
    for (const Pass pass : {Pass::forward, Pass::backward})
      for (const Plan& plan : natten::list_plans(p, pass, DeviceKind::cpu).plans)
        for (const int threads : {1, 3, 64})
          EXPECT_LE(natten::workspace_bytes(p, pass, plan, threads), size_t{1} << 30) << natten::to_string(plan);
  }
}

TEST(Executor, RunsEveryTaskOnce) {
  for (const natten::Executor& executor : {natten::serial_executor(), natten::thread_executor(1),
                                           natten::thread_executor(2), natten::thread_executor(7)}) {
    for (const int64_t count : {0, 1, 2, 6, 7, 100}) {
      std::vector<int> runs(size_t(count), 0);
      executor.run(count, [&](int64_t task) { ++runs[size_t(task)]; });
      EXPECT_EQ(runs, std::vector<int>(size_t(count), 1)) << executor.num_threads << " threads";
    }
  }
}

TEST(UnfusedPlans, AreForcedByName) {
  natten::Problem p;
  p.axes[2] = {20, 5, 1, 1, false};
  const auto name = [&](const char* wanted) {
    return natten::to_string(natten::choose_unfused_plan(p, natten::DeviceKind::cpu, wanted));
  };
  EXPECT_EQ(name("reference"), "reference");
  EXPECT_EQ(name("cpu/loops").substr(0, 10), "cpu/loops-");
  EXPECT_EQ(name("").substr(0, 12), "cpu/sliding-");
  EXPECT_THROW(name("nothing"), natten::Error);
}

}  // namespace
