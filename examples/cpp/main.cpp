// SPDX-License-Identifier: MIT
// Neighborhood attention from C++, without torch: two heads on a 56x56 grid, forward and backward on two threads, and
// the same once more on the reference engine to compare with.
#include <natten/attention.h>
#include <natten/error.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <new>
#include <random>
#include <string_view>
#include <vector>

namespace {

// A float tensor [batch, z, y, x, head, channel]; the library sees addresses and strides only.
struct Tensor {
  std::vector<float> data;
  natten::TensorView view;

  Tensor(const natten::Problem& p, int heads, int channels)
      : data(size_t(p.batch * p.tokens()) * size_t(heads) * size_t(channels)) {
    const natten::Int3 grid = p.grid();
    const int64_t sizes[6] = {p.batch, grid.z, grid.y, grid.x, heads, channels};
    int64_t stride = 1;
    for (int axis = 5; axis >= 0; --axis) {
      view.strides[axis] = stride;
      stride *= sizes[axis];
    }
    view.ptr = data.data();
  }

  Tensor(const Tensor&) = delete;  // a copy's view would point at the original
};

struct Tensors {
  Tensor q, k, v, dout;         // given
  Tensor out, lse, dq, dk, dv;  // computed

  explicit Tensors(const natten::Problem& p)
      : q(p, p.heads, p.head_dim),
        k(p, p.heads_kv, p.head_dim),
        v(p, p.heads_kv, p.head_dim_v),
        dout(p, p.heads, p.head_dim_v),
        out(p, p.heads, p.head_dim_v),
        lse(p, p.heads, 1),
        dq(p, p.heads, p.head_dim),
        dk(p, p.heads_kv, p.head_dim),
        dv(p, p.heads_kv, p.head_dim_v) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    for (Tensor* t : {&q, &k, &v, &dout})
      for (float& x : t->data) x = normal(rng);
  }

  natten::BackwardArgs args() const {
    natten::BackwardArgs a;
    a.q = q.view, a.k = k.view, a.v = v.view, a.dout = dout.view;
    a.out = out.view, a.lse = lse.view;
    a.dq = dq.view, a.dk = dk.view, a.dv = dv.view;
    return a;
  }
};

// The library allocates nothing: whoever calls it brings the workspace.
struct Workspace {
  static constexpr std::align_val_t kAlignment{64};
  void* memory;

  explicit Workspace(size_t bytes) : memory(::operator new(std::max<size_t>(bytes, 1), kAlignment)) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory, kAlignment); }
};

// Both passes on the best plan that `wanted` allows ("" allows all).
void run(const natten::Problem& problem, const Tensors& tensors, std::string_view wanted) {
  const natten::Executor executor = natten::thread_executor(2);
  for (const natten::Pass pass : {natten::Pass::forward, natten::Pass::backward}) {
    const natten::Plan plan = natten::choose_plan(problem, pass, natten::DeviceKind::cpu, wanted);
    const bool is_forward = pass == natten::Pass::forward;
    std::printf("%-9s %s\n", is_forward ? "forward" : "backward", natten::to_string(plan).c_str());

    const Workspace workspace(natten::workspace_bytes(problem, pass, plan, executor.num_threads));
    if (is_forward)
      natten::forward(problem, tensors.args(), plan, executor, workspace.memory);
    else
      natten::backward(problem, tensors.args(), plan, executor, workspace.memory);
  }
}

double checksum(const Tensor& t) {
  double sum = 0.0;
  for (const float x : t.data) sum += std::abs(x);
  return sum;
}

// The largest difference, relative to the largest value.
double error(const Tensor& result, const Tensor& reference) {
  double difference = 0.0, largest = 0.0;
  for (size_t i = 0; i < result.data.size(); ++i) {
    difference = std::max(difference, double(std::abs(result.data[i] - reference.data[i])));
    largest = std::max(largest, double(std::abs(reference.data[i])));
  }
  return difference / largest;
}

}  // namespace

int main() try {
  natten::Problem problem;
  problem.heads = problem.heads_kv = 2;
  problem.head_dim = problem.head_dim_v = 32;
  problem.axes[1] = {.extent = 56, .window = 7};                 // y: 7 nearest rows
  problem.axes[2] = {.extent = 56, .window = 7, .dilation = 2};  // x: every second column
  problem.scale = 1.0 / std::sqrt(32.0);
  natten::validate(problem);
  std::printf("%lld query-key pairs per head\n", static_cast<long long>(natten::num_pairs(problem)));

  const Tensors best(problem), reference(problem);
  run(problem, best, "");
  run(problem, reference, "reference");

  const struct {
    const char* name;
    const Tensor &result, &expected;
  } rows[] = {{"out", best.out, reference.out},
              {"lse", best.lse, reference.lse},
              {"dq", best.dq, reference.dq},
              {"dk", best.dk, reference.dk},
              {"dv", best.dv, reference.dv}};
  bool good = true;
  for (const auto& row : rows) {
    const double e = error(row.result, row.expected);
    std::printf("%-4s sum of magnitudes %12.4f, off by %.1e\n", row.name, checksum(row.result), e);
    good = good && e < 1e-5;  // a NaN is not good either
  }
  std::puts(good ? "agrees with the reference" : "DISAGREES with the reference");
  return good ? 0 : 1;
} catch (const natten::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
