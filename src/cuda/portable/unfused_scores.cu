// SPDX-License-Identifier: MIT
// Unfused: W = scale * X Y^T + bias, one row of W per query. Products as in window_forward.cu; each one that a query
// sees goes to its slot, a 16-bit number, in shared memory.
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/unfused.cuh"

namespace natten::cuda_portable {
template <class T, int kHeadDim, bool kStaged>
struct Scores {
  static constexpr int kWords = kHeadDim / 32, kKeyBytes = kHeadDim * 2;

  const UnfusedParams& p;
  const Octets& rows;
  const Slots<T>& slots;
  uint32_t shared;
  uint32_t query[kHeadDim / 16][4];  // A fragments
  const T* bias[2] = {};             // of the lane's rows: entry of the key at the box's begin
  int first_slot;                    // 0, or that of the additional keys
  Sight sight;

  uint32_t lane_key;  // offset of the step's first key
  uint32_t sees[2];   // the columns' bits
  int slot[2];        // of the lane's first column in the first row of the window

  __device__ __forceinline__ Scores(const UnfusedParams& params, const Item& item, const Octets& octets,
                                    const Slots<T>& at, uint32_t memory)
      : p(params), rows(octets), slots(at), shared(memory), first_slot(0), sight(Int3{0, 0, 0}) {
    const Gather<T> from = gather_group<T>(p.boxes, p.boxes.q, item, item.head, {0, 0, 0});
    const int t = threadIdx.x % 4;
    uint4 words[2][kWords];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* row = from.at(rows.at[i]);
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

  __device__ __forceinline__ void columns(int first, int end, int in_chunk) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, key = in_chunk + g;
    lane_key = key * kKeyBytes + ((t ^ chunk_swizzle<kHeadDim>(key)) << 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sees[i] = rows.exists[i] ? column_bits(sight.x[i], first, end) : 0;
      slot[i] = first_slot + first + 2 * t - sight.x[i].begin;
    }
  }

  __device__ __forceinline__ void row(int z, int y, uint32_t address, const bool (&sees_row)[2]) {
    float s[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      constexpr float kZeros[4] = {};
      uint4 key[kWords];
      load_key<kHeadDim>(key, address + lane_key + h * 8 * kKeyBytes);
      multiply_keys<T, kHeadDim>(s[h], query, key, kZeros);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!sees_row[i]) continue;
      const int of_row = (z - sight.z[i].begin) * p.slot_strides[0] + (y - sight.y[i].begin) * p.slot_strides[1];
      store(i, slot[i] + of_row, s, bias[i] ? bias_of(i, z, y) : nullptr);
    }
  }

 private:
  __device__ __forceinline__ const T* bias_of(int i, int z, int y) const {
    const int64_t* strides = p.boxes.bias.strides;
    const int column = slot[i] + sight.x[i].begin;
    return bias[i] + (z * strides[1] + y * strides[2] + column * strides[3]);
  }
  __device__ __forceinline__ void store(int i, int to, const float (&s)[2][4], const T* bias_row) const {
    const int g = threadIdx.x % 32 / 4;
    const uint32_t staged = slots.staged[i] + (g * p.slots + to) * 2;
    T* in_place = slots.octet[i] + (g * slots.pitch + to);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] = s[h][2 * i + e] * p.scale;
        if (bias_row && (sees[i] >> (2 * h + e) & 1)) x[e] += to_real(bias_row[(8 * h + e) * p.boxes.bias.strides[3]]);
      }
      const uint32_t word = ptx::pack<T>(x[0], x[1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!(sees[i] >> (2 * h + e) & 1)) continue;
        if (kStaged)
          ptx::store_shared_16(staged + (8 * h + e) * 2, word >> (16 * e));
        else
          in_place[8 * h + e].bits = uint16_t(word >> (16 * e));
      }
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
          slots.octet[i][row * slots.pitch + n].bits = uint16_t(word);
  __syncwarp();
}

/// The bias of the query at position `at` and the key at `key`.
template <class T>
__device__ __forceinline__ const T* bias_at(const UnfusedParams& p, const Item& item, Int3 at, Int3 key) {
  const BiasTable<T> bias(p.boxes, item.head);
  if (!bias.table) return nullptr;
  return bias.table + ((key.z - at.z) * bias.z + (key.y - at.y) * bias.y + (key.x - at.x) * bias.x);
}

template <class T, int kHeadDim, bool kStaged>
__device__ __forceinline__ void write_scores(const UnfusedParams& p, const Item& item, uint32_t shared) {
  const int warp = threadIdx.x / 32, head_kv = item.head / p.boxes.problem.heads_per_kv();
  const Octets rows(p, item, warp);
  const uint32_t staging = shared + ChunkMap<kHeadDim>::kStaging + warp * p.staged_bytes();
  const Slots<T> slots(p, rows, weights_of<T>(p, item, item.head), staging);
  Scores<T, kHeadDim, kStaged> scores(p, item, rows, slots, shared);
  if (p.has_unused) fill_unused<T, kStaged>(p, slots);
#pragma unroll 1
  for (int extra = p.window_slots > 0 ? 0 : 1; extra < (p.boxes.problem.extra_keys > 0 ? 2 : 1); ++extra) {
    scores.sight = extra ? Sight({1, 1, p.boxes.problem.extra_keys}) : Sight(p, item, rows);
    scores.first_slot = extra ? p.window_slots : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      scores.bias[i] = extra ? nullptr : bias_at<T>(p, item, rows.at[i], scores.sight.begin);
    const Gather<T> keys = extra ? gather_plain<T>(p.boxes.extra_k, item.batch, head_kv, {0, 0, 0})
                                 : gather_group<T>(p.boxes, p.boxes.k, item, head_kv, scores.sight.begin);
    walk<T, kHeadDim>(scores.sight, keys, shared, 0, rows.count[0] > 0, scores);
  }
  __syncwarp();
  if (kStaged) slots.store();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) scores_kernel(const __grid_constant__ UnfusedParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Item item = decode_item(p.boxes, blockIdx.x);
  if (item.empty) return;
  const uint32_t shared = ptx::shared_address(smem);
  if (p.staged)
    write_scores<T, kHeadDim, true>(p, item, shared);
  else
    write_scores<T, kHeadDim, false>(p, item, shared);
}

void launch_scores(const UnfusedParams& params, void* stream) {
  dispatch_unfused<128>(params.boxes.problem.dtype, params.boxes.q.dim, [&](auto element, auto head_dim) {
    launch(scores_kernel<decltype(element), head_dim>, params.boxes.num_items,
           ChunkMap<head_dim>::kStaging + kThreads / 32 * params.staged_bytes(), stream, params);
  });
}

}  // namespace natten::cuda_portable
