// SPDX-License-Identifier: MIT
// The sliding forward pass. A work item walks its query rows in groups of kRows; the key rows that a group sees lie
// packed in a ring, K transposed and V as it is. Per group and block of kLanes queries: scores, softmax over all
// slots of a lane (two passes over scores that sit in L1 or L2), then P times V for two neighbouring queries at a time.
#include "cpu/sliding.h"

namespace natten::cpu::NATTEN_ISA {
namespace {

/// Memory of one thread.
template <class T, class Real>
struct ForwardScratch {
  T* zeros;         // [max(head_dim, head_dim_v)]
  Real* bias;       // [entries of one head]
  int64_t* owners;  // [ring slots]
  int* sources;     // see Columns
  KeyRow* key_rows;
  Real* queries;  // [kRows][channel][lane]
  Real* scores;   // [kRows][key row][slot][lane]
  Real* keys;     // [ring slot][channel][column]
  Real* values;   // [ring slot][column][channel]

  ForwardScratch(const Layout<Real>& l, Arena& arena) {
    zeros = arena.take<T>(l.widest());
    bias = arena.take<Real>(l.bias_size);
    owners = arena.take<int64_t>(l.schedule.ring_slots());
    sources = arena.take<int>(Columns::capacity(l.schedule.columns()));
    key_rows = arena.take<KeyRow>(l.schedule.max_key_rows());
    queries = arena.take<Real>(kRows * l.dim * kLanes<Real>);
    scores = arena.take<Real>(kRows * l.score_stride);
    keys = arena.take<Real>(l.schedule.ring_slots() * l.transposed_size(l.dim));
    values = arena.take<Real>(l.schedule.ring_slots() * l.natural_size(l.dim_v));
  }
};

template <class T, class Real>
struct ForwardItem {
  const Problem& p;
  const Layout<Real>& l;
  ForwardScratch<T, Real>& scratch;
  const Item& item;
  Axis z_axis, y_axis, x_axis;
  Columns columns;
  Tokens<const T> q, k, v;
  Tokens<T> out;
  Tokens<Real> lse;
  ScoreRules<Real> rules;

  void run();
  void block(const RowGroup& group, int x, int count);
  void finish(const RowGroup& group, const Scores<Real>& scores, int x, int count, Real* maxima);
  void softmax(const RowGroup& group, const Scores<Real>& scores, int x, int count, const Real* maxima,
               Real (&inverse)[kRows][kLanes<Real>]);
};

template <class T, class Real>
void ForwardItem<T, Real>::run() {
  RowRing ring(scratch.owners, l.schedule.ring_planes, l.schedule.ring_rows);
  const int ahead = y_axis.extent == 1 ? 2 * kLanes<Real> : 0;  // elsewhere the group before has fetched the row
  auto pack = [&](int slot, int z, int y) {
    pack_transposed<Real>(k, z, y, columns, p.head_dim, scratch.zeros, ahead,
                          scratch.keys + slot * l.transposed_size(l.dim), l.pitch);
    pack_rows<Real>(v, z, y, columns, p.head_dim_v, scratch.zeros, ahead,
                    scratch.values + slot * l.natural_size(l.dim_v), l.dim_v);
  };
  auto evict = [](int, int, int) {};
  for (int z = 0; z < z_axis.extent; ++z)
    for (int y = item.y.begin; y < item.y.end; y += kRows) {
      RowGroup group{z, y, item.y.end - y < kRows ? item.y.end - y : kRows, scratch.key_rows, 0, {}};
      fill_group(group, z_axis, y_axis, ring, pack, evict);
      for_each_block<Real>(group, y_axis.extent == 1, item.x,
                           [&](const RowGroup& part, int x, int count) { block(part, x, count); });
    }
}

template <class T, class Real>
void ForwardItem<T, Real>::block(const RowGroup& group, int x, int count) {
  const int64_t query_stride = l.dim * kLanes<Real>;
  for (int r = 0; r < group.count; ++r)
    pack_queries(q, group.z, group.y_of(r), group.x_of(r, x), count - r * group.lane_step, p.head_dim,
                 Real(p.scale * kLog2E), scratch.queries + r * query_stride);
  const Scores<Real> scores{scratch.scores, l.score_stride, x_axis.window};
  const int column = x - item.x.begin;
  auto keys = [&](const KeyRow& row) { return scratch.keys + row.ring_slot * l.transposed_size(l.dim) + column; };
  // While this group computes, the rows that the next one will pack, and those that this one will write, come closer.
  const KeyRow& last = group.key_rows[group.num_key_rows - 1];
  auto prefetch = [&](int i, int n) {
    const int begin = x + count * i / n, end = x + count * (i + 1) / n;
    prefetch_rows<0>(k, last.z, last.y + 1, y_axis.extent, begin, end, p.head_dim);
    prefetch_rows<0>(v, last.z, last.y + 1, y_axis.extent, begin, end, p.head_dim_v);
    prefetch_queries(q, group, item, y_axis.extent == 1, begin, end, count, p.head_dim);
    prefetch_rows<1>(out, group.z, group.y, item.y.end, begin, end, p.head_dim_v);
  };
  alignas(64) Real maxima[kRows * kLanes<Real>];
  for (Real& m : maxima) m = -INFINITY;
  compute_scores(group, scores, scratch.queries, p.head_dim, query_stride, l.pitch, count, maxima, keys, prefetch);
  for_each_part<Real>(group, x, count, [&](const RowGroup& part, int r, int part_x, int part_count) {
    finish(part, scores.from_row(r), part_x, part_count, maxima + r * kLanes<Real>);
  });
}

template <class T, class Real>
void ForwardItem<T, Real>::finish(const RowGroup& group, const Scores<Real>& scores, int x, int count, Real* maxima) {
  alignas(64) Real inverse[kRows][kLanes<Real>];
  apply_rules(rules, group, scores, columns, x, maxima);
  softmax(group, scores, x, count, maxima, inverse);
  for (int lane = 0; lane < count; lane += 2)
    for_each_vector_block(l.dim_v / kLanes<Real>, [&](int vector, auto vectors) {
      weigh_values<vectors>(group, scores, scratch.values + int64_t{x - item.x.begin} * l.dim_v,
                            l.natural_size(l.dim_v), l.dim_v, out, Span{x, x + count}, lane, vector * kLanes<Real>,
                            p.head_dim_v, [&](int r, int i, Vec<Real> v) {
                              const Real factor = inverse[r][lane + i];  // 0 if all logits are -infinity
                              return factor == Real(0) ? Vec<Real>{} : v * factor;
                            });
    });
}

template <class T, class Real>
void ForwardItem<T, Real>::softmax(const RowGroup& group, const Scores<Real>& scores, int x, int count,
                                   const Real* maxima, Real (&inverse)[kRows][kLanes<Real>]) {
  using V = Vec<Real>;
  for (int r = 0; r < group.count; ++r) {
    Real* s = scores.at(r, 0);
    const int64_t slots = int64_t{group.seen[r]} * x_axis.window;
    V m = load<V>(maxima + r * kLanes<Real>), sum0 = {}, sum1 = {};
    m = select(m == Real(-INFINITY), V{}, m);
    for (int64_t i = 0; i + 1 < slots; i += 2, s += 2 * kLanes<Real>) {
      const V e0 = exp2<Real>(load<V>(s) - m), e1 = exp2<Real>(load<V>(s + kLanes<Real>) - m);
      store(s, e0);
      store(s + kLanes<Real>, e1);
      sum0 += e0;
      sum1 += e1;
    }
    if (slots % 2) {
      const V e = exp2<Real>(load<V>(s) - m);
      store(s, e);
      sum0 += e;
    }
    const V sum = sum0 + sum1;
    store(inverse[r], select(sum == Real(0), V{}, Real(1) / sum));
    alignas(64) Real natural[kLanes<Real>];
    store(natural, select(sum == Real(0), broadcast<V>(Real(-INFINITY)), m * Real(kLn2) + log<Real>(sum)));
    Real* to = lse.at(group.z, group.y + r, x);
    for (int lane = 0; lane < count; ++lane) to[lane * lse.step_x] = natural[lane];
  }
}

template <class T, class Real>
void forward_item(const Problem& p, const ForwardArgs& args, const Layout<Real>& l, ForwardScratch<T, Real>& scratch,
                  int64_t index) {
  const Item item = item_at(p, l.schedule, p.heads, index);
  if (item.empty()) return;
  const Axis z = group_axis(p.axes[0], item.residue.z), y = group_axis(p.axes[1], item.residue.y),
             x = group_axis(p.axes[2], item.residue.x);
  const int head_kv = item.head / p.heads_per_kv();
  const Real* bias = p.has_bias ? scratch.bias : nullptr;
  if (bias) pack_bias<T>(p, args.bias, item.head, Real(kLog2E), scratch.bias);
  clear(scratch.zeros, l.widest());
  ForwardItem<T, Real>{p,
                       l,
                       scratch,
                       item,
                       z,
                       y,
                       x,
                       Columns::of(x, item.x, scratch.sources),
                       tokens<const T>(p, args.q, item.batch, item.head, item.residue),
                       tokens<const T>(p, args.k, item.batch, head_kv, item.residue),
                       tokens<const T>(p, args.v, item.batch, head_kv, item.residue),
                       tokens<T>(p, args.out, item.batch, item.head, item.residue),
                       tokens<Real>(p, args.lse, item.batch, item.head, item.residue),
                       {bias, p.axes, x.causal}}
      .run();
}

template <class T>
void forward_typed(const Problem& p, const ForwardArgs& args, const Executor& executor, void* workspace) {
  using Real = RealOf<T>;
  const Layout<Real> l(p, Pass::forward, executor.num_threads);
  Arena counter(nullptr);
  ForwardScratch<T, Real>(l, counter);
  const int64_t items = p.batch * p.heads * l.schedule.items_per_head();
  run_on_threads(executor, items, static_cast<char*>(workspace), counter.used(), [&](int64_t index, char* memory) {
    Arena arena(memory);
    ForwardScratch<T, Real> scratch(l, arena);
    forward_item<T, Real>(p, args, l, scratch, index);
  });
}

}  // namespace

size_t sliding_forward_workspace(const Problem& p, int num_threads) {
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const Layout<RealOf<T>> l(p, Pass::forward, num_threads);
    Arena counter(nullptr);
    ForwardScratch<T, RealOf<T>>(l, counter);
    return size_t(times(counter.used(), num_threads));
  });
}

void sliding_forward(const Problem& p, const ForwardArgs& args, const Executor& executor, void* workspace) {
  dispatch(p.dtype, [&](auto element) { forward_typed<decltype(element)>(p, args, executor, workspace); });
}

}  // namespace natten::cpu::NATTEN_ISA
