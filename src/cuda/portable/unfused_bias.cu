// SPDX-License-Identifier: MIT
// Unfused: the gradient of the bias, sums of W over samples and queries. A warp adds its queries one after the other to
// a table of its own, a lane per slot: the slots of a query meet different entries, so there are no atomics, and the
// order is always the same. row_stats.cu sums the tables.
#include "core/pairs.h"
#include "cuda/launch.h"
#include "cuda/portable/dispatch.cuh"
#include "cuda/portable/unfused.cuh"

namespace natten::cuda_portable {

/// A query as the lanes of its warp need it.
struct BiasQuery {
  int64_t weights;  // offset of its slots
  int entry;        // of its first slot
  Int3 keys;        // of its window

  __device__ BiasQuery(const UnfusedParams& p, int64_t number, int head) {
    const Problem& problem = p.boxes.problem;
    const int64_t tokens = problem.tokens(), batch = number / tokens;
    int rest = int(number - batch * tokens);
    const int x = rest % problem.axes[2].extent;
    rest /= problem.axes[2].extent;
    const int y = rest % problem.axes[1].extent, z = rest / problem.axes[1].extent;
    weights = offset(p.weights, batch, z, y, x, head);
    const AxisKeys of[3] = {axis_keys(problem.axes[0], z), axis_keys(problem.axes[1], y),
                            axis_keys(problem.axes[2], x)};
    keys = {of[0].keys.size(), of[1].keys.size(), of[2].keys.size()};
    const Int3 table = bias_table(problem);
    const auto first = [&](int a) { return bias_index(problem.axes[a], of[a].position, of[a].keys.begin); };
    entry = (first(0) * table.y + first(1)) * table.x + first(2);
  }
};

/// Adds one slot of 32 queries, of which `count` exist; each lane holds a query and has a slot.
template <class T>
__device__ __forceinline__ void add_slots(const T* weights, const BiasQuery& mine, int count, Int3 slot,
                                          int slot_number, int entry, float* table) {
  constexpr int kBatch = 8;  // loads in flight
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    float value[kBatch];
    int to[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int from = first + j;
      const Int3 keys{__shfl_sync(~0u, mine.keys.z, from), __shfl_sync(~0u, mine.keys.y, from),
                      __shfl_sync(~0u, mine.keys.x, from)};
      const int64_t row = __shfl_sync(~0u, mine.weights, from);
      const int entry_of_first = __shfl_sync(~0u, mine.entry, from);
      const bool used = from < count && slot.z < keys.z && slot.y < keys.y && slot.x < keys.x;
      to[j] = used ? entry_of_first + entry : -1;
      value[j] = used ? to_real(weights[row + slot_number]) : 0;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (to[j] >= 0) table[to[j]] += value[j];
      __syncwarp();
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_bias_kernel(const __grid_constant__ UnfusedParams p) {
  extern __shared__ __align__(128) unsigned char smem[];
  constexpr int kWarps = kThreads / 32;
  const BoxesParams& b = p.boxes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x / b.bias_pieces;
  float* sums = b.bias_sums + (int64_t{blockIdx.x} * kWarps + warp) * b.bias_entries;
  float* table = p.staged ? reinterpret_cast<float*>(smem) + warp * b.bias_entries : sums;
  for (int i = lane; i < b.bias_entries; i += 32) table[i] = 0;
  __syncwarp();

  const int64_t queries = b.problem.batch * b.problem.tokens(), parts = int64_t{b.bias_pieces} * kWarps;
  const int64_t part = int64_t(blockIdx.x % b.bias_pieces) * kWarps + warp;
  const int64_t end = queries * (part + 1) / parts;
  const Int3 entries = bias_table(b.problem);
  for (int64_t first = queries * part / parts; first < end; first += 32) {
    const int count = int(end - first < 32 ? end - first : 32);
    const BiasQuery query(p, first + detail::min(lane, count - 1), head);
    for (int block = 0; block < p.window_slots; block += 32) {
      const int number = block + lane;
      Int3 slot;
      slot.x = number, slot.y = p.window_x.split(slot.x), slot.z = p.window_y.split(slot.y);
      const int entry = (slot.z * entries.y + slot.y) * entries.x + slot.x;
      add_slots(pointer<T>(p.weights), query, count, slot, number, entry, table);
    }
  }
  if (p.staged)
    for (int i = lane; i < b.bias_entries; i += 32) sums[i] = table[i];
}

void launch_sum_bias(const UnfusedParams& params, void* stream) {
  const BoxesParams& b = params.boxes;
  const size_t shared = params.staged ? size_t(b.bias_entries) * (kThreads / 32) * sizeof(float) : 0;
  const unsigned blocks = b.problem.heads * b.bias_pieces;
  if (b.problem.dtype == DType::bf16)
    return cuda::launch(sum_bias_kernel<bf16>, blocks, kThreads, shared, stream, params);
  cuda::launch(sum_bias_kernel<f16>, blocks, kThreads, shared, stream, params);
}

}  // namespace natten::cuda_portable
