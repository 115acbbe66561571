// SPDX-License-Identifier: MIT
// The oracle of unfused attention: each product as plain loops over queries and their keys, sums in double.
#include <algorithm>

#include "reference/windows.h"

namespace natten::reference {
namespace {

Int3 window_of(const Problem& p) { return {p.axes[0].window, p.axes[1].window, p.axes[2].window}; }
int64_t window_slots(const Problem& p) { return num_slots(p) - p.extra_keys; }

// The rows of one query of one head in the tensors of a product.
template <class T>
struct Row {
  const Problem& p;
  const Product& product;
  int64_t batch;
  int head;
  Int3 token;

  int head_kv() const { return head / p.heads_per_kv(); }
  T* at(const TensorView& t, Int3 of, int of_head) const { return pointer<T>(t) + offset(t, batch, of, of_head); }
  T* weights() const { return at(product.weights, token, head); }
  T* query() const { return at(product.queries, token, head); }

  // visit(slot, key token, bias index) for keys of the grid, visit_extra(slot, number) for additional ones.
  template <class Visit, class VisitExtra>
  void for_each(Visit visit, VisitExtra visit_extra) const {
    for_each_key(p, token, [&](Int3 key, Int3 rel, Int3 slot) { visit(token_index(window_of(p), slot), key, rel); });
    for (int n = 0; n < p.extra_keys; ++n) visit_extra(window_slots(p) + n, n);
  }
};

template <class T>
void scores_row(const Row<T>& row) {
  const Problem& p = row.p;
  const Product& t = row.product;
  for (int64_t slot = 0; slot < num_slots(p); ++slot) from_real(t.unused, row.weights()[slot]);
  row.for_each(
      [&](int64_t slot, Int3 key, Int3 rel) {
        const double bias = t.bias ? double(to_real(pointer<T>(t.bias)[offset(t.bias, 0, rel, row.head)])) : 0;
        from_real(t.scale * dot(row.query(), row.at(t.keys, key, row.head_kv()), t.dim) + bias, row.weights()[slot]);
      },
      [&](int64_t slot, int n) {
        const T* key = row.at(t.extra, {0, 0, n}, row.head_kv());
        from_real(t.scale * dot(row.query(), key, t.dim), row.weights()[slot]);
      });
}

template <class T>
void weigh_keys_row(const Row<T>& row, double* sum) {
  const Product& t = row.product;
  std::fill_n(sum, t.dim, 0.0);
  auto add = [&](int64_t slot, const T* key) {
    const double weight = t.scale * double(to_real(row.weights()[slot]));
    for (int d = 0; d < t.dim; ++d) sum[d] += weight * double(to_real(key[d]));
  };
  row.for_each([&](int64_t slot, Int3 key, Int3) { add(slot, row.at(t.keys, key, row.head_kv())); },
               [&](int64_t slot, int n) { add(slot, row.at(t.extra, {0, 0, n}, row.head_kv())); });
  for (int d = 0; d < t.dim; ++d) from_real(sum[d], row.query()[d]);
}

// sums: [tokens and additional keys][dim] of one key/value head of one sample
template <class T>
void weigh_queries_row(const Row<T>& row, double* sums) {
  const Product& t = row.product;
  auto add = [&](int64_t slot, int64_t key) {
    const double weight = t.scale * double(to_real(row.weights()[slot]));
    for (int d = 0; d < t.dim; ++d) sums[key * t.dim + d] += weight * double(to_real(row.query()[d]));
  };
  row.for_each([&](int64_t slot, Int3 key, Int3) { add(slot, token_index(row.p.grid(), key)); },
               [&](int64_t slot, int n) { add(slot, row.p.tokens() + n); });
}

int64_t bias_entries(const Problem& p) {
  return p.has_bias ? (2 * int64_t{p.axes[0].window} - 1) * (2 * int64_t{p.axes[1].window} - 1) *
                          (2 * int64_t{p.axes[2].window} - 1)
                    : 0;
}

// Memory of one sample and key/value head, or of one head's bias table.
int64_t sums_size(const Problem& p) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  return std::max((p.tokens() + p.extra_keys) * dim + dim, bias_entries(p));
}

void list_plans(const Problem&, PlanList& list) { list.plans.push_back({kBackend.name, "", {}}); }

size_t workspace_bytes(const Problem& p, const Plan&, int) {
  return sizeof(double) * std::max<int64_t>(p.batch * p.heads_kv, p.heads) * sums_size(p);
}

// Calls visit(row, memory of the task) for every query; a task is one sample and one key/value head.
template <class Visit, class Finish>
void for_each_row(const Problem& p, const Product& product, const Executor& executor, void* workspace, Visit visit,
                  Finish finish) {
  executor.run(p.batch * p.heads_kv, [&](int64_t task) {
    dispatch(p.dtype, [&](auto element) {
      using T = decltype(element);
      double* memory = static_cast<double*>(workspace) + task * sums_size(p);
      std::fill_n(memory, sums_size(p), 0.0);
      const int head_kv = int(task % p.heads_kv);
      for (int i = 0; i < p.heads_per_kv(); ++i)
        for_each_token(p.grid(), [&](Int3 token) {
          visit(Row<T>{p, product, task / p.heads_kv, head_kv * p.heads_per_kv() + i, token}, memory);
        });
      finish(Row<T>{p, product, task / p.heads_kv, head_kv * p.heads_per_kv(), {0, 0, 0}}, memory);
    });
  });
}

void scores(const Problem& p, const Product& product, const Plan&, const Executor& executor, void* workspace) {
  for_each_row(
      p, product, executor, workspace, [](const auto& row, double*) { scores_row(row); }, [](const auto&, double*) {});
}

void weigh_keys(const Problem& p, const Product& product, const Plan&, const Executor& executor, void* workspace) {
  for_each_row(
      p, product, executor, workspace, [](const auto& row, double* sum) { weigh_keys_row(row, sum); },
      [](const auto&, double*) {});
}

void weigh_queries(const Problem& p, const Product& product, const Plan&, const Executor& executor, void* workspace) {
  for_each_row(
      p, product, executor, workspace, [](const auto& row, double* sums) { weigh_queries_row(row, sums); },
      [&](const auto& row, const double* sums) {
        auto store = [&](const TensorView& to, Int3 token, int64_t key) {
          auto* out = row.at(to, token, row.head_kv());
          for (int d = 0; d < product.dim; ++d) from_real(sums[key * product.dim + d], out[d]);
        };
        if (product.keys && p.has_window())
          for_each_token(p.grid(), [&](Int3 token) { store(product.keys, token, token_index(p.grid(), token)); });
        for (int n = 0; product.extra && n < p.extra_keys; ++n) store(product.extra, {0, 0, n}, p.tokens() + n);
      });
}

void sum_bias(const Problem& p, const Product& product, const Plan&, const Executor& executor, void* workspace) {
  const Int3 table{2 * p.axes[0].window - 1, 2 * p.axes[1].window - 1, 2 * p.axes[2].window - 1};
  executor.run(p.heads, [&](int64_t head) {
    dispatch(p.dtype, [&](auto element) {
      using T = decltype(element);
      double* sums = static_cast<double*>(workspace) + head * sums_size(p);
      std::fill_n(sums, bias_entries(p), 0.0);
      for (int64_t batch = 0; batch < p.batch; ++batch)
        for_each_token(p.grid(), [&](Int3 token) {
          const Row<T> row{p, product, batch, int(head), token};
          row.for_each([&](int64_t slot, Int3,
                           Int3 rel) { sums[token_index(table, rel)] += double(to_real(row.weights()[slot])); },
                       [](int64_t, int) {});
        });
      for_each_token(table, [&](Int3 rel) {
        from_real(sums[token_index(table, rel)], pointer<T>(product.bias)[offset(product.bias, 0, rel, int(head))]);
      });
    });
  });
}

}  // namespace

const UnfusedKernels kUnfused{list_plans, workspace_bytes, scores, weigh_keys, weigh_queries, sum_bias};

}  // namespace natten::reference
