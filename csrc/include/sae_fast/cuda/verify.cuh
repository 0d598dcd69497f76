// verify: u of every candidate again, by a float32 dot in a fixed order; what is no member falls out.  kernels/compact.py.
//
// A block takes an example, whose x it stages in shared memory; a warp takes a few rows of W at a time, so that their loads are
// under way together.  Lane l sums the columns of every l-th packet of 16 bytes, whether they can be loaded as one or not, and
// the lanes' sums meet in a tree: u hangs on d and the storage, and neither on a candidate's place nor on alignment.
#pragma once
#include "sae_fast/cuda/device.cuh"

#include "sae_fast/activation.hpp"

namespace sae_fast {
namespace gpu {

// T: storage of x and W; O: of the vectors and outputs.  With norms (of round_rows) x and W are scaled copies in 16 bits.
template <class T, class O>
struct Verify {
  const T *x, *W;                                   // [rows, d], [F, d]
  const float *x_norms, *W_norms;                   // [rows, ·], [F, ·], each row's scale first; null: exact
  const O *bias, *cut, *first, *second;             // [F], or null where not needed: no cut is 0; the activation's vectors
  const int64_t *begin, *end;                       // [rows]
  const int32_t* candidates;                        // [C]
  int32_t* indices;                                 // [C]
  O *u, *values;                                    // [C], [V, C]
  int64_t* end_out;                                 // [rows]
  int64_t rows, d, x_norm_columns, W_norm_columns, capacity;
  Activation kind;

  static constexpr int kThreads = 128, kWarps = kThreads / kWarp, kEntries = kThreads, kTogether = 4;
  static constexpr int kBlock = kWarp * Packet<T>::n;  // columns that a warp reads of a row at once
  static constexpr int kStaged = 11 * 1024;            // the widest row in shared memory: 44 KiB, which needs no permission
  static size_t shared_bytes(int64_t d) {
    return (kEntries + kWarps + (d > kStaged ? 0 : (d + kBlock - 1) / kBlock * kBlock)) * sizeof(float);
  }
};

// A packet of a row of which `left` columns are left: zeros past its end.
template <bool ALIGNED, class T>
__device__ __forceinline__ Packet<T> load_packet(const T* from, int64_t left) {
  if constexpr (ALIGNED) {
    return *reinterpret_cast<const Packet<T>*>(from);  // whole: d is a multiple of its length
  } else {
    Packet<T> out;
#pragma unroll
    for (int e = 0; e < Packet<T>::n; ++e) out.values[e] = e < left ? from[e] : from_float<T>(0.0f);
    return out;
  }
}

template <class T, class O, bool ALIGNED, bool STAGED>
__global__ void __launch_bounds__(128) verify_kernel(const Verify<T, O> a) {
  using V = Verify<T, O>;
  constexpr int n = Packet<T>::n, kEntries = V::kEntries, kWarps = V::kWarps, kTogether = V::kTogether, kBlock = V::kBlock;
  float* dots = reinterpret_cast<float*>(shared());      // [kEntries]
  int* found = reinterpret_cast<int*>(dots + kEntries);  // [kWarps]
  float* staged = dots + kEntries + kWarps;              // [d], within a block of columns [n / 4, kWarp, 4]
  const int64_t b = blockIdx.x, begin = a.begin[b];
  const int64_t end = a.end[b] > a.capacity ? begin : a.end[b];  // overflow: the row stays empty
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, d = static_cast<int>(a.d);
  const T* x = a.x + b * a.d;
  if constexpr (STAGED) {  // what a warp reads at once of the four columns that come next in each lane lies together
    for (int k = thread; k < (d + kBlock - 1) / kBlock * kBlock; k += V::kThreads) {
      const int place = k % kBlock / n * 4 + k % n / 4 * kWarp * 4 + k % 4;
      staged[k - k % kBlock + place] = k < d ? to_float(x[k]) : 0.0f;
    }
    __syncthreads();
  }
  const float x_scale = a.x_norms ? a.x_norms[b * a.x_norm_columns] : 1.0f;

  int64_t slot = begin;  // of the next member
  for (int64_t first = begin; first < end; first += kEntries) {
    const int count = static_cast<int>(end - first < kEntries ? end - first : kEntries);
    for (int j = warp * kTogether; j < count; j += kWarps * kTogether) {
      const T* W[kTogether];
      float sums[kTogether];
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        W[q] = a.W + a.candidates[first + (j + q < count ? j + q : count - 1)] * a.d;
        sums[q] = 0.0f;
      }
#pragma unroll 1  // more would cost registers, and blocks on a multiprocessor
      for (int k = lane * n; k < d; k += kBlock) {
        Packet<T> w[kTogether];
#pragma unroll
        for (int q = 0; q < kTogether; ++q) w[q] = load_packet<ALIGNED>(W[q] + k, d - k);
        alignas(16) float columns[n];
        if constexpr (STAGED) {
#pragma unroll
          for (int h = 0; h < n / 4; ++h)
            *reinterpret_cast<Packet<float>*>(columns + h * 4) =
                *reinterpret_cast<const Packet<float>*>(staged + (k - lane * n) + (h * kWarp + lane) * 4);
        } else {
          const Packet<T> packet = load_packet<ALIGNED>(x + k, d - k);
#pragma unroll
          for (int e = 0; e < n; ++e) columns[e] = to_float(packet.values[e]);
        }
#pragma unroll
        for (int e = 0; e < n; ++e)
#pragma unroll
          for (int q = 0; q < kTogether; ++q) sums[q] += columns[e] * to_float(w[q].values[e]);
      }
      const float dot = warp_sums(sums);
      const int q = lane / (kWarp / kTogether);
      if (lane % (kWarp / kTogether) == 0 && j + q < count) dots[j + q] = dot;
    }
    __syncthreads();

    // A thread takes an entry.  No thread comes back to write dots before all have passed the barrier below.
    const bool live = thread < count;
    const int32_t i = live ? a.candidates[first + thread] : 0;
    float u = live ? dots[thread] : 0.0f;
    if (a.W_norms) u = u / x_scale / a.W_norms[i * a.W_norm_columns];  // by powers of two
    const float pi = u + to_float(a.bias[i]), cut = a.cut ? to_float(a.cut[i]) : 0.0f;
    const bool member = live && (a.W_norms || !(pi <= cut));  // a NaN is one
    const unsigned votes = __ballot_sync(kAll, member);
    if (lane == 0) found[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1)), total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += found[w];
      total += found[w];
    }
    if (member) {
      const int64_t at = slot + before;
      float value = relu(pi);
      with_activation(a.kind, [&](auto kind) {
        const auto first = [&] { return to_float(a.first[i]); };
        const auto second = [&] { return to_float(a.second[i]); };
        if (decltype(kind)::value_sets == 2) a.values[a.capacity + at] = from_float<O>(value);
        value = decltype(kind)::magnitude(u, pi, value, first, second);
      });
      a.values[at] = from_float<O>(value);
      a.u[at] = from_float<O>(u);
      a.indices[at] = i;
    }
    slot += total;
  }
  if (thread == 0) a.end_out[b] = slot;
}

}  // namespace gpu
}  // namespace sae_fast
