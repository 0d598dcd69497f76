// Tiny kernels, right and wrong, for tests/native/test_cuda_shim.py: what the shim has to see.
#include "sae_fast/cuda/launch.cuh"

namespace sae_fast {
namespace gpu {

struct Trial {
  const float* in;  // [128]
  float* out;       // [128]
};

__device__ float* memory() { return reinterpret_cast<float*>(shared()); }

// Each thread's neighbour's number, by way of shared memory.
void neighbours(Trial a) {
  memory()[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = memory()[(threadIdx.x + 1) % 128];
}
void missing_barrier(Trial a) {
  memory()[threadIdx.x] = a.in[threadIdx.x];
  a.out[threadIdx.x] = memory()[(threadIdx.x + 1) % 128];
}
void reduction(Trial a) { a.out[threadIdx.x] = warp_sum(a.in[threadIdx.x]); }
void votes(Trial a) { a.out[threadIdx.x] = float(__ballot_sync(kAll, threadIdx.x % 3 == 0)); }
void some_lanes(Trial a) {  // a divergent part, whose lanes name each other only
  if (threadIdx.x % 32 < 16) a.out[threadIdx.x] = __shfl_sync(0xffffu, a.in[threadIdx.x], 3);
}

void skipped_barrier(Trial a) {
  if (threadIdx.x != 5) __syncthreads();
}
void returned_before_barrier(Trial a) {
  if (threadIdx.x >= 64) return;
  __syncthreads();
}
void different_barriers(Trial a) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void deadlock(Trial a) {  // half a warp waits for the block, the others for their warp
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
void lane_outside_the_mask(Trial a) {
  if (threadIdx.x % 32 < 16) a.out[threadIdx.x] = __shfl_sync(0xffffu, a.in[threadIdx.x], 20);
}
void lane_not_in_its_own_mask(Trial a) { a.out[threadIdx.x] = __shfl_sync(0xffffu, a.in[threadIdx.x], 3); }
void divergent_shuffle(Trial a) {
  if (threadIdx.x % 32 < 16) a.out[threadIdx.x] = __shfl_sync(kAll, a.in[threadIdx.x], 3);
}
void shuffles_at_different_lines(Trial a) {
  if (threadIdx.x % 32 < 16) {
    a.out[threadIdx.x] = __shfl_sync(kAll, a.in[threadIdx.x], 3);
  } else {
    a.out[threadIdx.x] = __shfl_sync(kAll, a.in[threadIdx.x], 4);
  }
}

// A thread copies four numbers and gives them back.
void copied(Trial a) {
  const int k = threadIdx.x * 4 % 128;
  if (threadIdx.x >= 32) return;
  copy_async(memory() + k, a.in + k, 8);
  commit();
  wait<0>();
  for (int e = 0; e < 4; ++e) a.out[k + e] = memory()[k + e];
}
void not_waited_for(Trial a) {
  if (threadIdx.x >= 32) return;
  const int k = threadIdx.x * 4;
  copy_async(memory() + k, a.in + k, 16);
  commit();
  wait<1>();
  for (int e = 0; e < 4; ++e) a.out[k + e] = memory()[k + e];
}
void not_committed(Trial a) {
  if (threadIdx.x >= 32) return;
  const int k = threadIdx.x * 4;
  copy_async(memory() + k, a.in + k, 16);
  wait<0>();
  for (int e = 0; e < 4; ++e) a.out[k + e] = memory()[k + e];
}
void another_s_copy(Trial a) {  // waited for by its own thread, with no barrier for the others
  if (threadIdx.x == 0) copy_async(memory(), a.in, 16);
  commit();
  wait<0>();
  a.out[threadIdx.x] = memory()[threadIdx.x % 4];
}
void misaligned_copy(Trial a) { copy_async(memory() + threadIdx.x, a.in, 16); }

// What a block leaves in shared memory is not there for the next.
void fresh_memory(Trial a) {
  if (blockIdx.x == 1) a.out[threadIdx.x] = memory()[threadIdx.x];
  memory()[threadIdx.x] = 1.0f;
}
void past_shared_memory(Trial a) { memory()[threadIdx.x + 4] = 1.0f; }  // for the sanitizer: 16 bytes of 512 too far

}  // namespace gpu
}  // namespace sae_fast

using namespace sae_fast;

// "" or what the shim says.
extern "C" const char* trial(const char* name, int schedule, const float* in, float* out) {
  static std::string said;
  said.clear();
  shim::Block::schedule() = schedule;
  const auto run = [&](void (*kernel)(gpu::Trial), int blocks = 1) {
    try {
      gpu::launch("trial", "", kernel, dim3(blocks), 128, 512, nullptr, gpu::Trial{in, out});
    } catch (const std::exception& error) {
      said = error.what();
    }
  };
  const std::string wanted = name;
#define TRIAL(kernel, ...) \
  if (wanted == #kernel) return run(gpu::kernel, ##__VA_ARGS__), said.c_str();
  TRIAL(neighbours) TRIAL(missing_barrier) TRIAL(reduction) TRIAL(votes) TRIAL(some_lanes) TRIAL(skipped_barrier)
  TRIAL(returned_before_barrier) TRIAL(different_barriers) TRIAL(deadlock) TRIAL(lane_outside_the_mask)
  TRIAL(lane_not_in_its_own_mask) TRIAL(divergent_shuffle) TRIAL(shuffles_at_different_lines) TRIAL(copied)
  TRIAL(not_waited_for) TRIAL(not_committed) TRIAL(another_s_copy) TRIAL(misaligned_copy) TRIAL(fresh_memory, 2)
  TRIAL(past_shared_memory)
  return "no such trial";
}
