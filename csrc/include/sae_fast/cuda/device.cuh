// What the kernels use of a GPU, and nothing else, so that the same kernels run where there is none: nvcc gives it, or the
// tests' shim (tests/cuda_shim/shim.hpp), in which every thread is a fiber.
//
// Kernels take one struct of raw pointers and sizes by value.  All shared memory is dynamic: shared().
#pragma once
#include <cstdint>

#ifdef SAE_FAST_SHIM
#include "shim.hpp"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sae_fast {
namespace gpu {

using Half = __half;
using Bfloat = __nv_bfloat16;
using Stream = cudaStream_t;

__device__ __forceinline__ unsigned char* shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(Half a) { return __half2float(a); }
__device__ __forceinline__ float to_float(Bfloat a) { return __bfloat162float(a); }
template <class T>
__device__ __forceinline__ T from_float(float a);
template <>
__device__ __forceinline__ float from_float<float>(float a) { return a; }
template <>
__device__ __forceinline__ Half from_float<Half>(float a) { return __float2half_rn(a); }
template <>
__device__ __forceinline__ Bfloat from_float<Bfloat>(float a) { return __float2bfloat16_rn(a); }

// Copies of 16 bytes from global to shared memory that do not wait.  `bytes` (0 … 16) are read, zeros fill the rest.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes) {
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
// Closes a group of copies.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until no more than `Left` of this thread's groups are under way.  Other threads see them after a barrier.
template <int Left>
__device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory"); }

}  // namespace gpu
}  // namespace sae_fast
#endif

namespace sae_fast {
namespace gpu {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;  // lanes

// 16 bytes of storage, loaded at once.
template <class T>
struct alignas(16) Packet {
  static constexpr int n = 16 / sizeof(T);
  T values[n];
};

// The sums of N numbers over a warp's lanes, each by a tree of pairs: lane l returns that of number l / (32 / N).  Every step
// halves what a lane still has to send, so that N sums take little more than one.
template <int N>
__device__ __forceinline__ float warp_sums(float (&a)[N]) {
  const int lane = threadIdx.x % kWarp;
  int bit = kWarp / 2;
#pragma unroll
  for (int n = N / 2; n > 0; n /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int q = 0; q < n; ++q) {
      const float send = upper ? a[q] : a[q + n], keep = upper ? a[q + n] : a[q];
      a[q] = keep + __shfl_xor_sync(kAll, send, bit);
    }
    bit /= 2;
  }
#pragma unroll
  for (; bit > 0; bit /= 2) a[0] += __shfl_xor_sync(kAll, a[0], bit);
  return a[0];
}

__device__ __forceinline__ float warp_sum(float a) {
  float one[1] = {a};
  return warp_sums(one);
}

}  // namespace gpu
}  // namespace sae_fast
