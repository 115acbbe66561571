// SPDX-License-Identifier: MIT
// The three inner loops of the sliding engine, all FMA. Lanes are queries (or keys) that are neighbours along x, so a
// window is a run of unaligned loads and nothing is ever masked:
//
//   S[slot j][lane] = sum over channels of Q^T[lane] * K^T[lane + j]
//
//   K^T row, one channel    c0 c1 c2 c3 c4 c5 c6 ...
//   slot 0, lanes 0..3      ^--------^
//   slot 1, lanes 0..3         ^--------^
//
// Up to kRows query rows share each loaded key. Register budgets: docs/design/2026-11-24-cpu-sliding.md.
#pragma once
#include "cpu/vec.h"

namespace natten::cpu::NATTEN_ISA {

/// Query rows that are worked on together.
inline constexpr int kRows = 3;
/// Slots, and vectors of channels, whose accumulators fit in registers beside kRows queries.
#if defined(__AVX512F__)
inline constexpr int kMaxSlots = 8, kMaxVectors = 4;
#else
inline constexpr int kMaxSlots = 4, kMaxVectors = 2;
#endif

// --- scores: S[row][slot][lane] --------------------------------------------------------------------------------------

/// qt: [rows][channel][lanes], rows `q_row` apart; kt: [channel][columns], channels `pitch` apart, at the column of
/// lane 0 and slot 0; scores[row]: [slot][lanes]. maxima: null, or [rows][lanes], running.
template <class Real, class V, int kRowCount, int kSlots>
[[gnu::noinline]] void scores_block(const Real* qt, int64_t q_row, const Real* kt, int64_t pitch, int channels,
                                    Real* const* scores, Real* maxima) {
  V acc[kRowCount][kSlots] = {};
  for (int d = 0; d < channels; ++d, kt += pitch, qt += kLanes<Real>) {
    V q[kRowCount];
#pragma GCC unroll 4
    for (int r = 0; r < kRowCount; ++r) q[r] = load<V>(qt + r * q_row);
#pragma GCC unroll 16
    for (int j = 0; j < kSlots; ++j) {
      V k = load<V>(kt + j);
      keep_in_register(k);
#pragma GCC unroll 4
      for (int r = 0; r < kRowCount; ++r) acc[r][j] += q[r] * k;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < kSlots; ++j) store(scores[r] + j * kLanes<Real>, acc[r][j]);
  if (maxima == nullptr) return;
#pragma GCC unroll 4
  for (int r = 0; r < kRowCount; ++r) {
    V m = load<V>(maxima + r * kLanes<Real>);
#pragma GCC unroll 16
    for (int j = 0; j < kSlots; ++j) m = max(acc[r][j], m);
    store(maxima + r * kLanes<Real>, m);
  }
}

template <class Real>
using ScoresBlock = void (*)(const Real*, int64_t, const Real*, int64_t, int, Real* const*, Real*);

template <class Real, class V, int kRowCount, int... kSlots>
NATTEN_INLINE ScoresBlock<Real> scores_block_for(int slots, std::integer_sequence<int, kSlots...>) {
  static constexpr ScoresBlock<Real> table[] = {scores_block<Real, V, kRowCount, kSlots + 1>...};
  return table[slots - 1];
}

template <class Real, class V>
NATTEN_INLINE ScoresBlock<Real> scores_block_for(int rows, int slots) {
  constexpr std::make_integer_sequence<int, kMaxSlots> all;
  if (rows == 1) return scores_block_for<Real, V, 1>(slots, all);
  if (rows == 2) return scores_block_for<Real, V, 2>(slots, all);
  return scores_block_for<Real, V, 3>(slots, all);
}

// --- P times V: two neighbouring queries of up to kRows rows, kVectors * kLanes channels -----------------------------

template <class Real, int kVectors>
using RowPair = Vec<Real>[kRows][2][kVectors];

/// Adds one column of values to the left (kWho & 1) and the right query (kWho & 2) of rows [kFirst, kLast).
/// weights[r] points to the left query's weight of this column; the right one's is a slot before it, a lane behind it.
template <class Real, int kFirst, int kLast, int kWho, int kVectors>
NATTEN_INLINE void add_column(RowPair<Real, kVectors>& acc, const Real* const* weights, int64_t at,
                              const Real* values) {
  Vec<Real> v[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) v[i] = load<Vec<Real>>(values + i * kLanes<Real>);
#pragma GCC unroll 4
  for (int r = kFirst; r < kLast; ++r) {
    if constexpr (kWho & 1) {
      const Vec<Real> p = broadcast<Vec<Real>>(weights[r][at]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) acc[r][0][i] += p * v[i];
    }
    if constexpr (kWho & 2) {
      const Vec<Real> p = broadcast<Vec<Real>>(weights[r][at - kLanes<Real> + 1]);
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) acc[r][1][i] += p * v[i];
    }
  }
}

/// One key row: the left query sees columns 0 .. window - 1, the right one 1 .. window.
template <class Real, int kFirst, int kLast, int kVectors>
NATTEN_INLINE void add_key_row(RowPair<Real, kVectors>& acc, const Real* const* weights, const Real* values,
                               int64_t column, int window) {
  add_column<Real, kFirst, kLast, 1, kVectors>(acc, weights, 0, values);
  for (int c = 1; c < window; ++c)
    add_column<Real, kFirst, kLast, 3, kVectors>(acc, weights, c * kLanes<Real>, values + c * column);
  add_column<Real, kFirst, kLast, 2, kVectors>(acc, weights, int64_t{window} * kLanes<Real>, values + window * column);
}

/// The same for rows [first, last) known at run time; accumulators stay in registers across calls.
template <class Real, int kVectors>
NATTEN_INLINE void add_key_row(RowPair<Real, kVectors>& acc, int first, int last, const Real* const* weights,
                               const Real* values, int64_t column, int window) {
  switch (first * 4 + last) {
    case 0 * 4 + 1:
      return add_key_row<Real, 0, 1, kVectors>(acc, weights, values, column, window);
    case 0 * 4 + 2:
      return add_key_row<Real, 0, 2, kVectors>(acc, weights, values, column, window);
    case 0 * 4 + 3:
      return add_key_row<Real, 0, 3, kVectors>(acc, weights, values, column, window);
    case 1 * 4 + 2:
      return add_key_row<Real, 1, 2, kVectors>(acc, weights, values, column, window);
    case 1 * 4 + 3:
      return add_key_row<Real, 1, 3, kVectors>(acc, weights, values, column, window);
    case 2 * 4 + 3:
      return add_key_row<Real, 2, 3, kVectors>(acc, weights, values, column, window);
  }
}

// --- gradients of two neighbouring keys: kVectors * kLanes channels of dK or dV --------------------------------------

template <class Real, int kVectors>
using KeyPair = Vec<Real>[2][kVectors];

/// Adds one query to the left (kWho & 1) and the right key (kWho & 2). weight[0] is the query's weight of the left
/// key; the right key stands one slot further.
template <class Real, int kWho, int kVectors>
NATTEN_INLINE void add_query(KeyPair<Real, kVectors>& acc, const Real* weight, const Real* token) {
  Vec<Real> t[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) t[i] = load<Vec<Real>>(token + i * kLanes<Real>);
  if constexpr (kWho & 1) {
    const Vec<Real> p = broadcast<Vec<Real>>(weight[0]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) acc[0][i] += p * t[i];
  }
  if constexpr (kWho & 2) {
    const Vec<Real> p = broadcast<Vec<Real>>(weight[kLanes<Real>]);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) acc[1][i] += p * t[i];
  }
}

/// The lanes of a block that see key columns `column` and `column` + 1 (0 is the key of lane 0 and slot 0): lane l sees
/// column c in slot c - l. At most one lane sees only the left one, and at most one only the right one.
struct SeeingLanes {
  int begin, end;  ///< these see both
  bool only_left, only_right;

  static NATTEN_INLINE SeeingLanes of(int column, int window, int lanes) {
    const int left = column - window + 1, right = column + 1;
    return {left + 1 > 0 ? left + 1 : 0, right < lanes ? right : lanes, left >= 0 && left < lanes, right < lanes};
  }
};

/// Adds one query row. weights: that of lane 0 in slot `column`; tokens: [lane][channel], `width` apart.
template <class Real, int kVectors>
NATTEN_INLINE void add_query_row(KeyPair<Real, kVectors>& acc, const Real* weights, const Real* tokens, int64_t width,
                                 SeeingLanes lanes) {
  constexpr int kNextLane = 1 - kLanes<Real>;  // the same column is a slot less
  const Real* weight = weights + int64_t{lanes.begin} * kNextLane;
  const Real* token = tokens + lanes.begin * width;
  if (lanes.only_left) add_query<Real, 1, kVectors>(acc, weight - kNextLane, token - width);
  for (int lane = lanes.begin; lane < lanes.end; ++lane, weight += kNextLane, token += width)
    add_query<Real, 3, kVectors>(acc, weight, token);
  if (lanes.only_right) add_query<Real, 2, kVectors>(acc, weight, token);
}

/// Calls f(vector offset, integral_constant of the count) until `vectors` are covered in the largest legal steps.
template <class F>
NATTEN_INLINE void for_each_vector_block(int vectors, F&& f) {
  int i = 0;
  if constexpr (kMaxVectors >= 4)
    for (; i + 4 <= vectors; i += 4) f(i, std::integral_constant<int, 4>());
  for (; i + 2 <= vectors; i += 2) f(i, std::integral_constant<int, 2>());
  if (i < vectors) f(i, std::integral_constant<int, 1>());
}

}  // namespace natten::cpu::NATTEN_ISA
