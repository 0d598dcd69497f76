// CUDA's thread blocks on a CPU: every thread is a fiber that runs until it has to wait for others.
//
// Not a simulator of a GPU: it says nothing of speed, and knows no cache and no reordering of memory.  What it is for is to
// run the kernels' own code under AddressSanitizer and under several schedules, whose results have to agree bit for bit.
//   - A barrier or a shuffle is an error unless every thread that it names arrives, and at the same line.
//   - Shared memory is fresh for each block and full of NaNs.
//   - An asynchronous copy ruins its target when it is issued and delivers when it is waited for.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace sae_fast {
namespace shim {

struct Copy {
  void* to;
  std::vector<unsigned char> bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  dim3 index;
  enum { ready, at_barrier, at_warp, done } state = ready;
  int line = 0;                           // where it waits
  unsigned lanes = 0;                     // for which lanes of its warp
  std::vector<unsigned char> deposit;     // what it brings to a shuffle
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
  void* fake_stack = nullptr;
};

enum Schedule { ascending, descending, shuffled, warps_ascending, warps_descending, n_schedules };

// One block at a time; the scheduler is the thread that launched.
class Block {
 public:
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  static std::unique_ptr<Block>& spare() {
    static thread_local std::unique_ptr<Block> block;
    return block;
  }
  static int& schedule() {
    static int which = ascending;
    return which;
  }
  static constexpr size_t kStack = 256 * 1024;

  dim3 block_index, block_dim, grid_dim;
  std::unique_ptr<unsigned char[]> shared_memory;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  std::string failure;

  void run(dim3 index, dim3 block, dim3 grid, size_t shared_bytes, const std::function<void()>& kernel) {
    block_index = index, block_dim = block, grid_dim = grid, body = &kernel;
    shared_memory.reset(new unsigned char[shared_bytes]);  // fresh, so that its end is where the sanitizer looks
    std::memset(shared_memory.get(), 0xff, shared_bytes);
    const size_t n = size_t(block.x) * block.y * block.z;
    if (fibers.size() != n) fibers = std::vector<Fiber>(n);
    for (size_t t = 0; t < n; ++t) start(fibers[t], t);
    std::mt19937 random(index.x * 7919 + index.y * 104729 + index.z);
    size_t left = n;
    while (left > 0) {
      const std::vector<size_t> order = next_order(random);
      bool moved = false;
      for (size_t t : order) {
        Fiber& fiber = fibers[t];
        if (fiber.state != Fiber::ready) continue;
        moved = true;
        resume(fiber);
        if (!failure.empty()) throw std::runtime_error(failure);
        if (fiber.state == Fiber::done) --left;
        if (left > 0) release_warp(t / 32);
      }
      if (release_block()) moved = true;
      if (!moved && left > 0) throw std::runtime_error("deadlock: threads wait for others that never arrive");
    }
  }

  // ---- Called by a fiber ----------------------------------------------------------------------------------------------

  void barrier(int line) {
    running->line = line;
    wait(Fiber::at_barrier);
  }

  void meet(unsigned lanes, int line) {
    if (!(lanes >> (thread() % 32) & 1)) fail("a lane is not in the mask that it names", line);
    running->line = line, running->lanes = lanes;
    wait(Fiber::at_warp);
  }

  template <class T>
  T exchange(unsigned lanes, T value, int lane, int line) {
    running->deposit.resize(sizeof(T));
    std::memcpy(running->deposit.data(), &value, sizeof(T));
    meet(lanes, line);
    const size_t from = thread() / 32 * 32 + lane;
    if (lane < 0 || lane >= 32 || from >= fibers.size() || !(lanes >> lane & 1) || fibers[from].deposit.size() != sizeof(T))
      fail("a shuffle reads a lane that does not take part", line);
    T got;
    std::memcpy(&got, fibers[from].deposit.data(), sizeof(T));
    meet(lanes, -line);  // nobody brings the next value before all have read this one
    return got;
  }

  size_t thread() const { return running - fibers.data(); }

  [[noreturn]] void fail(const char* what, int line) {
    failure = std::string(what) + ", line " + std::to_string(line < 0 ? -line : line) + ", block " +
              std::to_string(block_index.x) + ", thread " + std::to_string(thread());
    leave();
    __builtin_unreachable();
  }

 private:
  void start(Fiber& fiber, size_t t) {
    if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
    fiber.state = Fiber::ready;
    fiber.groups.clear(), fiber.open.clear(), fiber.deposit.clear();
    fiber.index = dim3(t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y);
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 0);
  }

  static void enter() {
    Block& block = *current();
    block.arrived();
    try {
      (*block.body)();
    } catch (const std::exception& error) {
      block.failure = error.what();
    }
    block.running->state = Fiber::done;
    block.leave();
  }

  void wait(decltype(Fiber::ready) state) {
    running->state = state;
    leave();
  }

  // The switches tell AddressSanitizer which stack is in use.
  void resume(Fiber& fiber) {
    running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_, fiber.stack.get(), kStack);
#endif
    swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
  }

  void leave() {
    Fiber* self = running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(self->state == Fiber::done ? nullptr : &self->fake_stack, bottom_, size_);
#endif
    swapcontext(&self->context, &scheduler);
    arrived();
  }

  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(running->fake_stack, &bottom_, &size_);
#endif
  }

  std::vector<size_t> next_order(std::mt19937& random) {
    std::vector<size_t> order(fibers.size());
    for (size_t t = 0; t < order.size(); ++t) order[t] = t;
    const int which = schedule();
    if (which == descending || which == warps_descending) std::reverse(order.begin(), order.end());
    if (which == shuffled) std::shuffle(order.begin(), order.end(), random);
    if (which == warps_ascending || which == warps_descending)  // one warp as far as it gets, then the next
      for (size_t t : order)
        if (fibers[t].state == Fiber::ready) {
          const size_t warp = t / 32;
          std::stable_partition(order.begin(), order.end(), [&](size_t o) { return o / 32 == warp; });
          order.resize(std::min<size_t>(32, fibers.size() - warp * 32));
          break;
        }
    return order;
  }

  bool release_block() {
    int line = 0;
    size_t first = 0;
    for (size_t t = 0; t < fibers.size(); ++t) {
      const Fiber& fiber = fibers[t];
      if (fiber.state == Fiber::done) continue;
      if (fiber.state != Fiber::at_barrier) return false;
      if (line != 0 && fiber.line != line)
        throw std::runtime_error("threads " + std::to_string(first) + " and " + std::to_string(t) +
                                 " wait at different barriers, lines " + std::to_string(line) + " and " +
                                 std::to_string(fiber.line));
      if (line == 0) line = fiber.line, first = t;
    }
    if (line == 0) return false;
    for (Fiber& fiber : fibers)
      if (fiber.state == Fiber::at_barrier) {
        fiber.state = Fiber::ready;
      } else {
        throw std::runtime_error("a thread has returned before a barrier that others wait at, line " + std::to_string(line));
      }
    return true;
  }

  // Lets the lanes go on that wait for each other, once all of them have come.
  void release_warp(size_t warp) {
    const size_t base = warp * 32, end = std::min(base + 32, fibers.size());
    for (size_t t = base; t < end; ++t) {
      if (fibers[t].state != Fiber::at_warp) continue;
      const unsigned lanes = fibers[t].lanes;
      bool all = true;
      for (size_t lane = 0; lane < 32 && all; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        if (base + lane >= end || fibers[base + lane].state == Fiber::done)
          throw std::runtime_error("a warp waits for a lane that has returned, line " + std::to_string(fibers[t].line));
        const Fiber& other = fibers[base + lane];
        if (other.state != Fiber::at_warp) {
          all = false;
        } else if (other.line != fibers[t].line || other.lanes != lanes) {
          throw std::runtime_error("lanes of a warp meet at different lines, " + std::to_string(fibers[t].line) + " and " +
                                   std::to_string(other.line));
        }
      }
      if (!all) continue;
      for (size_t lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1) fibers[base + lane].state = Fiber::ready;
    }
  }

#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

template <class Kernel, class Args>
void launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, const Args& args) {
  std::unique_ptr<Block> state = std::move(Block::spare());  // its stacks are many megabytes; a failure leaves it to ruin
  if (!state) state.reset(new Block);
  Block::current() = state.get();
  const std::function<void()> body = [&] { kernel(args); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) state->run(dim3(x, y, z), block, grid, shared_bytes, body);
  Block::current() = nullptr;
  Block::spare() = std::move(state);
}

inline Block& here() { return *Block::current(); }

}  // namespace shim
}  // namespace sae_fast

#define threadIdx (::sae_fast::shim::here().running->index)
#define blockIdx (::sae_fast::shim::here().block_index)
#define blockDim (::sae_fast::shim::here().block_dim)
#define gridDim (::sae_fast::shim::here().grid_dim)
#define __syncthreads() ::sae_fast::shim::here().barrier(__LINE__)
#define __syncwarp(...) ::sae_fast::shim::here().meet(0xffffffffu, __LINE__)
#define __shfl_sync(lanes, value, lane) ::sae_fast::shim::here().exchange(lanes, value, lane, __LINE__)
#define __shfl_xor_sync(lanes, value, bits) \
  ::sae_fast::shim::here().exchange(lanes, value, int(::sae_fast::shim::here().thread() % 32) ^ (bits), __LINE__)
#define __ballot_sync(lanes, predicate) ::sae_fast::shim::ballot(lanes, predicate, __LINE__)

namespace sae_fast {
namespace shim {

inline unsigned ballot(unsigned lanes, bool predicate, int line) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) votes |= unsigned(here().exchange(lanes, int(predicate), lane, line)) << lane;
  return votes;
}

}  // namespace shim

namespace gpu {

using Half = _Float16;
struct Bfloat {
  uint16_t bits;
};
using Stream = void*;

inline unsigned char* shared() {  // 16-byte aligned: operator new gives no less
  return shim::here().shared_memory.get();
}

inline float to_float(float a) { return a; }
inline float to_float(Half a) { return a; }
inline float to_float(Bfloat a) {
  const uint32_t bits = uint32_t(a.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
template <class T>
T from_float(float a);
template <>
inline float from_float<float>(float a) { return a; }
template <>
inline Half from_float<Half>(float a) { return static_cast<Half>(a); }
template <>
inline Bfloat from_float<Bfloat>(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  if (a != a) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes < 0 || bytes > 16)
    shim::here().fail("an asynchronous copy is not of 16 aligned bytes", 0);
  shim::Copy copy{to, std::vector<unsigned char>(16, 0)};
  if (bytes) std::memcpy(copy.bytes.data(), from, bytes);
  std::memset(to, 0xff, 16);
  shim::here().running->open.push_back(std::move(copy));
}
inline void commit() {
  auto& fiber = *shim::here().running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int Left>
void wait() {
  auto& groups = shim::here().running->groups;
  while (groups.size() > Left) {
    for (shim::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes.data(), 16);
    groups.erase(groups.begin());
  }
}

}  // namespace gpu
}  // namespace sae_fast

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int atomicOr(int* at, int bits) {
  const int before = *at;
  *at |= bits;
  return before;
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  const unsigned before = *at;
  *at |= bits;
  return before;
}
using std::fmaxf;
using std::fminf;
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
