// decode_loss: residuals of an example, then the dots of its decoder rows with them, of which each slice of 128 columns is
// staged in shared memory once; then the sums of the slices' dots, losses and value gradients.  MATH.md §2.
#pragma once
#include "sae_fast/activation.hpp"
#include "sae_fast/cuda/device.cuh"
#include "sae_fast/cuda/ops.hpp"
#include "sae_fast/cuda/penalty.cuh"

namespace sae_fast {
namespace gpu {

// T: storage of the values, W, b_dec and the residuals; X: of the target.  V value sets (magnitudes; gates).
template <class T, class X>
struct Residuals {
  const int64_t *begin, *end;  // [rows]
  const int32_t* indices;      // [C]
  const T* values;             // [V, C]
  const T* W;                  // [F, d]
  const T* b_dec;              // [d]
  const X* target;             // [rows, d]
  T* residuals;                // [V, rows, d]
  float* partials;             // [V, slices, C]
  float* squares;              // [rows, slices, 2]
  int64_t rows, d, slices, capacity;

  static constexpr int kThreads = 128, kColumns = kResidualColumns;
  static constexpr int kEntries = 96;  // staged at a time: 48 KiB of float32, four blocks on a multiprocessor
  static constexpr size_t kShared = kEntries * kColumns * sizeof(T) + (2 * kEntries + 2 * kColumns + 8) * sizeof(float);
};

template <class T, class X, int V>
__global__ void __launch_bounds__(128, 4) residuals_kernel(const Residuals<T, X> a) {
  using R = Residuals<T, X>;
  constexpr int kColumns = R::kColumns, kEntries = R::kEntries, kWarps = R::kThreads / kWarp;
  T* staged = reinterpret_cast<T*>(shared());                             // [kEntries, kColumns]
  float* value = reinterpret_cast<float*>(staged + kEntries * kColumns);  // [V, kEntries]
  float* r = value + 2 * kEntries;                                        // [V, kColumns]
  float* square = r + 2 * kColumns;                                       // [V, kWarps]
  const int64_t b = blockIdx.x, slice = blockIdx.y, first_column = slice * kColumns;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int64_t column = first_column + thread, begin = a.begin[b], end = a.end[b];
  const bool inside = column < a.d;

  // A warp copies a row at a time; columns past d become zeros.
  const bool aligned = a.d * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(a.W) % 16 == 0;
  const auto stage = [&](int64_t first, int n) {
    for (int j = warp; j < n; j += kWarps) {
      const T* row = a.W + a.indices[first + j] * a.d + first_column;
      T* to = staged + j * kColumns;
      if (aligned) {
        constexpr int kPacket = Packet<T>::n;
        for (int k = lane * kPacket; k < kColumns; k += kWarp * kPacket) {
          const bool any = first_column + k < a.d;  // then the whole packet is: d is a multiple of its length
          copy_async(to + k, any ? row + k : a.W, any ? 16 : 0);
        }
      } else {
        for (int k = lane; k < kColumns; k += kWarp) to[k] = first_column + k < a.d ? row[k] : from_float<T>(0.0f);
      }
    }
    commit();
    for (int j = thread; j < n; j += R::kThreads)
      for (int v = 0; v < V; ++v) value[v * kEntries + j] = to_float(a.values[v * a.capacity + first + j]);
    wait<0>();
    __syncthreads();
  };

  float sum[V] = {};
  for (int64_t first = begin; first < end; first += kEntries) {
    const int n = static_cast<int>(end - first < kEntries ? end - first : kEntries);
    if (first != begin) __syncthreads();
    stage(first, n);
#pragma unroll 4
    for (int j = 0; j < n; ++j) {
      const float w = to_float(staged[j * kColumns + thread]);
      for (int v = 0; v < V; ++v) sum[v] += value[v * kEntries + j] * w;
    }
  }
  const float constant = inside ? to_float(a.b_dec[column]) - to_float(a.target[b * a.d + column]) : 0.0f;
  for (int v = 0; v < V; ++v) {
    const float residual = sum[v] + constant;
    if (inside) a.residuals[(v * a.rows + b) * a.d + column] = from_float<T>(residual);
    r[v * kColumns + thread] = residual;
    const float total = warp_sum(residual * residual);
    if (lane == 0) square[v * kWarps + warp] = total;
  }
  __syncthreads();
  if (thread < V) {
    const float* s = square + thread * kWarps;
    a.squares[(b * a.slices + slice) * 2 + thread] = (s[0] + s[1]) + (s[2] + s[3]);
  }

  // A lane multiplies four columns of a few rows; its warp's sums come out eight at a time.
  constexpr int kTogether = 8 / V, kLaneColumns = kColumns / kWarp;
  for (int64_t first = begin; first < end; first += kEntries) {
    const int n = static_cast<int>(end - first < kEntries ? end - first : kEntries);
    if (end - begin > kEntries) {  // more rows than were staged at once: read again
      __syncthreads();
      stage(first, n);
    }
    for (int j = warp * kTogether; j < n; j += kWarps * kTogether) {
      float dots[8];
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        const int row = j + q < n ? j + q : n - 1;
        for (int v = 0; v < V; ++v) dots[v * kTogether + q] = 0.0f;
#pragma unroll
        for (int k = 0; k < kLaneColumns; ++k) {
          const float w = to_float(staged[row * kColumns + lane * kLaneColumns + k]);
          for (int v = 0; v < V; ++v) dots[v * kTogether + q] += w * r[v * kColumns + lane * kLaneColumns + k];
        }
      }
      const float dot = warp_sums(dots);
      const int which = lane / 4, v = which / kTogether, q = which % kTogether;
      if (lane % 4 == 0 && j + q < n) a.partials[(v * a.slices + slice) * a.capacity + first + j + q] = dot;
    }
  }
}

// The step's part of it (delta not null) is for a training step: kernels/decode_loss.py, StepOutputs.
template <class T>
struct Finish {
  const int64_t *begin, *end;  // [rows]
  const int32_t* indices;      // [C]
  const T *values, *cost;      // [V, C], [F] or null for 1
  const float *partials, *squares;
  float* losses;  // [rows, 3]
  T* grads;       // [V, C]
  const T *u, *bias, *first;            // [C], [F], [F]: the activation's first vector
  T *delta, *entries, *decoder, *along, *norms;  // [C], [C, 4], [C], [C], [C] or null
  int64_t rows, slices, capacity;
  float two, one;  // 2 / N and 1 / N
  Activation kind;
  bool auxiliary, zeros;
  Penalty penalty;
};

// An example's sum of a^p of its values, if its penalty is of that.
template <class T>
__device__ __forceinline__ double powers_of(const Penalty& a, const T* values, int64_t begin, int64_t end) {
  double sum = 0.0;
  if (!a.of_powers()) return sum;
  for (int64_t j = begin + threadIdx.x % kWarp; j < end; j += kWarp) sum += power(to_float(values[j]), a.number);
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAll, sum, bit);
  return sum;
}

template <class T, int V>
__global__ void __launch_bounds__(128) finish_kernel(const Finish<T> a) {
  const int64_t b = blockIdx.x * 4 + threadIdx.x / kWarp;  // a warp takes an example
  const int lane = threadIdx.x % kWarp;
  if (b >= a.rows) return;
  const int64_t end = a.end[b];
  const OfRow row = of_row(a.penalty, b, powers_of(a.penalty, a.values + (V - 1) * a.capacity, a.begin[b], end));
  const float slope = static_cast<float>(row.slope * a.one);
  float sparsity = 0.0f;
  for (int64_t j = a.begin[b] + lane; j < end; j += kWarp) {
    const int32_t i = a.indices[j];
    const float norm = a.cost ? to_float(a.cost[i]) : 1.0f, magnitude = to_float(a.values[j]);
    float dots[V];
    for (int v = 0; v < V; ++v) {
      dots[v] = 0.0f;
      for (int64_t s = 0; s < a.slices; ++s) dots[v] += a.partials[(v * a.slices + s) * a.capacity + j];
    }
    const float last = V == 2 ? to_float(a.values[a.capacity + j]) : magnitude;
    const OfEntry penalised = of_entry(a.penalty, a.zeros, last, a.two * dots[V - 1], slope, norm, a.one);
    const float g_gate = penalised.g, g_mag = V == 1 ? g_gate : magnitude == 0.0f && !a.zeros ? 0.0f : a.two * dots[0];
    if (V == 2) a.grads[a.capacity + j] = from_float<T>(g_gate);
    a.grads[j] = from_float<T>(g_mag);
    sparsity += penalised.own;
    if (a.norms) a.norms[j] = from_float<T>(penalised.of_norm);
    if (!a.delta) continue;
    a.decoder[j] = from_float<T>(a.two * magnitude);
    float along = magnitude * (a.two * dots[0]);
    if (V == 2 && a.auxiliary) along += last * (a.two * dots[V - 1]);
    a.along[j] = from_float<T>(along);
    const auto give = [&](const Pulled& pulled) {
      a.delta[j] = from_float<T>(pulled.u);
      const float four[4] = {pulled.u, pulled.bias, pulled.first, pulled.second};
      for (int k = 0; k < 4; ++k) a.entries[j * 4 + k] = from_float<T>(four[k]);
    };
    if (a.penalty.window != Window::none) {
      const float pi = to_float(a.u[j]) + to_float(a.bias[i]);
      const Estimate it = estimate(a.penalty, pi, to_float(a.first[i]), g_mag, slope);
      give({it.delta, it.delta, it.threshold, 0.0f});
      continue;
    }
    with_activation(a.kind, [&](auto kind) {
      using Kind = decltype(kind);
      if constexpr (Kind::value_sets == V) {
        give(Kind::pullback(to_float(a.u[j]), g_mag, g_gate, [&] { return to_float(a.first[i]); }));
      }
    });
  }
  const float total = warp_sum(sparsity);
  if (lane != 0) return;
  float squares[2] = {};
  for (int64_t s = 0; s < a.slices; ++s)
    for (int v = 0; v < V; ++v) squares[v] += a.squares[(b * a.slices + s) * 2 + v];
  a.losses[b * 3] = squares[0];
  a.losses[b * 3 + 1] = static_cast<float>(row.penalty + total);
  a.losses[b * 3 + 2] = squares[1];
}

}  // namespace gpu
}  // namespace sae_fast
