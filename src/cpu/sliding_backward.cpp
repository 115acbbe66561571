// SPDX-License-Identifier: MIT
// The sliding backward pass: one walk over the query rows, five products. Per group of kRows query rows and block of
// kLanes queries: S and dP by the score kernel from the rings of K^T and V^T; P and dS from them; dQ by the kernel
// that the forward pass uses for P V; dK and dV added to fp32 (fp64) rows that travel in the ring beside their keys
// and are added to the result when they leave it. Nothing is computed twice and nothing is atomic: items that could add
// to the same key differ in the parity of their band or strip, and the four colours run one after the other.
#include "cpu/sliding.h"

namespace natten::cpu::NATTEN_ISA {
namespace {

/// What threads share: sums of dk and dv, if the tensors themselves cannot hold them, and one dbias per item and head.
template <class T, class Real>
struct Shared {
  TensorView dk, dv;  // Real, [batch, z, y, x, heads_kv, channel]
  Real* dbias;        // [heads][batch * items][entry]

  Shared(const Problem& p, const BackwardArgs& args, const Layout<Real>& l, Arena& arena) : dk(args.dk), dv(args.dv) {
    if (!std::is_same_v<T, Real>) {
      dk = take(p, p.head_dim, arena);
      dv = take(p, p.head_dim_v, arena);
    }
    dbias = arena.take<Real>(p.heads * p.batch * l.schedule.items_per_head() * l.bias_size);
  }
  static TensorView take(const Problem& p, int dim, Arena& arena) {
    TensorView t{nullptr, {0, 0, 0, 0, dim, 1}};
    t.strides[3] = int64_t{p.heads_kv} * dim;
    for (int d = 2; d >= 0; --d) t.strides[d] = t.strides[d + 1] * p.axes[d].extent;
    t.ptr = arena.take<Real>(p.batch * t.strides[0]);
    return t;
  }
};

/// Memory of one thread.
template <class T, class Real>
struct BackwardScratch {
  T* zeros;
  Real *bias, *dbias;  // [entries of one head], [entry][lane]
  int64_t* owners;
  int* sources;
  KeyRow* key_rows;
  Real *queries, *douts;         // [kRows][channel][lane]
  Real *query_rows, *dout_rows;  // [kRows][lane][channel]
  Real *p, *ds;                  // [kRows][key row][slot][lane]
  Real *keys, *values;           // [ring slot][channel][column]
  Real* key_rows_natural;        // [ring slot][column][channel]
  Real *dk, *dv;                 // likewise

  BackwardScratch(const Layout<Real>& l, Arena& arena) {
    const int64_t slots = l.schedule.ring_slots();
    zeros = arena.take<T>(l.widest());
    bias = arena.take<Real>(l.bias_size);
    dbias = arena.take<Real>(l.bias_size * kLanes<Real>);
    owners = arena.take<int64_t>(slots);
    sources = arena.take<int>(Columns::capacity(l.schedule.columns()));
    key_rows = arena.take<KeyRow>(l.schedule.max_key_rows());
    queries = arena.take<Real>(kRows * l.dim * kLanes<Real>);
    douts = arena.take<Real>(kRows * l.dim_v * kLanes<Real>);
    query_rows = arena.take<Real>(kRows * l.dim * kLanes<Real>);
    dout_rows = arena.take<Real>(kRows * l.dim_v * kLanes<Real>);
    p = arena.take<Real>(kRows * l.score_stride + 2 * l.kSpacing * kLanes<Real>);
    ds = arena.take<Real>(kRows * l.score_stride);
    keys = arena.take<Real>(slots * l.transposed_size(l.dim));
    values = arena.take<Real>(slots * l.transposed_size(l.dim_v));
    key_rows_natural = arena.take<Real>(slots * l.natural_size(l.dim));
    dk = arena.take<Real>(slots * l.natural_size(l.dim));
    dv = arena.take<Real>(slots * l.natural_size(l.dim_v));
  }
};

template <class T, class Real>
struct BackwardItem {
  const Problem& p;
  const Layout<Real>& l;
  BackwardScratch<T, Real>& scratch;
  const Item& item;
  Axis z_axis, y_axis, x_axis;
  Columns columns;
  Tokens<const T> q, k, v, out, dout;
  Tokens<const Real> lse, dlse;
  Tokens<T> dq;
  Tokens<Real> dk, dv;
  ScoreRules<Real> rules;
  bool overwrites_keys;  // nothing else adds to its keys, and nothing has yet: no need to clear them

  void run();

 private:
  void pack(int slot, int z, int y);
  void retire(int slot, int z, int y);
  void add_to(const Tokens<Real>& sum, const Real* row, int z, int y, int channels, int64_t width, Real factor);
  void block(const RowGroup& group, int x, int count);
  void pack_block(const RowGroup& group, int x, int count);
  void finish(const RowGroup& group, const Scores<Real>& p_scores, const Scores<Real>& ds_scores,
              const Real* query_rows, const Real* dout_rows, int x, int count);
  void softmax(const RowGroup& group, const Scores<Real>& p_scores, const Scores<Real>& ds_scores,
               const Real* dout_rows, int x, int count);
  void bias_gradient(const RowGroup& group, const Scores<Real>& ds_scores, int x, int count);
  void bias_row_gradient(const Real* ds, int64_t entry, int x, int count);
  template <int kVectors>
  void query_gradient(const RowGroup& group, const Scores<Real>& ds_scores, int x, int lane, int count, int channel);
  void key_gradient(const RowGroup& group, const Scores<Real>& weights, const Real* tokens, int64_t width, Real* sums,
                    int x, int count);
  template <int kVectors>
  void key_pair(const KeyRow& row, const Scores<Real>& weights, const Real* tokens, int64_t width, Real* sum,
                int column, SeeingLanes lanes);
};

template <class T, class Real>
void BackwardItem<T, Real>::run() {
  RowRing ring(scratch.owners, l.schedule.ring_planes, l.schedule.ring_rows);
  auto pack_row = [&](int slot, int z, int y) { pack(slot, z, y); };
  auto retire_row = [&](int slot, int z, int y) { retire(slot, z, y); };
  clear(scratch.dbias, l.bias_size * kLanes<Real>);
  for (int z = 0; z < z_axis.extent; ++z)
    for (int y = item.y.begin; y < item.y.end; y += kRows) {
      RowGroup group{z, y, item.y.end - y < kRows ? item.y.end - y : kRows, scratch.key_rows, 0, {}};
      fill_group(group, z_axis, y_axis, ring, pack_row, retire_row);
      for_each_block<Real>(group, y_axis.extent == 1, item.x,
                           [&](const RowGroup& part, int x, int count) { block(part, x, count); });
    }
  ring.evict_all(retire_row);
}

template <class T, class Real>
void BackwardItem<T, Real>::pack(int slot, int z, int y) {
  const int ahead = y_axis.extent == 1 ? 2 * kLanes<Real> : 0;  // elsewhere the group before has fetched the row
  pack_transposed<Real>(k, z, y, columns, p.head_dim, scratch.zeros, ahead,
                        scratch.keys + slot * l.transposed_size(l.dim), l.pitch);
  pack_transposed<Real>(v, z, y, columns, p.head_dim_v, scratch.zeros, ahead,
                        scratch.values + slot * l.transposed_size(l.dim_v), l.pitch);
  pack_rows<Real>(k, z, y, columns, p.head_dim, scratch.zeros, ahead,
                  scratch.key_rows_natural + slot * l.natural_size(l.dim), l.dim);
  clear(scratch.dk + slot * l.natural_size(l.dim), l.natural_size(l.dim));
  clear(scratch.dv + slot * l.natural_size(l.dim_v), l.natural_size(l.dim_v));
}

template <class T, class Real>
void BackwardItem<T, Real>::retire(int slot, int z, int y) {
  add_to(dk, scratch.dk + slot * l.natural_size(l.dim), z, y, p.head_dim, l.dim, Real(p.scale));
  add_to(dv, scratch.dv + slot * l.natural_size(l.dim_v), z, y, p.head_dim_v, l.dim_v, Real(1));
}

template <class T, class Real>
void BackwardItem<T, Real>::add_to(const Tokens<Real>& sum, const Real* row, int z, int y, int channels, int64_t width,
                                   Real factor) {
  if (!sum) return;
  auto add = [&](int i, bool overwrite) {
    Real* to = sum.at(z, y, columns.sources[i]);
    for_each_vector<Real>(channels, [&](int d, int lanes) {
      const Vec<Real> more = load<Vec<Real>>(row + i * width + d) * factor;
      store_up_to<Real>(to + d, overwrite ? more : load_up_to<Real>(to + d, lanes) + more, lanes);
    });
  };
  const int first = columns.begin < 0 ? -columns.begin : 0;  // columns [first, last) are where they belong
  const int last = columns.count < columns.extent - columns.begin ? columns.count : columns.extent - columns.begin;
  for (int i = first; i < last; ++i) add(i, overwrites_keys);
  for (int i = 0; i < first; ++i)
    if (columns.sources[i] >= 0) add(i, false);
  for (int i = last; i < columns.count; ++i) add(i, false);
}

template <class T, class Real>
void BackwardItem<T, Real>::pack_block(const RowGroup& group, int x, int count) {
  const int64_t size = l.dim * kLanes<Real>, size_v = l.dim_v * kLanes<Real>;
  for (int r = 0; r < group.count; ++r) {
    const int y = group.y_of(r), begin = group.x_of(r, x);
    const int lanes = count - r * group.lane_step < kLanes<Real> ? count - r * group.lane_step : kLanes<Real>;
    pack_queries(q, group.z, y, begin, lanes, p.head_dim, Real(p.scale * kLog2E), scratch.queries + r * size);
    pack_queries(dout, group.z, y, begin, lanes, p.head_dim_v, Real(1), scratch.douts + r * size_v);
    for (int lane = 0; lane < lanes; ++lane) {
      pack_token(q.at(group.z, y, begin + lane), p.head_dim, scratch.query_rows + r * size + lane * l.dim);
      pack_token(dout.at(group.z, y, begin + lane), p.head_dim_v, scratch.dout_rows + r * size_v + lane * l.dim_v);
    }
  }
}

template <class T, class Real>
void BackwardItem<T, Real>::block(const RowGroup& group, int x, int count) {
  pack_block(group, x, count);
  const Scores<Real> p_scores{scratch.p, l.score_stride, x_axis.window},
      ds_scores{scratch.ds, l.score_stride, x_axis.window};
  const int64_t size = l.dim * kLanes<Real>, size_v = l.dim_v * kLanes<Real>;
  const int column = x - item.x.begin;
  // See the forward pass: the next group's rows, and those that this one will write.
  const KeyRow &first = group.key_rows[0], &last = group.key_rows[group.num_key_rows - 1];
  auto prefetch_inputs = [&](int i, int n) {
    const int begin = x + count * i / n, end = x + count * (i + 1) / n;
    prefetch_rows<0>(k, last.z, last.y + 1, y_axis.extent, begin, end, p.head_dim);
    prefetch_rows<0>(v, last.z, last.y + 1, y_axis.extent, begin, end, p.head_dim_v);
    prefetch_queries(q, group, item, y_axis.extent == 1, begin, end, count, p.head_dim);
  };
  auto prefetch_others = [&](int i, int n) {
    const int begin = x + count * i / n, end = x + count * (i + 1) / n;
    prefetch_queries(dout, group, item, y_axis.extent == 1, begin, end, count, p.head_dim_v);
    prefetch_queries(out, group, item, y_axis.extent == 1, begin, end, count, p.head_dim_v);
    if (dq) prefetch_rows<1>(dq, group.z, group.y, item.y.end, begin, end, p.head_dim);
    if (dk) prefetch_rows<1>(dk, first.z, first.y, y_axis.extent, begin, end, p.head_dim);  // soon to retire
    if (dv) prefetch_rows<1>(dv, first.z, first.y, y_axis.extent, begin, end, p.head_dim_v);
  };
  compute_scores<Real>(
      group, p_scores, scratch.queries, p.head_dim, size, l.pitch, count, nullptr,
      [&](const KeyRow& row) { return scratch.keys + row.ring_slot * l.transposed_size(l.dim) + column; },
      prefetch_inputs);
  compute_scores<Real>(
      group, ds_scores, scratch.douts, p.head_dim_v, size_v, l.pitch, count, nullptr,
      [&](const KeyRow& row) { return scratch.values + row.ring_slot * l.transposed_size(l.dim_v) + column; },
      prefetch_others);
  for_each_part<Real>(group, x, count, [&](const RowGroup& part, int r, int part_x, int part_count) {
    finish(part, p_scores.from_row(r), ds_scores.from_row(r), scratch.query_rows + r * size,
           scratch.dout_rows + r * size_v, part_x, part_count);
  });
}

template <class T, class Real>
void BackwardItem<T, Real>::finish(const RowGroup& group, const Scores<Real>& p_scores, const Scores<Real>& ds_scores,
                                   const Real* query_rows, const Real* dout_rows, int x, int count) {
  apply_rules<Real>(rules, group, p_scores, columns, x, nullptr);
  softmax(group, p_scores, ds_scores, dout_rows, x, count);
  if (l.bias_size > 0) bias_gradient(group, ds_scores, x, count);
  for (int lane = 0; dq && lane < count; lane += 2)
    for_each_vector_block(l.dim / kLanes<Real>, [&](int vector, auto vectors) {
      query_gradient<vectors>(group, ds_scores, x, lane, count, vector * kLanes<Real>);
    });
  key_gradient(group, ds_scores, query_rows, l.dim, scratch.dk, x, count);
  key_gradient(group, p_scores, dout_rows, l.dim_v, scratch.dv, x, count);
}

template <class T, class Real>
void BackwardItem<T, Real>::softmax(const RowGroup& group, const Scores<Real>& p_scores, const Scores<Real>& ds_scores,
                                    const Real* dout_rows, int x, int count) {
  using V = Vec<Real>;
  for (int r = 0; r < group.count; ++r) {
    alignas(64) Real base2_lse[kLanes<Real>] = {}, delta[kLanes<Real>] = {};
    for (int lane = 0; lane < count; ++lane) {
      base2_lse[lane] = base2(*lse.at(group.z, group.y + r, x + lane));
      const Real* dout_row = dout_rows + (r * kLanes<Real> + lane) * int64_t{l.dim_v};
      delta[lane] = dot(dout_row, out.at(group.z, group.y + r, x + lane), p.head_dim_v);
      if (dlse) delta[lane] -= *dlse.at(group.z, group.y + r, x + lane);
    }
    const V lse2 = load<V>(base2_lse), d = load<V>(delta);
    Real *s = p_scores.at(r, 0), *ds = ds_scores.at(r, 0);
    for (int64_t i = 0; i < int64_t{group.seen[r]} * x_axis.window; ++i, s += kLanes<Real>, ds += kLanes<Real>) {
      const V e = exp2<Real>(at_most_zero(load<V>(s) - lse2));
      store(s, e);
      store(ds, e * (load<V>(ds) - d));
    }
  }
}

template <class T, class Real>
void BackwardItem<T, Real>::bias_gradient(const RowGroup& group, const Scores<Real>& ds_scores, int x, int count) {
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& row = group.key_rows[i];
    for (int r = row.first; r < row.last; ++r)
      bias_row_gradient(ds_scores.at(r, row.window_row[r]), rules.bias_row(row.z - group.z, row.y - group.y - r), x,
                        count);
  }
}

// dbias of an entry = sum of dS over the queries and keys that it joins. Lanes are summed at the end of the item; lanes
// whose slot hangs over the border belong to an entry one window away (see apply_rules).
template <class T, class Real>
void BackwardItem<T, Real>::bias_row_gradient(const Real* ds, int64_t entry, int x, int count) {
  using V = Vec<Real>;
  const V lane = lane_numbers<Real>(), zero = {};
  auto add = [](Real* to, V v) { store(to, load<V>(to) + v); };
  const int64_t shift = int64_t{columns.window} * kLanes<Real>;
  for (int j = 0; j < columns.window; ++j, ds += kLanes<Real>) {
    const int dx = j - columns.left;
    Real* to = scratch.dbias + (entry + dx) * kLanes<Real>;
    V g = select(lane < Real(count), load<V>(ds), zero);
    if (x + dx < 0) {
      const auto before = lane < Real(-(x + dx));
      if (!columns.causal) add(to + shift, select(before, g, zero));
      g = select(before, zero, g);
    }
    if (x + dx + count > columns.extent) {
      const auto behind = lane >= Real(columns.extent - (x + dx));
      add(to - shift, select(behind, g, zero));
      g = select(behind, zero, g);
    }
    add(to, g);
  }
}

template <class T, class Real>
template <int kVectors>
void BackwardItem<T, Real>::query_gradient(const RowGroup& group, const Scores<Real>& ds_scores, int x, int lane,
                                           int count, int channel) {
  RowPair<Real, kVectors> acc = {};
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& row = group.key_rows[i];
    const Real* weights[kRows];
    for (int r = 0; r < kRows; ++r) weights[r] = ds_scores.at(r, row.window_row[r]) + lane;
    const Real* from = scratch.key_rows_natural + row.ring_slot * l.natural_size(l.dim) +
                       int64_t{x - item.x.begin + lane} * l.dim + channel;
    add_key_row<Real, kVectors>(acc, row.first, row.last, weights, from, l.dim, x_axis.window);
  }
  store_pairs<Real, kVectors>(acc, dq, group, x, lane, count, channel, p.head_dim,
                              [&](int, int, Vec<Real> v) { return v * Real(p.scale); });
}

template <class T, class Real>
void BackwardItem<T, Real>::key_gradient(const RowGroup& group, const Scores<Real>& weights, const Real* tokens,
                                         int64_t width, Real* sums, int x, int count) {
  const int last = count + x_axis.window - 1;
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& row = group.key_rows[i];
    Real* sum = sums + row.ring_slot * l.natural_size(width) + (x - item.x.begin) * width;
    for (int column = 0; column < last; column += 2) {
      const SeeingLanes lanes = SeeingLanes::of(column, x_axis.window, count);
      for_each_vector_block(int(width) / kLanes<Real>, [&](int vector, auto vectors) {
        const int channel = vector * kLanes<Real>;
        key_pair<vectors>(row, weights, tokens + channel, width, sum + column * width + channel, column, lanes);
      });
    }
  }
}

template <class T, class Real>
template <int kVectors>
void BackwardItem<T, Real>::key_pair(const KeyRow& row, const Scores<Real>& weights, const Real* tokens, int64_t width,
                                     Real* sum, int column, SeeingLanes lanes) {
  KeyPair<Real, kVectors> acc;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    acc[0][n] = load<Vec<Real>>(sum + n * kLanes<Real>);
    acc[1][n] = load<Vec<Real>>(sum + width + n * kLanes<Real>);
  }
  for (int r = row.first; r < row.last; ++r)
    add_query_row<Real, kVectors>(acc, weights.at(r, row.window_row[r], column), tokens + r * width * kLanes<Real>,
                                  width, lanes);
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    store(sum + n * kLanes<Real>, acc[0][n]);
    store(sum + width + n * kLanes<Real>, acc[1][n]);
  }
}

/// All query heads that share the item's key head, one after the other.
template <class T, class Real>
void backward_item(const Problem& p, const BackwardArgs& args, const Layout<Real>& l, const Shared<T, Real>& shared,
                   BackwardScratch<T, Real>& scratch, const Item& item, int64_t index) {
  const Axis z = group_axis(p.axes[0], item.residue.z), y = group_axis(p.axes[1], item.residue.y),
             x = group_axis(p.axes[2], item.residue.x);
  clear(scratch.zeros, l.widest());
  const int64_t items = l.schedule.items_per_head();
  for (int i = 0; i < p.heads_per_kv(); ++i) {
    const int head = item.head * p.heads_per_kv() + i;
    const Real* bias = p.has_bias ? scratch.bias : nullptr;
    if (bias) pack_bias<T>(p, args.bias, head, Real(kLog2E), scratch.bias);
    auto of_q = [&](const TensorView& t) { return tokens<const T>(p, t, item.batch, head, item.residue); };
    auto of_k = [&](const TensorView& t) { return tokens<const T>(p, t, item.batch, item.head, item.residue); };
    BackwardItem<T, Real>{p,
                          l,
                          scratch,
                          item,
                          z,
                          y,
                          x,
                          Columns::of(x, item.x, scratch.sources),
                          of_q(args.q),
                          of_k(args.k),
                          of_k(args.v),
                          of_q(args.out),
                          of_q(args.dout),
                          tokens<const Real>(p, args.lse, item.batch, head, item.residue),
                          tokens<const Real>(p, args.dlse, item.batch, head, item.residue),
                          tokens<T>(p, args.dq, item.batch, head, item.residue),
                          tokens<Real>(p, shared.dk, item.batch, item.head, item.residue),
                          tokens<Real>(p, shared.dv, item.batch, item.head, item.residue),
                          {bias, p.axes, x.causal},
                          l.owns_keys() && i == 0}
        .run();
    Real* dbias = shared.dbias + ((head * p.batch + item.batch) * items + index % items) * l.bias_size;
    for (int64_t e = 0; e < l.bias_size; ++e) dbias[e] = sum_lanes(load<Vec<Real>>(scratch.dbias + e * kLanes<Real>));
  }
}

// Calls f(batch, token, head) for every key.
template <class F>
void for_each_key(const Problem& p, const Executor& executor, F&& f) {
  const int64_t rows = int64_t{p.axes[0].extent} * p.axes[1].extent;
  executor.run(p.batch * rows, [&](int64_t task) {
    const int64_t row = task % rows;
    for (int x = 0; x < p.axes[2].extent; ++x)
      for (int h = 0; h < p.heads_kv; ++h)
        f(task / rows, Int3{int(row / p.axes[1].extent), int(row % p.axes[1].extent), x}, h);
  });
}

// Rounds sums to the tensor that wants them.
template <class T, class Real>
void store_sums(const Problem& p, const Executor& executor, const TensorView& sums, const TensorView& to, int dim) {
  if (!to || to.ptr == sums.ptr) return;
  for_each_key(p, executor, [&](int64_t batch, Int3 token, int head) {
    const Real* from = pointer<Real>(sums) + offset(sums, batch, token, head);
    T* row = pointer<T>(to) + offset(to, batch, token, head);
    for_each_vector<Real>(
        dim, [&](int d, int lanes) { store_up_to<Real>(row + d, load_up_to<Real>(from + d, lanes), lanes); });
  });
}

template <class T>
void backward_typed(const Problem& p, const BackwardArgs& args, const Executor& executor, char* workspace) {
  using Real = RealOf<T>;
  const Layout<Real> l(p, Pass::backward, executor.num_threads);
  Arena shared_arena(workspace), counter(nullptr);
  const Shared<T, Real> shared(p, args, l, shared_arena);
  BackwardScratch<T, Real>(l, counter);
  if (!l.owns_keys())
    for_each_key(p, executor, [&](int64_t batch, Int3 token, int head) {
      if (shared.dk) clear(pointer<Real>(shared.dk) + offset(shared.dk, batch, token, head), p.head_dim);
      if (shared.dv) clear(pointer<Real>(shared.dv) + offset(shared.dv, batch, token, head), p.head_dim_v);
    });
  const int64_t items = p.batch * p.heads_kv * l.schedule.items_per_head();
  if (p.has_bias) clear(shared.dbias, p.heads * p.batch * l.schedule.items_per_head() * l.bias_size);
  const int strips = l.schedule.num_strips > 1 ? 2 : 1, bands = l.schedule.num_bands > 1 ? 2 : 1;
  for (int colour = 0; colour < strips * bands; ++colour)
    run_on_threads(executor, items, workspace + shared_arena.used(), counter.used(), [&](int64_t index, char* memory) {
      const Item item = item_at(p, l.schedule, p.heads_kv, index);
      const int band = item.y.begin / l.schedule.band, strip = item.x.begin / l.schedule.strip;
      if (item.empty() || band % bands != colour % bands || strip % strips != colour / bands) return;
      Arena arena(memory);
      BackwardScratch<T, Real> scratch(l, arena);
      backward_item(p, args, l, shared, scratch, item, index);
    });
  store_sums<T, Real>(p, executor, shared.dk, args.dk, p.head_dim);
  store_sums<T, Real>(p, executor, shared.dv, args.dv, p.head_dim_v);
  if (p.has_bias && args.dbias)
    reduce_bias<T>(p, shared.dbias, p.batch * l.schedule.items_per_head(), executor, args.dbias);
}

}  // namespace

size_t sliding_backward_workspace(const Problem& p, int num_threads) {
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const Layout<RealOf<T>> l(p, Pass::backward, num_threads);
    Arena shared(nullptr), counter(nullptr);
    Shared<T, RealOf<T>>(p, {}, l, shared);
    BackwardScratch<T, RealOf<T>>(l, counter);
    return size_t(shared.used() + times(counter.used(), num_threads));
  });
}

void sliding_backward(const Problem& p, const BackwardArgs& args, const Executor& executor, void* workspace) {
  dispatch(p.dtype,
           [&](auto element) { backward_typed<decltype(element)>(p, args, executor, static_cast<char*>(workspace)); });
}

}  // namespace natten::cpu::NATTEN_ISA
