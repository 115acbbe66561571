// SPDX-License-Identifier: MIT
// How the sliding engine cuts a problem into work items, and how much memory an item needs. An item is a box of queries
// of one sample, head and dilation residue: all of z, a band of y, a strip of x. Its keys pass through a ring of packed
// key rows. Both passes and the memory estimate use the same numbers, so they cannot disagree.
#pragma once
#include <cstdint>

#include "natten/plan.h"

namespace natten::cpu {

struct Schedule {
  Int3 groups;                    ///< dilation groups per axis
  Int3 window;                    ///< of the largest group
  int strip = 0, num_strips = 0;  ///< columns of an item; strips of a row
  int band = 0, num_bands = 0;    ///< query rows of an item; bands of a plane
  int ring_planes = 0, ring_rows = 0;

  int columns() const { return strip + window.x - 1; }  ///< key columns of an item
  int pitch(int lanes) const;                           ///< of a transposed key row
  int ring_slots() const { return ring_planes * ring_rows; }
  int64_t max_key_rows() const { return int64_t{window.z} * ring_rows; }  ///< key rows that one group of rows can meet
  int64_t items_per_head() const { return groups.volume() * num_bands * num_strips; }
};

/// `rows` query rows share a pass over the keys; `row_bytes_per_column` is what K and V of a key column take, packed.
/// The forward pass cuts until every thread is busy, since its results do not depend on the cut. The backward pass must
/// cut alike for every number of threads: it ignores `num_threads`.
Schedule make_schedule(const Problem& p, Pass pass, int rows, int64_t row_bytes_per_column, int num_threads);

/// One work item. Coordinates are positions in the dilation groups `residue`.
struct Item {
  int64_t batch;
  int head;  ///< of q in the forward pass, of k in the backward pass
  Int3 residue;
  Span y, x;
  bool empty() const { return y.size() <= 0 || x.size() <= 0; }
};

/// Item `index` of batch * heads * items_per_head().
Item item_at(const Problem& p, const Schedule& s, int heads, int64_t index);

}  // namespace natten::cpu
