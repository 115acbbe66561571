// SPDX-License-Identifier: MIT
// Logits and weighted sums of values by the sliding kernels: those of the fused forward pass, cut in two. Between them
// weights lie in memory as [query][slot] in the order of keys, while the kernels work on [slot][lane] in the order of
// columns. A block of lanes is transposed; and where a window is shifted inwards, its columns are those of the keys
// rotated (see sliding.h), so each row of its slots is rotated as well:
//
//   extent 8, window 5, query 0      columns  -2 -1  0  1  2     keys  3 4 0 1 2     slots  3 4 0 1 2
#include "cpu/sliding.h"
#include "cpu/unfused.h"

namespace natten::cpu::NATTEN_ISA {
namespace {

/// Memory of one thread.
template <class T, class Real>
struct Scratch {
  T* zeros;
  Real* bias;
  int64_t* owners;
  int* sources;
  KeyRow* key_rows;
  Real* queries;  // [kRows][channel][lane]
  Real* weights;  // [kRows][key row][slot][lane]
  Real* rows;     // [lane][key row][slot]
  Real* keys;     // [ring slot][channel][column] or [ring slot][column][channel]

  Scratch(const Layout<Real>& l, Arena& arena) {
    zeros = arena.take<T>(l.dim);
    bias = arena.take<Real>(l.bias_size);
    owners = arena.take<int64_t>(l.schedule.ring_slots());
    sources = arena.take<int>(Columns::capacity(l.schedule.columns()));
    key_rows = arena.take<KeyRow>(l.schedule.max_key_rows());
    queries = arena.take<Real>(kRows * l.dim * kLanes<Real>);
    weights = arena.take<Real>(kRows * l.score_stride + kLanes<Real> * kLanes<Real>);  // whole blocks are transposed
    rows = arena.take<Real>(l.score_stride + kLanes<Real> * kLanes<Real>);
    const int64_t transposed = l.transposed_size(l.dim), natural = l.natural_size(l.dim);
    keys = arena.take<Real>(l.schedule.ring_slots() * (transposed > natural ? transposed : natural));
  }
};

/// A product has one number of channels, so both head dims of the problem are that.
template <class Real>
Layout<Real> layout_of(Problem p, int dim, int num_threads) {
  p.head_dim = p.head_dim_v = dim;
  return Layout<Real>(p, Pass::forward, num_threads);
}

/// Swaps [row][lane] and [lane][row]: `count` rows of kLanes each, and kLanes rows `pitch` apart.
template <class Real>
NATTEN_INLINE void transpose_out(const Real* from, int64_t count, Real* to, int64_t pitch) {
  for (int64_t i = 0; i < count; i += kLanes<Real>) {
    Vec<Real> block[kLanes<Real>];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<Real>; ++l) block[l] = load<Vec<Real>>(from + (i + l) * kLanes<Real>);
    transpose<Real>(block);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<Real>; ++l) store(to + l * pitch + i, block[l]);
  }
}
template <class Real>
NATTEN_INLINE void transpose_in(const Real* from, int64_t pitch, int64_t count, Real* to) {
  for (int64_t i = 0; i < count; i += kLanes<Real>) {
    Vec<Real> block[kLanes<Real>];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<Real>; ++l) block[l] = load<Vec<Real>>(from + l * pitch + i);
    transpose<Real>(block);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<Real>; ++l) store(to + (i + l) * kLanes<Real>, block[l]);
  }
}

template <class Real, class T>
NATTEN_INLINE void copy_out(const Real* from, int count, T* to) {
  for_each_vector<Real>(count, [&](int i, int lanes) { store_up_to<Real>(to + i, load<Vec<Real>>(from + i), lanes); });
}
template <class Real, class T>
NATTEN_INLINE void copy_in(const T* from, int count, Real* to) {
  int i = 0;
  for (; i + kLanes<Real> <= count; i += kLanes<Real>) store(to + i, load_elements<Real>(from + i));
  for (; i < count; ++i) to[i] = to_real(from[i]);
}

template <class T, class Real>
struct SlidingItem {
  const Problem& p;
  const Product& t;
  const Layout<Real>& l;
  Scratch<T, Real>& scratch;
  const Item& item;
  Axis z_axis, y_axis, x_axis;
  Columns columns;
  Tokens<T> queries, weights;
  Tokens<const T> keys;
  ScoreRules<Real> rules;

  template <bool kScores>
  void run();
  void scores_block(const RowGroup& group, int x, int count);
  void values_block(const RowGroup& group, int x, int count);
  template <bool kOut>
  void exchange(const RowGroup& group, const Scores<Real>& block, int x, int count);
  template <bool kOut>
  void exchange_lane(const RowGroup& group, int r, int position, Real* row);
  int64_t pitch(int slots) const { return (slots + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>; }
};

template <class T, class Real>
template <bool kScores>
void SlidingItem<T, Real>::run() {
  RowRing ring(scratch.owners, l.schedule.ring_planes, l.schedule.ring_rows);
  const int ahead = y_axis.extent == 1 ? 2 * kLanes<Real> : 0;
  auto pack = [&](int slot, int z, int y) {
    if constexpr (kScores)
      pack_transposed<Real>(keys, z, y, columns, t.dim, scratch.zeros, ahead,
                            scratch.keys + slot * l.transposed_size(l.dim), l.pitch);
    else
      pack_rows<Real>(keys, z, y, columns, t.dim, scratch.zeros, ahead, scratch.keys + slot * l.natural_size(l.dim),
                      l.dim);
  };
  auto evict = [](int, int, int) {};
  for (int z = 0; z < z_axis.extent; ++z)
    for (int y = item.y.begin; y < item.y.end; y += kRows) {
      RowGroup group{z, y, item.y.end - y < kRows ? item.y.end - y : kRows, scratch.key_rows, 0, {}};
      fill_group(group, z_axis, y_axis, ring, pack, evict);
      for_each_block<Real>(group, y_axis.extent == 1, item.x, [&](const RowGroup& part, int x, int count) {
        kScores ? scores_block(part, x, count) : values_block(part, x, count);
      });
    }
}

template <class T, class Real>
void SlidingItem<T, Real>::scores_block(const RowGroup& group, int x, int count) {
  const int64_t query_stride = l.dim * kLanes<Real>;
  const Tokens<const T> q{queries.first, queries.step_z, queries.step_y, queries.step_x};
  for (int r = 0; r < group.count; ++r)
    pack_queries(q, group.z, group.y_of(r), group.x_of(r, x), count - r * group.lane_step, t.dim, Real(t.scale),
                 scratch.queries + r * query_stride);
  const Scores<Real> scores{scratch.weights, l.score_stride, x_axis.window};
  const int column = x - item.x.begin;
  const KeyRow& last = group.key_rows[group.num_key_rows - 1];
  compute_scores(
      group, scores, scratch.queries, t.dim, query_stride, l.pitch, count, static_cast<Real*>(nullptr),
      [&](const KeyRow& row) { return scratch.keys + row.ring_slot * l.transposed_size(l.dim) + column; },
      [&](int i, int n) {
        const int begin = x + count * i / n, end = x + count * (i + 1) / n;
        prefetch_rows<0>(keys, last.z, last.y + 1, y_axis.extent, begin, end, t.dim);
        prefetch_queries(q, group, item, y_axis.extent == 1, begin, end, count, t.dim);
      });
  for_each_part<Real>(group, x, count, [&](const RowGroup& part, int r, int part_x, int part_count) {
    const Scores<Real> block = scores.from_row(r);
    apply_rules(rules, part, block, columns, part_x, static_cast<Real*>(nullptr));
    exchange<true>(part, block, part_x, part_count);
  });
}

template <class T, class Real>
void SlidingItem<T, Real>::values_block(const RowGroup& group, int x, int count) {
  const Scores<Real> all{scratch.weights, l.score_stride, x_axis.window};
  for_each_part<Real>(group, x, count, [&](const RowGroup& part, int r, int part_x, int part_count) {
    const Scores<Real> block = all.from_row(r);
    exchange<false>(part, block, part_x, part_count);
    const Real* values = scratch.keys + int64_t{part_x - item.x.begin} * l.dim;
    for (int lane = 0; lane < part_count; lane += 2)
      for_each_vector_block(l.dim / kLanes<Real>, [&](int vector, auto vectors) {
        weigh_values<vectors>(part, block, values, l.natural_size(l.dim), l.dim, queries,
                              Span{part_x, part_x + part_count}, lane, vector * kLanes<Real>, t.dim,
                              [&](int, int, Vec<Real> v) { return v * Real(t.scale); });
      });
  });
}

/// Between the weights of a block of lanes and memory, one row of the group at a time.
template <class T, class Real>
template <bool kOut>
void SlidingItem<T, Real>::exchange(const RowGroup& group, const Scores<Real>& block, int x, int count) {
  for (int r = 0; r < group.count; ++r) {
    const int slots = group.seen[r] * x_axis.window;
    const int64_t row_pitch = pitch(slots);
    Real* of_lanes = block.at(r, 0);
    if constexpr (kOut) transpose_out(of_lanes, slots, scratch.rows, row_pitch);
    for (int lane = 0; lane < count; ++lane) exchange_lane<kOut>(group, r, x + lane, scratch.rows + lane * row_pitch);
    if constexpr (!kOut) transpose_in(scratch.rows, row_pitch, slots, of_lanes);
  }
}

/// One query: `row` is [key row][column], memory [slot].
template <class T, class Real>
template <bool kOut>
void SlidingItem<T, Real>::exchange_lane(const RowGroup& group, int r, int position, Real* row) {
  const int window = x_axis.window;
  T* memory = weights.at(group.z, group.y + r, position);
  const Span seen = key_span(x_axis, position);
  const int64_t slots = num_slots(p), used = int64_t{group.seen[r]} * seen.size();
  const int shift = position - columns.left - seen.begin;  // of a key's slot against its column
  if (shift == 0 && used == slots) {
    if constexpr (kOut)
      copy_out(row, int(used), memory);
    else
      copy_in(memory, int(used), row);
    return;
  }
  if (kOut && used < slots)
    for (int64_t i = 0; i < slots; ++i) from_real(Real(t.unused), memory[i]);
  if (!kOut && seen.size() < window) clear(row, int64_t{group.seen[r]} * window);
  // Slots [0, first) are columns from `start` on, the rest columns from 0 on.
  const int start = shift > 0 ? window - shift : -shift,
            first = window - start < seen.size() ? window - start : seen.size();
  const int plane = key_span(z_axis, group.z).begin, line = key_span(y_axis, group.y + r).begin;
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& key = group.key_rows[i];
    if (r < key.first || r >= key.last) continue;
    T* to = memory + ((int64_t{key.z - plane}) * p.axes[1].window + key.y - line) * p.axes[2].window;
    Real* of = row + int64_t{key.window_row[r]} * window;
    if constexpr (kOut) {
      copy_out(of + start, first, to);
      copy_out(of, seen.size() - first, to + first);
    } else {
      copy_in(to, first, of + start);
      copy_in(to + first, seen.size() - first, of);
    }
  }
}

template <bool kScores, class T, class Real>
void run_item(const Problem& p, const Product& t, const Layout<Real>& l, Scratch<T, Real>& scratch, int64_t index) {
  const Item item = item_at(p, l.schedule, p.heads, index);
  if (item.empty()) return;
  const Axis z = group_axis(p.axes[0], item.residue.z), y = group_axis(p.axes[1], item.residue.y),
             x = group_axis(p.axes[2], item.residue.x);
  if (t.bias) pack_bias<T>(p, t.bias, item.head, Real(1), scratch.bias);
  clear(scratch.zeros, l.dim);
  SlidingItem<T, Real>{p,
                       t,
                       l,
                       scratch,
                       item,
                       z,
                       y,
                       x,
                       Columns::of(x, item.x, scratch.sources),
                       tokens<T>(p, t.queries, item.batch, item.head, item.residue),
                       tokens<T>(p, t.weights, item.batch, item.head, item.residue),
                       tokens<const T>(p, t.keys, item.batch, item.head / p.heads_per_kv(), item.residue),
                       {t.bias ? scratch.bias : nullptr, p.axes, false}}
      .template run<kScores>();
}

template <bool kScores>
void run_product(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    using Real = RealOf<T>;
    const Layout<Real> l = layout_of<Real>(p, t.dim, executor.num_threads);
    Arena counter(nullptr);
    Scratch<T, Real>(l, counter);
    const int64_t items = p.batch * p.heads * l.schedule.items_per_head();
    run_on_threads(executor, items, static_cast<char*>(workspace), counter.used(), [&](int64_t index, char* memory) {
      Arena arena(memory);
      Scratch<T, Real> scratch(l, arena);
      run_item<kScores>(p, t, l, scratch, index);
    });
  });
}

}  // namespace

size_t unfused_sliding_workspace(const Problem& p, int num_threads) {
  const size_t loops = unfused_loops_workspace(p, num_threads);  // the other two products
  const size_t sliding = dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    int64_t most = 0;
    for (int dim : {p.head_dim, p.head_dim_v}) {
      Arena arena(nullptr);
      Scratch<T, RealOf<T>>(layout_of<RealOf<T>>(p, dim, num_threads), arena);
      most = arena.used() > most ? arena.used() : most;
    }
    return size_t(times(most, num_threads));
  });
  return loops > sliding ? loops : sliding;
}

void unfused_sliding_scores(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  run_product<true>(p, t, executor, workspace);
}

void unfused_sliding_weigh_keys(const Problem& p, const Product& t, const Executor& executor, void* workspace) {
  run_product<false>(p, t, executor, workspace);
}

}  // namespace natten::cpu::NATTEN_ISA
