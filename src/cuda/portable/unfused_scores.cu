// SPDX-License-Identifier: MIT
// Unfused: W = scale * X Y^T + bias, one row of W per query. Products as in window_forward.cu; each one that a query
// sees goes to its slot, a 16-bit number, in shared memory.
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/unfused.cuh"

namespace natten::cuda_portable {
/// This lane's words of the queries of a pair.
template <class T, int kHeadDim>
__device__ __forceinline__ void load_queries(uint4 (&words)[2][kHeadDim / 32], const Tokens<T>& from,
                                             const Octets<T>& rows) {
  const auto load = [&](auto&& word) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* row = rows.row(i, from.x);
#pragma unroll
      for (int w = 0; w < kHeadDim / 32; ++w) {
        const int first = (threadIdx.x % 4 + 4 * w) * 8;
        words[i][w] = first < from.dim ? word(row, first) : uint4{0, 0, 0, 0};
      }
    }
  };
  if (from.vector)
    load([](const T* row, int first) { return ptx::load_global_128(row + first); });
  else
    load([&](const T* row, int first) { return load_elements(row, first, from.dim); });
}

/// kBias: there may be one.
template <class T, int kHeadDim, bool kStaged, bool kBias>
struct Scores {
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2;
  static constexpr int kRows = kStaged && kHeadDim == 32 ? 2 : 1;
  static constexpr bool kClearBehind = false;

  const UnfusedParams& p;
  const Octets<T>& rows_of;
  uint32_t query[kHeadDim / 16][4];  // A fragments
  Sight sight{Int3{0, 0, 0}};
  uint32_t staged[2];            // slot of the box's first position, of this lane's rows
  T* in_place[2];                // the same in the tensor
  const T* bias = nullptr;       // entry of equal positions; null if there is none
  int entry_of_box[2] = {0, 0};  // from there on
  uint32_t sees[2];              // see column_bits
  int column;                    // this lane's first
  uint32_t to[2];                // of the row at hand: `staged` and what follows, moved to this lane's first column
  int64_t slot;
  int entry[2] = {0, 0};

  __device__ __forceinline__ Scores(const UnfusedParams& params, const Octets<T>& octets,
                                    const uint4 (&words)[2][kWords])
      : p(params), rows_of(octets) {
    make_fragments<kHeadDim>(query, words, p.zero);
  }

  __device__ __forceinline__ void set_bias(const BiasTable<T>& table, Int3 begin) {
    bias = table.table;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      entry_of_box[i] = int(uint32_t(table.term(begin)) - uint32_t(table.term(rows_of.at(i))));
  }

  __device__ __forceinline__ uint32_t columns(int first, int end, int in_chunk) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, key = in_chunk + g;
    column = first + 2 * t;
    column_bits(sees, p, rows_of, sight.x, first, end);
    return key * kKeyBytes + ((t ^ chunk_swizzle<kHeadDim>(key)) << 4);
  }

  __device__ __forceinline__ void start(int z, int y) {
    slot = z * p.slot_strides[0] + y * p.slot_strides[1] + column;
    to[0] = staged[0] + int(slot) * 2, to[1] = staged[1] + int(slot) * 2;
    if (!kBias || !bias) return;
    const int64_t* strides = p.boxes.bias.strides;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      entry[i] = entry_of_box[i] + bias_term({z, y, column}, strides[1], strides[2], strides[3]);
  }

  __device__ __forceinline__ void rows(const uint32_t (&address)[kRows], const bool (&sees_row)[kRows][2]) {
    constexpr float kZeros[4] = {};
    float s[kRows][2][4];
    uint4 key[kRows][2][kWords];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) load_key<kHeadDim>(key[r][h], address[r] + h * 8 * kKeyBytes);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) multiply_keys<T, kHeadDim>(s[r][h], query, key[r][h], kZeros);
#pragma unroll
    for (int r = 0; r < kRows; ++r) put_row(s[r], sees_row[r]);
  }

 private:
  __device__ __forceinline__ void put_row(float (&s)[2][4], const bool (&sees_row)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[h][e] *= p.scale;
    const uint32_t seen[2] = {sees_row[0] ? sees[0] : 0, sees_row[1] ? sees[1] : 0};
    if (kBias && bias) add_bias(s, seen);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint16_t bits = ptx::round_to<T>(s[c / 2][2 * i + c % 2]);
        if (!has_column(seen[i], c)) continue;
        if (kStaged)
          ptx::store_shared_16(to[i] + (c / 2 * 8 + c % 2) * 2, bits);
        else
          in_place[i][slot + c / 2 * 8 + c % 2].bits = bits;
      }
      to[i] += p.slot_strides[1] * 2;
    }
    slot += p.slot_strides[1];
  }
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
};

/// What slots without a key get, in all slots of the window: those with a key are overwritten.
template <class T, bool kStaged>
__device__ __forceinline__ void fill_unused(const UnfusedParams& p, const Slots<T>& slots) {
  const uint16_t bits = ptx::round_to<T>(p.unused);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    for (int row = 0; row < slots.count[i]; ++row)
      for (int n = threadIdx.x % 32; n < p.window_slots; n += 32)
        if (kStaged)
          ptx::store_shared_16(slots.staged[i] + (row * p.slots + n) * 2, bits);
        else
          slots.octet[i][int64_t{row} * slots.pitch + n].bits = bits;
  __syncwarp();
}

/// The tile's pairs of this warp, where field and slots pass through shared memory.
template <class T, int kHeadDim, bool kBias>
__device__ __forceinline__ void write_staged(const UnfusedParams& p, const Block<T>& block, const Field& field,
                                             unsigned char* smem) {
  using Layout = Map<T, kHeadDim>;
  const Span* spans = reinterpret_cast<const Span*>(smem + Layout::kSpans);
  const uint32_t shared = ptx::shared_address(smem), keys = shared + Layout::kKeys;
  const int warp = threadIdx.x / 32;
  load_field<T, kHeadDim>(keys, block.keys, field, 0);
  ptx::cp_async_commit();
  uint4 next[2][kHeadDim / 32];
  const Tokens<T> queries = block.queries;
  load_queries<T, kHeadDim>(next, queries, Octets<T>(block, warp));
  ptx::cp_async_wait<0>();
  __syncthreads();
#pragma unroll 1
  for (int pair = warp; pair < p.num_pairs; pair += kWarps) {
    const Octets<T> rows(block, pair);
    Scores<T, kHeadDim, true, kBias> scores(p, rows, next);
    if (pair + kWarps < p.num_pairs) load_queries<T, kHeadDim>(next, queries, Octets<T>(block, pair + kWarps));
    if (rows.count[0] == 0) continue;
    const Slots<T> slots(p, block, rows, shared + Layout::slots(p, warp));
    if (p.has_unused) fill_unused<T, true>(p, slots);
    scores.sight = Sight(rows, spans, field.begin.x);
    if (kBias) scores.set_bias(BiasTable<T>(p.boxes, block.item.head), field.begin);
#pragma unroll
    for (int i = 0; i < 2; ++i) scores.staged[i] = slots.of_field(p, scores.sight, i);
    walk_chunk<kHeadDim>(scores.sight, field, whole(field), keys, scores);
    __syncwarp();
    slots.store();
    __syncwarp();
  }
}

/// The same for one pair, slots being written where they are, over the grid's keys and the additional ones.
template <class T, int kHeadDim>
__device__ __forceinline__ void write_in_place(const UnfusedParams& p, const Block<T>& block, int pair,
                                               unsigned char* smem) {
  using Layout = Map<T, kHeadDim>;
  const Span* spans = reinterpret_cast<const Span*>(smem + Layout::kSpans);
  const uint32_t keys = ptx::shared_address(smem) + Layout::kKeys;
  const Octets<T> rows(block, pair);
  uint4 words[2][kHeadDim / 32];
  load_queries<T, kHeadDim>(words, block.queries, rows);
  Scores<T, kHeadDim, false, true> scores(p, rows, words);
  const Slots<T> slots(p, block, rows, 0);
  if (p.has_unused) fill_unused<T, false>(p, slots);
  const int extra_keys = p.boxes.problem.extra_keys;
#pragma unroll 1
  for (int extra = p.window_slots > 0 ? 0 : 1; extra < (extra_keys > 0 ? 2 : 1); ++extra) {
    const Field field = extra ? Field({0, 0, 0}, {1, 1, extra_keys}) : block.field;
    scores.sight = extra ? Sight(field.size) : Sight(rows, spans, field.begin.x);
    scores.bias = nullptr;
    if (p.boxes.problem.has_bias && !extra) scores.set_bias(BiasTable<T>(p.boxes, block.item.head), field.begin);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      scores.in_place[i] = slots.octet[i] + slots.in_octet(p, scores.sight, i, extra ? p.window_slots : 0);
    walk<T, kHeadDim>(p.chunk_keys, field, scores.sight, extra ? block.extra : block.keys, keys, 0, rows.count[0] > 0,
                      scores);
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kHeadDim == 128 ? 4 : 5)
    scores_kernel(const __grid_constant__ UnfusedParams p) {
  extern __shared__ __align__(256) unsigned char smem[];
  Block<T>& block = *reinterpret_cast<Block<T>*>(smem);
  const Field field = begin_block(p, block, reinterpret_cast<Span*>(smem + Map<T, kHeadDim>::kSpans));
  if (block.item.empty) return;
  if (p.staged && p.boxes.problem.has_bias) return write_staged<T, kHeadDim, true>(p, block, field, smem);
  if (p.staged) return write_staged<T, kHeadDim, false>(p, block, field, smem);
#pragma unroll 1
  for (int pair = threadIdx.x / 32; pair < p.num_pairs; pair += kWarps)
    write_in_place<T, kHeadDim>(p, block, pair, smem);
}

void launch_scores(const UnfusedParams& params, void* stream) {
  dispatch_unfused<128>(params.boxes.problem.dtype, params.boxes.q.dim, [&](auto element, auto head_dim) {
    cuda::launch(scores_kernel<decltype(element), head_dim>, params.boxes.num_items, kThreads,
                 Map<decltype(element), head_dim>::bytes(params), stream, params);
  });
}

}  // namespace natten::cuda_portable
