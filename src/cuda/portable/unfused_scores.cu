// SPDX-License-Identifier: MIT
// Unfused: W = scale * X Y^T + bias, one row of W per query. Products as in window_forward.cu; each one that a query
// sees goes to its slot, a 16-bit number, in shared memory.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/unfused.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim, bool kStaged>
struct Scores {
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2;

  static constexpr bool kClearBehind = false;

  const UnfusedParams& p;
  const Octets<T>& rows;
  uint32_t query[kHeadDim / 16][4];  // A fragments
  Sight sight;
  uint32_t staged[2];            // slot of the box's first position, of this lane's rows
  T* in_place[2];                // the same in the tensor
  const T* bias = nullptr;       // entry of equal positions; null if there is none
  int entry_of_box[2] = {0, 0};  // from there on
  uint32_t lane_key;             // offset of the step's first key
  uint32_t sees[2];              // see column_bits
  int column;                    // this lane's first
  uint32_t to[2];                // of the row at hand: `staged` and what follows, moved to this lane's first column
  int64_t slot;
  int entry[2] = {0, 0};

  __device__ __forceinline__ Scores(const UnfusedParams& params, const Tokens<T>& from, const Octets<T>& octets)
      : p(params), rows(octets), sight(Int3{0, 0, 0}) {
    const int t = threadIdx.x % 4;
    uint4 words[2][kWords];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* row = rows.row(i, from.x);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int first = (t + 4 * w) * 8;
        words[i][w] = {0, 0, 0, 0};
        if (first < from.dim)
          words[i][w] = from.vector ? ptx::load_global_128(row + first) : load_elements(row, first, from.dim);
      }
    }
    make_fragments<kHeadDim>(query, words, p.zero);
  }

  __device__ __forceinline__ void set_bias(const BiasTable<T>& table, Int3 begin) {
    bias = table.table;
#pragma unroll
    for (int i = 0; i < 2; ++i) entry_of_box[i] = int(uint32_t(table.term(begin)) - uint32_t(table.term(rows.at(i))));
  }

  __device__ __forceinline__ void columns(int first, int end, int in_chunk) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, key = in_chunk + g;
    lane_key = key * kKeyBytes + ((t ^ chunk_swizzle<kHeadDim>(key)) << 4);
    column = first + 2 * t;
#pragma unroll
    for (int i = 0; i < 2; ++i) sees[i] = rows.exists[i] ? column_bits(sight.x[i], first, end) : 0;
  }

  __device__ __forceinline__ void start(int z, int y) {
    slot = z * p.slot_strides[0] + y * p.slot_strides[1] + column;
    to[0] = staged[0] + int(slot) * 2, to[1] = staged[1] + int(slot) * 2;
    if (!bias) return;
    const int64_t* strides = p.boxes.bias.strides;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      entry[i] = entry_of_box[i] + bias_term({z, y, column}, strides[1], strides[2], strides[3]);
  }

  __device__ __forceinline__ void row(uint32_t address, const bool (&sees_row)[2]) {
    constexpr float kZeros[4] = {};
    float s[2][4];
    uint4 key[2][kWords];
#pragma unroll
    for (int h = 0; h < 2; ++h) load_key<kHeadDim>(key[h], address + lane_key + h * 8 * kKeyBytes);
#pragma unroll
    for (int h = 0; h < 2; ++h) multiply_keys<T, kHeadDim>(s[h], query, key[h], kZeros);
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[h][e] *= p.scale;
    const uint32_t seen[2] = {sees_row[0] ? sees[0] : 0, sees_row[1] ? sees[1] : 0};
    if (bias) add_bias(s, seen);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store(i, seen[i], ptx::pack<T>(s[0][2 * i], s[0][2 * i + 1]), ptx::pack<T>(s[1][2 * i], s[1][2 * i + 1]));
      to[i] += p.slot_strides[1] * 2;
    }
    slot += p.slot_strides[1];
  }

 private:
  __device__ __forceinline__ void add_bias(float (&s)[2][4], const uint32_t (&seen)[2]) {
    const int x = int(p.boxes.bias.strides[3]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (has_column(seen[i], c)) s[c / 2][2 * i + c % 2] += to_real(bias[entry[i] + (c / 2 * 8 + c % 2) * x]);
      entry[i] += int(p.boxes.bias.strides[2]);
    }
  }
  __device__ __forceinline__ void store(int i, uint32_t seen, uint32_t low, uint32_t high) const {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (!has_column(seen, c)) continue;
      const uint32_t bits = (c < 2 ? low : high) >> (c % 2 * 16);
      if (kStaged)
        ptx::store_shared_16(to[i] + (c / 2 * 8 + c % 2) * 2, bits);
      else
        in_place[i][slot + c / 2 * 8 + c % 2].bits = uint16_t(bits);
    }
  }
};

/// What slots without a key get, in all slots of the window: those with a key are overwritten.
template <class T, bool kStaged>
__device__ __forceinline__ void fill_unused(const UnfusedParams& p, const Slots<T>& slots) {
  const uint32_t word = ptx::pack<T>(p.unused, p.unused);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int row = 0; row < slots.count[i]; ++row)
      for (int n = threadIdx.x % 32; n < p.window_slots; n += 32)
        if (kStaged)
          ptx::store_shared_16(slots.staged[i] + (row * p.slots + n) * 2, word);
        else
          slots.octet[i][int64_t{row} * slots.pitch + n].bits = uint16_t(word);
  __syncwarp();
}

template <class T, int kHeadDim, bool kStaged>
__device__ __forceinline__ void write_scores(const UnfusedParams& p, const Block<T>& block, int pair,
                                             unsigned char* smem) {
  using Layout = Map<T, kHeadDim>;
  const int extra_keys = kStaged ? 0 : p.boxes.problem.extra_keys;
  const uint32_t shared = ptx::shared_address(smem), keys = shared + Layout::kKeys;
  const Octets<T> rows(block, pair);
  if (kStaged && rows.count[0] == 0) return;
  Scores<T, kHeadDim, kStaged> scores(p, block.queries, rows);
  const Slots<T> slots(p, block, rows, shared + Layout::slots(p, threadIdx.x / 32));
  if (p.has_unused) fill_unused<T, kStaged>(p, slots);
#pragma unroll 1
  for (int extra = kStaged || p.window_slots > 0 ? 0 : 1; extra < (extra_keys > 0 ? 2 : 1); ++extra) {
    const Field field = extra ? Field({0, 0, 0}, {1, 1, extra_keys}, p.chunk_keys) : block.field;
    scores.sight =
        extra ? Sight(field.size) : Sight(rows, reinterpret_cast<Span*>(smem + Layout::kSpans), field.begin.x);
    scores.bias = nullptr;
    if (p.boxes.problem.has_bias && !extra) scores.set_bias(BiasTable<T>(p.boxes, block.item.head), field.begin);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores.staged[i] = slots.of_field(p, scores.sight, i);
      scores.in_place[i] = slots.octet[i] + slots.in_octet(p, scores.sight, i, extra ? p.window_slots : 0);
    }
    if (kStaged)
      walk_chunk<kHeadDim>(scores.sight, field, whole(field), keys, scores);
    else
      walk<T, kHeadDim>(field, scores.sight, extra ? block.extra : block.keys, keys, 0, rows.count[0] > 0, scores);
    if (kStaged) break;
  }
  __syncwarp();
  if (kStaged) slots.store();
  __syncwarp();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 128 ? 4 : 5)
    scores_kernel(const __grid_constant__ UnfusedParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  using Layout = Map<T, kHeadDim>;
  Block<T>& block = *reinterpret_cast<Block<T>*>(smem);
  begin_block(p, block, reinterpret_cast<Span*>(smem + Layout::kSpans));
  if (block.item.empty) return;
  const bool at_once = p.staged && block.field.is_one_chunk();
  if (at_once) {
    load_chunk<T, kHeadDim>(ptx::shared_address(smem) + Layout::kKeys, block.keys, block.field, whole(block.field), 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
#pragma unroll 1
  for (int pair = threadIdx.x / 32; pair < p.num_pairs; pair += kThreads / 32)
    if (at_once)
      write_scores<T, kHeadDim, true>(p, block, pair, smem);
    else
      write_scores<T, kHeadDim, false>(p, block, pair, smem);
}

void launch_scores(const UnfusedParams& params, void* stream) {
  dispatch_unfused<128>(params.boxes.problem.dtype, params.boxes.q.dim, [&](auto element, auto head_dim) {
    cuda::launch(scores_kernel<decltype(element), head_dim>, params.boxes.num_items, kThreads,
                 Map<decltype(element), head_dim>::bytes(params), stream, params);
  });
}

}  // namespace natten::cuda_portable
