// weight_step: a gradient row, its projection, Adam and renormalisation in one visit of a weight row.  A block takes a slice
// of 512 columns of it, or all of a unit row; gradient and weight stay in registers.  Unit rows whose ⟨gradient, row⟩ is
// known by entry go by slices too, and leave the squares of each for a pass that divides.  MATH.md §2, §12.
#pragma once
#include "sae_fast/cuda/gradient_row.cuh"

namespace sae_fast {
namespace gpu {

// kernels/weight_step.py's _advance has written the decay of every row, −1 of one that rests.
template <class X>
struct WeightStep {
  Gradient<float, X> gradient;
  float *W, *m, *v;        // [n, d]; m or null
  const float* decay;      // [n]
  const float* own;        // [n] or null
  const float* constants;  // kernels/weight_step.py's Constants
  const float* scale;      // 0-d or null
  const void* skip;        // 0-d integer of skip_bytes, or null
  Half* shadow;            // [n, K] or null
  float* norms;            // [n, norm_columns]
  const float* along;      // [C]: an entry's part of ⟨gradient, row⟩, to be taken off; or null
  float* squares;          // [n, slices] or null
  int64_t n, first_feature, K, norm_columns;
  int skip_bytes;

  static constexpr int kColumns = 4;                   // of a piece: 16 bytes of W and v
  static constexpr int kSlice = kStepColumns;          // four warps with a piece a lane
  static constexpr int kWarps = 16;                    // of a block, at most
  static_assert(kSlice == 4 * kWarp * kColumns && kUnitColumns == 4 * kWarps * kWarp * kColumns, "up to four pieces a lane");
};

__device__ __forceinline__ bool is_set(const void* skip, int bytes) {
  if (!skip) return false;
  if (bytes == 1) return *static_cast<const int8_t*>(skip) != 0;
  if (bytes == 2) return *static_cast<const int16_t*>(skip) != 0;
  if (bytes == 4) return *static_cast<const int32_t*>(skip) != 0;
  return *static_cast<const int64_t*>(skip) != 0;
}

// The sums of N numbers over the block, in the same order for every thread that reads them.  `memory`: [warps, N], used once.
template <int N>
__device__ __forceinline__ void block_sums(float (&a)[N], float* memory) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const float sum = warp_sums(a);
  if (lane % (kWarp / N) == 0) memory[warp * N + lane / (kWarp / N)] = sum;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) {
    a[k] = 0.0f;
    for (int w = 0; w < warps; ++w) a[k] += memory[w * N + k];
  }
}

// The first moment, from the nearer end, as torch's lerp; below the normal numbers 0, or a row that rests would never be left
// alone.
__device__ __forceinline__ float lerp(float m, float g, const float* constants) {
  const bool near = constants[7] > 0.5f;
  const float start = near ? m : g, first = start + constants[near ? 8 : 7] * ((near ? g : m) - start);
  return -0x1p-126f < first && first < 0x1p-126f ? 0.0f : first;
}

// P pieces a lane.
template <int S, int P, bool kUnit, bool kVector, class X>
__global__ void __launch_bounds__(kUnit ? 512 : 128, 1) weight_step_kernel(const WeightStep<X> a) {
  constexpr int N = WeightStep<X>::kColumns, kApart = kWarp * N;
  if (is_set(a.skip, a.skip_bytes)) return;
  const int d = a.gradient.d;
  const int64_t i = blockIdx.x, f = a.first_feature + i, element = i * d;
  int64_t begin = a.gradient.colptr[f];
  const int64_t end = a.gradient.colptr[f + 1];
  const float decay = a.decay[i];
  if (decay < 0.0f) return;
  const bool touched = begin != end;
  const int warp = blockIdx.y * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  const int column = warp * (P * kApart) + threadIdx.x % kWarp * N;  // of the first piece
  if (warp * (P * kApart) >= d) {  // past the end of the row: it has only barriers to keep
    if (!a.shadow && !a.squares) return;
    begin = end;
  }
  float own = a.own && touched ? a.own[i] : 0.0f;
  if (!kUnit && a.along) {  // what the coefficient gives is along the row
    float sum = 0.0f;
#pragma unroll 1
    for (int64_t j = begin + threadIdx.x % kWarp; j < end; j += kWarp) sum += a.along[a.gradient.perm[j]];
    own = -warp_sum(sum);
  }
  Columns<float, N> before[P], moment[P];  // fetched before the entries are walked, which takes a while
#pragma unroll
  for (int p = 0; p < P; ++p) {
    before[p] = load<kVector, N>(a.W + element, column + p * kApart, d);
    moment[p] = load<kVector, N>(a.v + element, column + p * kApart, d);
  }
  float g[P][N] = {}, W[P][N];
  if (!add_partials<kVector>(a.gradient, f, column, g)) add_run<S, kVector>(a.gradient, begin, end, column, g);
  const float scale = a.scale ? *a.scale : 1.0f;
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool inside = column + p * kApart + k < d;
      W[p][k] = inside ? before[p].values[k] : 0.0f;
      if (a.own || a.along) g[p][k] += own * W[p][k];
      g[p][k] = inside ? g[p][k] * scale : 0.0f;
    }
  }

  float* memory = reinterpret_cast<float*>(shared());
  if (kUnit) {  // without the component along W
    float dots[2] = {};
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int k = 0; k < N; ++k) dots[0] += W[p][k] * W[p][k], dots[1] += g[p][k] * W[p][k];
    }
    block_sums(dots, memory);
    const float along = dots[0] > 0.0f ? __fdiv_rn(dots[1], dots[0]) : 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int k = 0; k < N; ++k) g[p][k] -= along * W[p][k];
    }
  }

  const float size = a.constants[0], eps = a.constants[1], fresh = a.constants[3], correction = a.constants[4];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    float v[N], first[N];
#pragma unroll
    for (int k = 0; k < N; ++k) first[k] = g[p][k];
    if (a.m) {
      const Columns<float, N> before = load<kVector, N>(a.m + element, column + p * kApart, d);
#pragma unroll
      for (int k = 0; k < N; ++k) first[k] = lerp(before.values[k], first[k], a.constants);
      store<kVector>(a.m + element, column + p * kApart, d, first);
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const bool inside = column + p * kApart + k < d;
      v[k] = decay * moment[p].values[k] + fresh * g[p][k] * g[p][k];
      W[p][k] -= inside ? __fdiv_rn(size * first[k], __fsqrt_rn(v[k]) * correction + eps) : 0.0f;
    }
    store<kVector>(a.v + element, column + p * kApart, d, v);
  }

  if (kUnit) {
    float norm2[1] = {};
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int k = 0; k < N; ++k) norm2[0] += W[p][k] * W[p][k];
    }
    block_sums(norm2, memory + 2 * WeightStep<X>::kWarps);
    const float by = norm2[0] > 0.0f ? __fdiv_rn(1.0f, __fsqrt_rn(norm2[0])) : 1.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
#pragma unroll
      for (int k = 0; k < N; ++k) W[p][k] *= by;
    }
  }
#pragma unroll
  for (int p = 0; p < P; ++p) store<kVector>(a.W + element, column + p * kApart, d, W[p]);

  if (!kUnit && a.squares) {
    float square[1] = {};
#pragma unroll
    for (int k = 0; k < N; ++k) square[0] += W[0][k] * W[0][k];
    block_sums(square, memory);
    if (threadIdx.x == 0) a.squares[i * gridDim.y + blockIdx.y] = square[0];
  }
  if (kUnit || !a.shadow) return;
  // The slice's part of the 16-bit copy, and the squares of what it holds and of what rounding took.
  float* norms = a.norms + i * a.norm_columns;
  const float to_half = norms[0];
  float sums[2] = {}, scaled[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    scaled[k] = W[0][k] * to_half;
    const float lost = scaled[k] - to_float(from_float<Half>(scaled[k]));
    sums[0] += scaled[k] * scaled[k], sums[1] += lost * lost;
  }
  store<kVector>(a.shadow + i * a.K, column, d, scaled);
  block_sums(sums, memory);
  if (threadIdx.x < 2) norms[1 + 2 * blockIdx.y + threadIdx.x] = threadIdx.x == 0 ? sums[0] : sums[1];
}

}  // namespace gpu
}  // namespace sae_fast
