// SPDX-License-Identifier: MIT
// Cuts follow from the problem and, in the forward pass, the number of threads: see schedule.h. Pieces of a row are
// multiples of 8 columns, pieces of a plane multiples of the rows that share a pass over the keys.
#include "cpu/schedule.h"

#include <algorithm>

namespace natten::cpu {
namespace {

constexpr int kStripColumns = 64;         // narrower strips repeat too much of the halo
constexpr int64_t kStripBytes = 1 << 19;  // a ring that fits in half of L2 may be wider
constexpr int64_t kRingBytes = 4 << 20;   // of an item that walks z with several key planes alive
constexpr int kHaloShare = 4;             // a band packs at most a quarter more key rows than it has query rows
constexpr int kBackwardItems = 4;  // what the backward pass cuts for, whatever the number of threads: a cut costs halo

int divide_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Key rows that `rows` neighbouring query rows can see together.
int rows_seen(const Axis& y, int rows) { return std::min(y.extent, y.window + rows - 1 + y.stride - 1); }

// Pieces of `extent`, as equal as possible, each but the last a multiple of `step`.
int piece(int extent, int pieces, int step) {
  return std::max(divide_up(divide_up(extent, pieces), step) * step, step);
}

// The narrowest piece of an axis. NOTE: neighbouring items of the backward pass add to the same keys; items two apart
// must not, even where the last piece has one query and its window is shifted inwards.
int narrowest(const Axis& a, Pass pass, int step) {
  return pass == Pass::forward ? step : std::max(a.window + reach_before(a) + a.stride, step);
}

// How many items to cut for.
int64_t wanted_items(int64_t planes, Pass pass, int num_threads) {
  if (pass == Pass::backward) return kBackwardItems;
  return planes % num_threads == 0 ? 1 : int64_t{4} * num_threads;
}

}  // namespace

int Schedule::pitch(int lanes) const {
  // One vector more than the columns need, for the slots behind the last lane; and never a multiple of two vectors, so
  // that the channels of a row spread over the sets of the cache.
  const int vectors = divide_up(columns(), lanes) + 1;
  return (vectors | 1) * lanes;
}

Schedule make_schedule(const Problem& p, Pass pass, int rows, int64_t row_bytes_per_column, int num_threads) {
  const Axis z = group_axis(p.axes[0], 0), y = group_axis(p.axes[1], 0), x = group_axis(p.axes[2], 0);
  Schedule s;
  s.groups = {num_groups(p.axes[0]), num_groups(p.axes[1]), num_groups(p.axes[2])};
  s.window = {z.window, y.window, x.window};
  const int64_t planes = p.batch * (pass == Pass::backward ? p.heads_kv : p.heads) * s.groups.volume();
  const int64_t wanted = std::max<int64_t>(wanted_items(planes, pass, num_threads) / std::max<int64_t>(planes, 1), 1);

  const int fewest_columns = narrowest(x, pass, 16),
            fewest_rows = std::max(narrowest(y, pass, 2 * rows), kHaloShare * y.window);
  const int64_t affordable_columns = kStripBytes / (row_bytes_per_column * z.window * rows_seen(y, rows)) - x.window;
  const int strip = int(std::clamp<int64_t>(affordable_columns, kStripColumns, 16 * kStripColumns));
  s.num_strips = divide_up(x.extent, pass == Pass::backward ? std::max(2 * kStripColumns, strip) : strip);
  if (y.extent == 1) s.num_strips = int(std::max<int64_t>(s.num_strips, wanted));
  s.num_strips = std::clamp(s.num_strips, 1, std::max(x.extent / fewest_columns, 1));
  s.strip = piece(x.extent, s.num_strips, 8);
  s.num_strips = divide_up(x.extent, s.strip);

  int num_bands = divide_up(wanted, s.num_strips);
  if (z.window > 1) {  // several key planes stay alive: keep them in the cache
    const int64_t affordable = kRingBytes / (row_bytes_per_column * s.columns() * z.window) - (y.window - 1);
    num_bands = std::max(num_bands, divide_up(y.extent, std::max<int64_t>(affordable, rows)));
  }
  num_bands = std::clamp(num_bands, 1, std::max(y.extent / fewest_rows, 1));
  s.band = piece(y.extent, num_bands, rows);
  s.num_bands = divide_up(y.extent, s.band);

  s.ring_planes = z.window;
  s.ring_rows = rows_seen(y, z.window == 1 ? rows : s.band);
  return s;
}

Item item_at(const Problem& p, const Schedule& s, int heads, int64_t index) {
  auto next = [&](int64_t size) {
    const int digit = int(index % size);
    index /= size;
    return digit;
  };
  Item item;
  const int band = next(s.num_bands), strip = next(s.num_strips);
  item.residue.x = next(s.groups.x);
  item.residue.y = next(s.groups.y);
  item.residue.z = next(s.groups.z);
  item.head = next(heads);
  item.batch = index;
  const int rows = group_axis(p.axes[1], item.residue.y).extent, columns = group_axis(p.axes[2], item.residue.x).extent;
  item.y = {band * s.band, std::min((band + 1) * s.band, rows)};
  item.x = {strip * s.strip, std::min((strip + 1) * s.strip, columns)};
  return item;
}

}  // namespace natten::cpu
