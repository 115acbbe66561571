// SPDX-License-Identifier: MIT
// Fibers, barriers and shared memory of the emulated GPU.
//
// Threads of a block take turns; who waits at a barrier gives its turn to the next. NATTEN_EMULATION chooses the order,
// so that a missing barrier shows as a wrong result: bit 0: warps run as far as they can, one after the other, instead
// of thread by thread; bit 1: last warp first; bit 2: cp.async copies only when waited for instead of at once.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.h"

// Shared memory of the block that runs: what the kernels declare as extern.
namespace natten::cuda_portable {
alignas(256) unsigned char smem[228 * 1024 + 256];
}

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr uint32_t kSharedBase = 1024;  // so that a wrong address is not 0
constexpr unsigned char kPoison = 0xff;
constexpr size_t kGuardBytes = 256;  // behind the shared memory of a block

struct Copy {
  unsigned char* to;
  const void* from;
  uint32_t bytes;
  bool valid;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  dim3 thread;
  bool finished = false;
  std::vector<Copy> copies;
  int group = 0;
};

struct Warp {
  void* lanes[32];
  int arrived = 0;
  unsigned generation = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
const std::function<void()>* body;
void* scheduler_stack;
int running, alive, at_block_barrier, true_values, last_true_values;
unsigned block_generation;
size_t shared_size;
const int policy = std::getenv("NATTEN_EMULATION") ? std::atoi(std::getenv("NATTEN_EMULATION")) : 0;

// Saves the callee-saved registers and changes stacks.
extern "C" void natten_switch_fiber(void** save, void* load);
asm(R"(
.text
.globl natten_switch_fiber
natten_switch_fiber:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

void yield() { natten_switch_fiber(&fibers[running].stack_pointer, scheduler_stack); }

void fiber_main() {
  (*body)();
  fibers[running].finished = true;
  --alive;
  yield();
  fail("a finished thread ran on");
}

void start(Fiber& f) {
  f.finished = false, f.copies.clear(), f.group = 0;
  auto top = reinterpret_cast<uintptr_t>(f.stack.data() + f.stack.size()) & ~uintptr_t{15};
  void** stack = reinterpret_cast<void**>(top - 16);
  *stack = reinterpret_cast<void*>(fiber_main);  // `ret` goes there, with the stack aligned as after a call
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  f.stack_pointer = stack;
}

void resume(int index) {
  Fiber& f = fibers[index];
  if (f.finished) return;
  running = index;
  threadIdx = f.thread;
  natten_switch_fiber(&scheduler_stack, f.stack_pointer);
}

void run_block() {
  const int threads = int(fibers.size()), count = int(warps.size());
  while (alive > 0) {
    for (int i = 0; i < count; ++i) {
      const int warp = policy & 2 ? count - 1 - i : i;
      const int rounds = policy & 1 ? 1000 : 1;  // a round takes every thread of the warp to its next barrier
      for (int round = 0; round < rounds; ++round) {
        const unsigned before = warps[warp].generation + block_generation;
        for (int lane = 0; lane < 32 && warp * 32 + lane < threads; ++lane) resume(warp * 32 + lane);
        if (warps[warp].generation + block_generation == before) break;
      }
    }
  }
}

void start_and_run_block() {
  unsigned char* behind = natten::cuda_portable::smem + shared_size;
  std::memset(natten::cuda_portable::smem, kPoison, shared_size + kGuardBytes);
  warps.assign(fibers.size() / 32, Warp{});
  at_block_barrier = true_values = 0;
  alive = int(fibers.size());
  for (size_t i = 0; i < fibers.size(); ++i) fibers[i].thread = dim3(unsigned(i)), start(fibers[i]);
  run_block();
  if (std::any_of(behind, behind + kGuardBytes, [](unsigned char c) { return c != kPoison; }))
    fail("wrote behind its shared memory");
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

int num_launches = 0;

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  ++num_launches;
  if (shared_bytes > 227 * 1024) fail("too much shared memory");
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads % 32 != 0) fail("a block must be whole warps");
  fibers.resize(std::max(fibers.size(), threads));
  if (fibers.size() != threads) fibers.resize(threads);
  body = &kernel, shared_size = shared_bytes;
  gridDim = grid, blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blockIdx = dim3(x, y, z), start_and_run_block();
}

int block_barrier(bool value) {
  const unsigned generation = block_generation;
  true_values += value;
  if (++at_block_barrier == alive) {
    last_true_values = true_values;
    at_block_barrier = true_values = 0;
    ++block_generation;
  } else {
    while (block_generation == generation) yield();
  }
  return last_true_values;
}

void warp_barrier(void* of_lane, void (*complete)(void* const* of_lanes)) {
  Warp& warp = warps[running / 32];
  warp.lanes[running % 32] = of_lane;
  const unsigned generation = warp.generation;
  if (++warp.arrived == 32) {
    complete(warp.lanes);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) yield();
  }
}

unsigned char* shared(uint32_t address, uint32_t bytes) {
  if (address < kSharedBase || address - kSharedBase + bytes > shared_size) fail("outside of shared memory");
  if (address % bytes != 0) fail("misaligned address in shared memory");
  return natten::cuda_portable::smem + (address - kSharedBase);
}

uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const unsigned char*>(p) - natten::cuda_portable::smem;
  if (offset < 0 || size_t(offset) > shared_size) fail("not an address in shared memory");
  return kSharedBase + uint32_t(offset);
}

void check_aligned(const void* p, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("misaligned address in global memory");
}

void cp_async(uint32_t to, const void* from, uint32_t bytes, bool valid) {
  check_aligned(from, bytes);
  Fiber& f = fibers[running];
  f.copies.push_back({shared(to, bytes), from, bytes, valid, f.group});
  if (policy & 4) return;
  cp_async_wait(-1);
}

void cp_async_commit() { ++fibers[running].group; }

void cp_async_wait(int groups) {
  Fiber& f = fibers[running];
  std::erase_if(f.copies, [&](const Copy& c) {
    const bool due = groups < 0 || c.group + groups < f.group;
    if (due && c.valid) std::memcpy(c.to, c.from, c.bytes);
    if (due && !c.valid) std::memset(c.to, 0, c.bytes);
    return due;
  });
}

}  // namespace emulation

namespace natten::cuda {

const DeviceInfo* current_device() {
  static const DeviceInfo info{9, 0, 4, 227 * 1024};  // few multiprocessors: several pieces of work for each
  return &info;
}

}  // namespace natten::cuda
