// transpose: the entries of a code by feature, without a sort and without atomics on global memory.  kernels/transpose.py.
//
// A block owns 256 examples and 2048 features, and marks a bit for each of its entries in shared memory, in words of 32
// examples: a feature's bits are its count, and those before an example's own the entries that come before it.  Counts are all
// that goes to global memory; the block that places the entries marks them anew.
#pragma once
#include "sae_fast/cuda/device.cuh"
#include "sae_fast/cuda/ops.hpp"

namespace sae_fast {
namespace gpu {

struct Transposition {
  const int64_t *begin, *end;  // [B]
  const int32_t* indices;      // [C]
  int32_t* counts;             // [chunks, F]: of a chunk's entries; from scan on of those in the chunks before
  int64_t* colptr;             // [F + 1]
  int32_t* rows;               // [C]
  int64_t* perm;               // [C]
  int64_t B, features, chunks;

  static constexpr int kThreads = 256, kRows = kCountedRows, kWords = kRows / kWarp, kFeatures = 2048;
  static constexpr size_t kShared = kWords * kFeatures * sizeof(unsigned);
};

// use(row, f, at) for every entry of the block's examples and features, of which row and f count; warp w takes the rows of
// word w, eight loads at a time.
template <class Use>
__device__ __forceinline__ void each_entry(const Transposition& a, const Use& use) {
  constexpr int kTogether = 4, kDeep = 2;
  static_assert(Transposition::kThreads == Transposition::kRows, "a thread looks up a row");
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int32_t first_feature = blockIdx.x * Transposition::kFeatures;
  const int64_t b = static_cast<int64_t>(blockIdx.y) * Transposition::kRows + threadIdx.x;
  const int64_t begin = b < a.B ? a.begin[b] : 0;
  const int length = b < a.B ? static_cast<int>(a.end[b] - begin) : 0;
  for (int r = 0; r < kWarp; r += kTogether) {
    int64_t begins[kTogether];
    int lengths[kTogether], longest = 0;
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      begins[q] = __shfl_sync(kAll, begin, r + q);
      lengths[q] = __shfl_sync(kAll, length, r + q);
      longest = lengths[q] > longest ? lengths[q] : longest;
    }
    for (int first = lane; first - lane < longest; first += kDeep * kWarp) {
      int32_t f[kTogether][kDeep];
#pragma unroll
      for (int q = 0; q < kTogether; ++q)
#pragma unroll
        for (int p = 0; p < kDeep; ++p) {
          const int k = first + p * kWarp;
          f[q][p] = k < lengths[q] ? a.indices[begins[q] + k] - first_feature : -1;
        }
#pragma unroll
      for (int q = 0; q < kTogether; ++q)
#pragma unroll
        for (int p = 0; p < kDeep; ++p)
          if (f[q][p] >= 0 && f[q][p] < Transposition::kFeatures)
            use(warp * kWarp + r + q, f[q][p], begins[q] + first + p * kWarp);
    }
  }
}

// marks [kWords, kFeatures] of the block's entries.
__device__ __forceinline__ unsigned* mark(const Transposition& a) {
  unsigned* marks = reinterpret_cast<unsigned*>(shared());
  constexpr int kPackets = Transposition::kWords * Transposition::kFeatures / Packet<unsigned>::n;
  for (int k = threadIdx.x; k < kPackets; k += Transposition::kThreads) reinterpret_cast<Packet<unsigned>*>(marks)[k] = {};
  __syncthreads();
  each_entry(a, [&](int row, int f, int64_t) {
    // Atomic, as a word's rows may come from several lanes at once; which comes first does not matter.
    atomicOr(marks + row / kWarp * Transposition::kFeatures + f, 1u << row % kWarp);
  });
  __syncthreads();
  return marks;
}

// A grid of (ranges of features, chunks of examples), as for place_kernel.
__global__ void __launch_bounds__(256) count_kernel(const Transposition a) {
  const unsigned* marks = mark(a);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Transposition::kFeatures;
  for (int f = threadIdx.x; f < Transposition::kFeatures && first + f < a.features; f += Transposition::kThreads) {
    int count = 0;
#pragma unroll
    for (int w = 0; w < Transposition::kWords; ++w) count += __popc(marks[w * Transposition::kFeatures + f]);
    a.counts[blockIdx.y * a.features + first + f] = count;
  }
}

// A thread takes a feature: its counts become those of the chunks before, their sum goes to colptr.
__global__ void __launch_bounds__(256) scan_kernel(const Transposition a) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * Transposition::kThreads + threadIdx.x;
  if (f >= a.features) return;
  constexpr int kTogether = 8;
  int32_t total = 0;
  for (int64_t first = 0; first < a.chunks; first += kTogether) {
    int32_t counts[kTogether];
#pragma unroll
    for (int q = 0; q < kTogether; ++q) counts[q] = first + q < a.chunks ? a.counts[(first + q) * a.features + f] : 0;
#pragma unroll
    for (int q = 0; q < kTogether; ++q) {
      if (first + q < a.chunks) a.counts[(first + q) * a.features + f] = total;
      total += counts[q];
    }
  }
  a.colptr[f + 1] = total;
  if (f == 0) a.colptr[0] = 0;
}

// With colptr summed up.
__global__ void __launch_bounds__(256) place_kernel(const Transposition a) {
  const unsigned* marks = mark(a);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Transposition::kFeatures;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * Transposition::kRows;
  each_entry(a, [&](int row, int f, int64_t at) {
    const int word = row / kWarp;
    int before = __popc(marks[word * Transposition::kFeatures + f] & ((1u << row % kWarp) - 1));
    for (int w = 0; w < word; ++w) before += __popc(marks[w * Transposition::kFeatures + f]);
    const int64_t to = a.colptr[first + f] + a.counts[blockIdx.y * a.features + first + f] + before;
    a.rows[to] = static_cast<int32_t>(first_row + row);
    a.perm[to] = at;
  });
}

}  // namespace gpu
}  // namespace sae_fast
