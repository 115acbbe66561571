// SPDX-License-Identifier: MIT
#include "core/backend.h"
namespace natten::cpu {
namespace {
void list_plans(const Problem&, Pass, PlanList&) {}
size_t workspace_bytes(const Problem&, Pass, const Plan&, int) { return 0; }
void forward(const Problem&, const ForwardArgs&, const Plan&, const Executor&, void*) {}
void backward(const Problem&, const BackwardArgs&, const Plan&, const Executor&, void*) {}
}
const Backend kBackend{"cpu", DeviceKind::cpu, list_plans, workspace_bytes, forward, backward};
}
