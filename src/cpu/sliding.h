// SPDX-License-Identifier: MIT
// What the forward and the backward pass of the sliding engine share: where tokens lie, which columns a strip needs,
// the ring of packed key rows, scores, and what is done to scores before the softmax.
//
// Periodic column extension. A window that is shifted inwards at the border holds the same keys as the unshifted one
// with its overhanging columns moved by one window length:
//
//   extent 8, window 5, query 0      columns  -2 -1  0  1  2          keys 0 1 2 3 4: -2 stands for 3, -1 for 4
//
// A softmax does not care about the order of its keys, so packing a row with 2 + 2 such columns makes every query of
// the row look alike. A causal window is never shifted: its overhanging columns are zero, and their scores become
// -infinity.
#pragma once
#include "cpu/micro.h"
#include "cpu/pass.h"
#include "cpu/schedule.h"

namespace natten::cpu::NATTEN_ISA {

size_t sliding_forward_workspace(const Problem& p, int num_threads);
size_t sliding_backward_workspace(const Problem& p, int num_threads);
void sliding_forward(const Problem& p, const ForwardArgs& args, const Executor& executor, void* workspace);
void sliding_backward(const Problem& p, const BackwardArgs& args, const Executor& executor, void* workspace);

/// Sizes of packed pieces, in elements of Real.
template <class Real>
struct Layout {
  // NOTE: a few vectors between arrays that are stored to and loaded from at the same time keep them from sharing the
  // low 12 bits of their addresses: loads would wait for unrelated stores, which costs up to 20 %.
  static constexpr int kSpacing = 5;

  Schedule schedule;
  int dim, dim_v;  ///< head dims, rounded up to whole vectors
  int64_t pitch;   ///< of a transposed key row
  int64_t score_stride;
  int64_t bias_size;  ///< entries of one head's bias

  Layout(const Problem& p, Pass pass, int num_threads) {
    dim = whole_vectors<Real>(p.head_dim);
    dim_v = whole_vectors<Real>(p.head_dim_v);
    schedule = make_schedule(p, pass, kRows, int64_t{dim + dim_v} * int(sizeof(Real)), num_threads);
    pitch = schedule.pitch(kLanes<Real>);
    score_stride = (schedule.window.volume() + kSpacing) * kLanes<Real>;
    bias_size = bias_entries(p);
  }
  /// Each key belongs to one item of the backward pass.
  bool owns_keys() const { return schedule.num_bands == 1 && schedule.num_strips == 1; }
  int widest() const { return dim > dim_v ? dim : dim_v; }
  int64_t transposed_size(int channels) const { return channels * pitch; }
  int64_t natural_size(int channels) const { return (schedule.columns() + 1) * int64_t{channels} + kLanes<Real>; }
};

/// The tokens of one sample, head and dilation residue, by their positions in the groups. Null where a tensor is
/// absent.
template <class T>
struct Tokens {
  T* first;
  int64_t step_z, step_y, step_x;
  explicit operator bool() const { return first != nullptr; }
  T* at(int z, int y, int x) const { return first + z * step_z + y * step_y + x * step_x; }
};

template <class T>
NATTEN_INLINE Tokens<T> tokens(const Problem& p, const TensorView& t, int64_t batch, int head, Int3 residue) {
  return {t ? pointer<T>(t) + offset(t, batch, residue, head) : nullptr, t.strides[1] * p.axes[0].dilation,
          t.strides[2] * p.axes[1].dilation, t.strides[3] * p.axes[2].dilation};
}

/// The key columns of a strip: positions begin .. begin + count of the row, overhanging ones included.
struct Columns {
  int begin, count, window, left, extent;
  bool causal;
  int* sources;  ///< [capacity(count)]: the position whose key stands in a column, or -1 if none does

  /// One column for the right query of the last pair, and the rest of the last block that is packed.
  static int capacity(int count) { return count + 1 + kVectorBytes; }
  static NATTEN_INLINE Columns of(const Axis& x, Span strip, int* sources) {
    const int left = reach_before(x);
    const Columns c{strip.begin - left, strip.size() + x.window - 1, x.window, left, x.extent, x.causal, sources};
    for (int i = 0; i < capacity(c.count); ++i) {
      const int position = c.begin + i;
      sources[i] = i >= c.count || (position < 0 && c.causal) ? -1
                   : position < 0                             ? position + c.window
                   : position >= c.extent                     ? position - c.window
                                                              : position;
    }
    return c;
  }
};

/// Tokens of one head lie a stride apart that no hardware prefetcher follows.
template <int kWrite, class T>
NATTEN_INLINE void prefetch_token(const T* token, int channels) {
  const char* bytes = reinterpret_cast<const char*>(token);
  // NOTE: a function that does nothing but fetch is pure to GCC, and calls of it that are not inlined disappear.
  asm volatile("" : : "r"(bytes));
  for (int64_t b = 0; b < channels * int64_t{sizeof(T)}; b += 64) __builtin_prefetch(bytes + b, kWrite, 2);
}

// --- packing ---------------------------------------------------------------------------------------------------------

/// kLanes rows of `channels` elements -> [channel][lane] times `factor`, channels `pitch` apart and rounded up to whole
/// vectors.
template <class Real, class T>
NATTEN_INLINE void pack_transposed_block(const T* const (&rows)[kLanes<Real>], int channels, Real factor, Real* to,
                                         int64_t pitch) {
  for_each_vector<Real>(channels, [&](int d, int lanes) {
    Vec<Real> block[kLanes<Real>];
    if (lanes == kLanes<Real>) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes<Real>; ++l) block[l] = load_elements<Real>(rows[l] + d);
    } else {
      for (int l = 0; l < kLanes<Real>; ++l) block[l] = load_first<Real>(rows[l] + d, lanes);
    }
    transpose<Real>(block);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<Real>; ++l) store(to + (d + l) * pitch, block[l] * factor);
  });
}

/// A row of keys -> [channel][column]. `zeros` is a row of `channels` zeros. Fetches `ahead` columns in advance.
template <class Real, class T>
void pack_transposed(const Tokens<const T>& from, int z, int y, const Columns& columns, int channels, const T* zeros,
                     int ahead, Real* to, int64_t pitch) {
  const T* row = from.at(z, y, 0);
  for (int i = 0; i < columns.count; i += kLanes<Real>) {
    const T* rows[kLanes<Real>];
    for (int l = 0; l < kLanes<Real>; ++l) {
      const int source = columns.sources[i + l];
      rows[l] = source < 0 ? zeros : row + source * from.step_x;
      if (ahead > 0) prefetch_token<0>(rows[l] + ahead * from.step_x, channels);
    }
    pack_transposed_block<Real>(rows, channels, Real(1), to + i, pitch);
  }
}

/// A row of keys or values -> [column][channel], with one column more, for the right query of the last pair.
template <class Real, class T>
void pack_rows(const Tokens<const T>& from, int z, int y, const Columns& columns, int channels, const T* zeros,
               int ahead, Real* to, int64_t width) {
  const T* row = from.at(z, y, 0);
  for (int i = 0; i <= columns.count; ++i) {
    const int source = columns.sources[i];
    const T* token = source < 0 ? zeros : row + source * from.step_x;
    if (ahead > 0) prefetch_token<0>(token + ahead * from.step_x, channels);
    pack_token<Real>(token, channels, to + i * width);
  }
}

/// The queries of one block: [channel][lane], times `factor`. Lanes behind the last of `count` queries repeat it.
template <class Real, class T>
NATTEN_INLINE void pack_queries(const Tokens<const T>& from, int z, int y, int x, int count, int channels, Real factor,
                                Real* to) {
  const T* rows[kLanes<Real>];
  for (int l = 0; l < kLanes<Real>; ++l) rows[l] = from.at(z, y, x + (l < count ? l : count - 1));
  pack_transposed_block<Real>(rows, channels, factor, to, kLanes<Real>);
}

// --- key rows --------------------------------------------------------------------------------------------------------

/// A key row as a group of query rows sees it.
struct KeyRow {
  int ring_slot;
  int first, last;        ///< query rows [first, last) of the group see it
  int window_row[kRows];  ///< its number among the key rows of each of them
  int z, y;               ///< position
};

/// Which key rows lie where in a ring of window.z planes of `rows` rows. Rows come in growing order, so a row that must
/// make way is never needed again.
class RowRing {
 public:
  RowRing(int64_t* owners, int planes, int rows) : owners_(owners), planes_(planes), rows_(rows) {
    for (int i = 0; i < planes * rows; ++i) owners_[i] = kFree;
  }
  /// The slot of row (z, y). Calls evict(slot, z, y) and pack(slot, z, y) if it was not there.
  template <class Pack, class Evict>
  NATTEN_INLINE int acquire(int z, int y, Pack&& pack, Evict&& evict) {
    const int slot = z % planes_ * rows_ + y % rows_;
    const int64_t row = int64_t{z} << 32 | y;
    if (owners_[slot] == row) return slot;
    if (owners_[slot] != kFree) evict(slot, int(owners_[slot] >> 32), int(owners_[slot]));
    pack(slot, z, y);
    owners_[slot] = row;
    return slot;
  }
  template <class Evict>
  NATTEN_INLINE void evict_all(Evict&& evict) {
    for (int slot = 0; slot < planes_ * rows_; ++slot)
      if (owners_[slot] != kFree) evict(slot, int(owners_[slot] >> 32), int(owners_[slot]));
  }

 private:
  static constexpr int64_t kFree = -1;
  int64_t* owners_;
  int planes_, rows_;
};

/// Up to kRows query rows, the key rows that any of them sees, and how many each of them sees. In a grid of one row the
/// "rows" that share each loaded key are neighbouring blocks of lanes instead, `lane_step` columns apart.
struct RowGroup {
  int z, y, count;
  KeyRow* key_rows;
  int num_key_rows;
  int seen[kRows];  ///< key rows of each query row
  int lane_step = 0;

  int y_of(int r) const { return lane_step > 0 ? y : y + r; }
  int x_of(int r, int x) const { return x + r * lane_step; }
};

template <class Pack, class Evict>
NATTEN_INLINE void fill_group(RowGroup& group, const Axis& z_axis, const Axis& y_axis, RowRing& ring, Pack&& pack,
                              Evict&& evict) {
  const Span planes = key_span(z_axis, group.z);
  Span rows[kRows];
  for (int r = 0; r < group.count; ++r) {
    rows[r] = key_span(y_axis, group.y + r);
    group.seen[r] = planes.size() * rows[r].size();
  }
  group.num_key_rows = 0;
  for (int z = planes.begin; z < planes.end; ++z)
    for (int y = rows[0].begin; y < rows[group.count - 1].end; ++y) {
      KeyRow& row = group.key_rows[group.num_key_rows++];
      row = {ring.acquire(z, y, pack, evict), 0, group.count, {}, z, y};
      while (y >= rows[row.first].end) ++row.first;
      while (y < rows[row.last - 1].begin) --row.last;
      for (int r = row.first; r < row.last; ++r)
        row.window_row[r] = (z - planes.begin) * rows[r].size() + y - rows[r].begin;
    }
}

/// Calls f(group, x, count) for the blocks of a group's query rows in columns [x.begin, x.end): a block of lanes of
/// each row or, if there is one row only, kRows blocks of it.
template <class Real, class F>
NATTEN_INLINE void for_each_block(const RowGroup& group, bool single_row, Span x, F&& f) {
  const int lanes = kLanes<Real>, step = single_row ? kRows * lanes : lanes;
  for (int begin = x.begin; begin < x.end; begin += step) {
    const int count = x.end - begin < step ? x.end - begin : step;
    RowGroup part = group;
    if (single_row && count > lanes) {
      part.count = (count + lanes - 1) / lanes;
      part.lane_step = lanes;
      for (int i = 0; i < part.num_key_rows; ++i)
        for (int r = 1; r < part.count; ++r) part.key_rows[i].window_row[r] = part.key_rows[i].window_row[0];
    }
    f(part, begin, count);
  }
}

/// Calls f(group, r, x, count) for what shares nothing but scores: the whole group, or each of its blocks of lanes.
template <class Real, class F>
NATTEN_INLINE void for_each_part(const RowGroup& group, int x, int count, F&& f) {
  if (group.lane_step == 0) return f(group, 0, x, count);
  for (int r = 0; r < group.count; ++r) {
    RowGroup part = group;
    part.count = 1;
    part.lane_step = 0;
    const int rest = count - r * group.lane_step;
    f(part, r, group.x_of(r, x), rest < kLanes<Real> ? rest : kLanes<Real>);
  }
}

// --- prefetching -----------------------------------------------------------------------------------------------------

/// Columns [begin, end) of kRows rows from `y` on, as far as the axis goes.
template <int kWrite, class T>
NATTEN_INLINE void prefetch_rows(const Tokens<T>& t, int z, int y, int y_end, int begin, int end, int channels) {
  for (int r = 0; r < kRows && y + r < y_end; ++r) {
    const T* token = t.at(z, y + r, begin);
    for (int x = begin; x < end; ++x, token += t.step_x) prefetch_token<kWrite>(token, channels);
  }
}

/// What the next block of queries will pack: the same columns kRows rows further or, if there is one row only, the
/// `block` columns behind these.
template <class T>
NATTEN_INLINE void prefetch_queries(const Tokens<T>& t, const RowGroup& group, const Item& item, bool single_row,
                                    int begin, int end, int block, int channels) {
  if (!single_row) return prefetch_rows<0>(t, group.z, group.y + kRows, item.y.end, begin, end, channels);
  const int limit = end + block < item.x.end ? end + block : item.x.end;
  prefetch_rows<0>(t, group.z, group.y, group.y + 1, begin + block, limit, channels);
}

// --- scores ----------------------------------------------------------------------------------------------------------

/// S of one block of lanes: [row of the group][key row of its window][slot][lane].
template <class Real>
struct Scores {
  Real* data;
  int64_t row_stride;  ///< between the query rows of a group
  int window;          ///< along x
  Real* at(int r, int window_row, int slot = 0) const {
    return data + r * row_stride + (int64_t{window_row} * window + slot) * kLanes<Real>;
  }
  Scores from_row(int r) const { return {data + r * row_stride, row_stride, window}; }
};

/// Calls f(rows, columns) for runs of key columns that the same rows of the group see.
template <class F>
NATTEN_INLINE void for_each_segment(const RowGroup& group, const KeyRow& row, int window, F&& f) {
  if (group.lane_step == 0) return f(Span{row.first, row.last}, Span{0, window});
  // Row r sees columns r * lane_step + [0, window): staggered spans, cut wherever one of them begins or ends.
  Span rows{0, 1};
  for (int c = 0; rows.begin < group.count;) {
    const int next_begin = rows.end < group.count ? rows.end * group.lane_step : INT32_MAX;
    const int next_end = rows.begin * group.lane_step + window;
    const int next = next_begin < next_end ? next_begin : next_end;
    if (rows.size() > 0) f(rows, Span{c, next});
    c = next;
    if (next == next_end) ++rows.begin;
    if (next == next_begin) ++rows.end;
  }
}

/// `keys(row)` is the transposed key row at the column of lane 0 and slot 0; `queries` [row][channel][lane]; `maxima`
/// as in scores_block, for the rows of the group. Asks `prefetch(i, n)`, for i = 0 .. n - 1, to fetch what is needed
/// later: here the loads of the kernel all hit.
template <class V, class Real, class Keys, class Prefetch>
NATTEN_INLINE void compute_scores_with(const RowGroup& group, const Scores<Real>& scores, const Real* queries,
                                       int channels, int64_t query_stride, int64_t pitch, Real* maxima, Keys&& keys,
                                       Prefetch&& prefetch) {
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& row = group.key_rows[i];
    const Real* kt = keys(row);
    prefetch(i, group.num_key_rows);
    for_each_segment(group, row, scores.window, [&](Span rows, Span columns) {
      const int chunks = (columns.size() + kMaxSlots - 1) / kMaxSlots;
      for (int chunk = 0, c = columns.begin; chunk < chunks; ++chunk) {
        const int slots = (columns.end - c + chunks - chunk - 1) / (chunks - chunk);
        Real* to[kRows];
        for (int r = rows.begin; r < rows.end; ++r)
          to[r - rows.begin] = scores.at(r, row.window_row[r], c - r * group.lane_step);
        scores_block_for<Real, V>(rows.size(), slots)(queries + rows.begin * query_stride, query_stride, kt + c, pitch,
                                                      channels, to,
                                                      maxima ? maxima + rows.begin * kLanes<Real> : nullptr);
        c += slots;
      }
    });
  }
}

/// A block of few queries takes vectors of half the width, where those cost half the time.
template <class Real, class Keys, class Prefetch>
NATTEN_INLINE void compute_scores(const RowGroup& group, const Scores<Real>& scores, const Real* queries, int channels,
                                  int64_t query_stride, int64_t pitch, int count, Real* maxima, Keys&& keys,
                                  Prefetch&& prefetch) {
  if constexpr (kVectorBytes == 64)
    if (count * 2 <= kLanes<Real>)
      return compute_scores_with<HalfVec<Real>>(group, scores, queries, channels, query_stride, pitch, maxima, keys,
                                                prefetch);
  compute_scores_with<Vec<Real>>(group, scores, queries, channels, query_stride, pitch, maxima, keys, prefetch);
}

/// The relative position bias of one head, times log2(e), and the border: what changes scores before the softmax.
template <class Real>
struct ScoreRules {
  const Real* bias = nullptr;  ///< [2 wz - 1][2 wy - 1][2 wx - 1] with the windows as the user gave them
  const Axis* axes = nullptr;  ///< as the user gave them
  bool causal_border = false;  ///< a causal x axis: overhanging slots are no keys

  bool any(bool at_border) const { return bias != nullptr || (causal_border && at_border); }
  /// Where the entries of one key row begin, such that [key - query along x] finds an entry.
  NATTEN_INLINE int64_t bias_row(int dz, int dy) const {
    const int64_t height = 2 * axes[1].window - 1, width = 2 * axes[2].window - 1;
    return (bias_index(axes[0], 0, dz) * height + bias_index(axes[1], 0, dy)) * width + bias_index(axes[2], 0, 0);
  }
};

/// Applies the rules to the scores of one query row and one key row. `x` is the query of lane 0; (dz, dy) = key -
/// query.
template <class Real>
NATTEN_INLINE void apply_rules(const ScoreRules<Real>& rules, Real* scores, const Columns& columns, int x, int dz,
                               int dy, Real* maxima) {
  using V = Vec<Real>;
  const V lane = lane_numbers<Real>();
  const Real* bias = rules.bias ? rules.bias + rules.bias_row(dz, dy) : nullptr;
  for (int j = 0; j < columns.window; ++j, scores += kLanes<Real>) {
    const int dx = j - columns.left;
    V s = load<V>(scores);
    const auto before = lane < Real(-(x + dx)), behind = lane >= Real(columns.extent - (x + dx));
    if (bias) {
      V b = broadcast<V>(bias[dx]);
      if (x + dx < 0 && !columns.causal) b = select(before, broadcast<V>(bias[dx + columns.window]), b);
      if (x + dx + kLanes<Real> > columns.extent && dx > 0)
        b = select(behind, broadcast<V>(bias[dx - columns.window]), b);
      s += b;
    }
    if (columns.causal && x + dx < 0) s = select(before, broadcast<V>(Real(-INFINITY)), s);
    store(scores, s);
    if (maxima) store(maxima, max(s, load<V>(maxima)));
  }
}

/// Applies the rules to all scores of a block, if any changes them; then `maxima` no longer hold and are set anew.
template <class Real>
NATTEN_INLINE void apply_rules(const ScoreRules<Real>& rules, const RowGroup& group, const Scores<Real>& scores,
                               const Columns& columns, int x, Real* maxima) {
  if (!rules.any(x - columns.left < 0)) return;
  for (int r = 0; maxima && r < group.count; ++r)
    store(maxima + r * kLanes<Real>, broadcast<Vec<Real>>(Real(-INFINITY)));
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& row = group.key_rows[i];
    for (int r = row.first; r < row.last; ++r)
      apply_rules(rules, scores.at(r, row.window_row[r]), columns, x, row.z - group.z, row.y - group.y - r,
                  maxima ? maxima + r * kLanes<Real> : nullptr);
  }
}

/// Stores finish(row, query, accumulator) for the two neighbouring queries of each row.
template <class Real, int kVectors, class T, class Finish>
NATTEN_INLINE void store_pairs(const RowPair<Real, kVectors>& acc, const Tokens<T>& to, const RowGroup& group, int x,
                               int lane, int count, int channel, int channels, Finish&& finish) {
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (r >= group.count || lane + i >= count) continue;
      T* token = to.at(group.z, group.y + r, x + lane + i) + channel;
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) {
        const int rest = channels - channel - n * kLanes<Real>;
        store_up_to<Real>(token + n * kLanes<Real>, finish(r, i, acc[r][i][n]),
                          rest < kLanes<Real> ? rest : kLanes<Real>);
      }
    }
}

/// P times V for two neighbouring queries of each row, kVectors vectors of channels. `values` at the column of lane 0
/// and slot 0: [ring slot][column][channel], ring slots `ring_stride` and columns `width` apart.
template <int kVectors, class Real, class T, class Finish>
NATTEN_INLINE void weigh_values(const RowGroup& group, const Scores<Real>& weights, const Real* values,
                                int64_t ring_stride, int64_t width, const Tokens<T>& to, Span x, int lane, int channel,
                                int channels, Finish&& finish) {
  RowPair<Real, kVectors> acc = {};
  for (int i = 0; i < group.num_key_rows; ++i) {
    const KeyRow& row = group.key_rows[i];
    const Real* of_row[kRows];
    for (int r = 0; r < kRows; ++r) of_row[r] = weights.at(r, row.window_row[r]) + lane;
    add_key_row<Real, kVectors>(acc, row.first, row.last, of_row,
                                values + row.ring_slot * ring_stride + lane * width + channel, width, weights.window);
  }
  store_pairs<Real, kVectors>(acc, to, group, x.begin, lane, x.size(), channel, channels, finish);
}

}  // namespace natten::cpu::NATTEN_ISA
