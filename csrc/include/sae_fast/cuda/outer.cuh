// outer: rows of a weight gradient, or of runs of long features, written out.
#pragma once
#include "sae_fast/cuda/gradient_row.cuh"

namespace sae_fast {
namespace gpu {

// How warps share out items of d columns.
struct Share {
  static constexpr int kWarps = 4;
  int across;  // warps of a block beside each other on one item (1, 2 or 4); the others have items of their own
  int lanes;   // of a warp on one row: fewer than 32 where d is small

  Share(int64_t d, int columns) : across(1), lanes(1) {  // `columns` to a lane
    while (lanes < kWarp && lanes * columns < d) lanes *= 2;
    while (across < kWarps && across * kWarp * columns < d) across *= 2;
  }
  dim3 grid(int64_t items, int64_t d, int columns) const {  // slices of columns change last: theirs of A stays in the L2 cache
    const int64_t together = kWarps / across, wide = across * kWarp * columns;
    return dim3((items + together - 1) / together, (d + wide - 1) / wide);
  }
  __device__ int64_t item() const {
    const int warp = threadIdx.x / kWarp;
    return int64_t(blockIdx.x) * (kWarps / across) + warp / across;
  }
  __device__ int first_column(int columns) const {
    const int warp = threadIdx.x / kWarp;
    return (blockIdx.y * across + warp % across) * kWarp * columns;
  }
};

template <class V, class X>
struct Partials {
  Gradient<V, X> gradient;  // without first and partials
  const int64_t *owner, *first;
  float* out;  // [M, d]
  int64_t M, first_feature, last_feature, run;
  Share share;
};

template <int S, bool kVector, class V, class X>
__global__ void __launch_bounds__(128, 1) partials_kernel(const Partials<V, X> a) {
  constexpr int N = 16 / sizeof(X);
  const int64_t p = a.share.item();
  const int lane = threadIdx.x % kWarp, d = a.gradient.d;
  int column = a.share.first_column(N);
  if (p >= a.M || column >= d) return;
  const int64_t f = a.owner[p];
  if (f < a.first_feature || f >= a.last_feature) return;
  const int64_t begin = a.gradient.colptr[f] + (p - a.first[f]) * a.run, last = a.gradient.colptr[f + 1];
  const int64_t end = begin + a.run < last ? begin + a.run : last;
  column += lane % a.share.lanes * N;
  float sum[1][N] = {};
  if (a.share.lanes < kWarp) {
    add_narrow<S, kVector>(a.gradient, begin, end, column, a.share.lanes, sum);
    if (lane >= a.share.lanes) return;
  } else {
    add_run<S, kVector>(a.gradient, begin, end, column, sum);
  }
  store<kVector>(a.out + p * d, column, d, sum[0]);
}

// O: storage of the rows that are written.
template <class T, class O>
struct Outer {
  Gradient<T, T> gradient;
  const int64_t* features;  // [n] or null: first_feature …
  O* out;                   // [n, d]
  int64_t n, first_feature;
  bool accumulate;
  Share share;
};

template <int S, bool kVector, class T, class O>
__global__ void __launch_bounds__(128, 1) outer_kernel(const Outer<T, O> a) {
  constexpr int N = 16 / sizeof(T);
  const int64_t i = a.share.item();
  const int lane = threadIdx.x % kWarp, d = a.gradient.d;
  int column = a.share.first_column(N);
  if (i >= a.n || column >= d) return;
  const int64_t f = a.features ? a.features[i] : a.first_feature + i;
  const int64_t begin = a.gradient.colptr[f], end = a.gradient.colptr[f + 1];
  if (a.accumulate && begin == end) return;
  column += lane % a.share.lanes * N;
  float sum[1][N] = {};
  if (!add_partials<kVector>(a.gradient, f, column, sum)) {
    if (a.share.lanes < kWarp) {
      add_narrow<S, kVector>(a.gradient, begin, end, column, a.share.lanes, sum);
    } else {
      add_run<S, kVector>(a.gradient, begin, end, column, sum);
    }
  }
  if (lane >= a.share.lanes) return;
  if (a.accumulate) {
    const Columns<O, N> before = load<kVector, N>(a.out + i * d, column, d);
#pragma unroll
    for (int k = 0; k < N; ++k) sum[0][k] += to_float(before.values[k]);
  }
  store<kVector>(a.out + i * d, column, d, sum[0]);
}

}  // namespace gpu
}  // namespace sae_fast
