// Rows of a weight gradient: the sum of value · row of A over a feature's entries, in ascending order.  A warp owns a slice of
// columns, each lane a few neighbouring ones, and waits for no other warp.  The entries of a long feature are summed by runs
// (kernels/outer.py), each by warps of its own, and the feature's own warps add up what they found, in order.
#pragma once
#include <type_traits>

#include "sae_fast/cuda/storage.cuh"

namespace sae_fast {
namespace gpu {

// V: storage of the values; X: of the rows of A.  One source, or two (values2, A2).
template <class V, class X>
struct Gradient {
  const int64_t* colptr;  // [F + 1]
  const int32_t* rows;    // [C]
  const int64_t* perm;    // [C]
  const V* values;        // [C]
  const X* A;             // [B, d]
  const V* values2;
  const X* A2;
  const int64_t* first;   // [F + 1]: feature f owns the runs first[f] … first[f + 1]; or null
  const float* partials;  // [M, d]: the runs' sums
  int d;
};

// N neighbouring columns, moved at once.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Columns {
  T values[N];
};

// kVector: rows begin at multiples of 16 bytes and have a multiple of N columns; else column by column.  Nobody uses what is
// summed past the last column: there a vector load reads the last ones again, as one that always happens needs no branch.
template <bool kVector, int N, class T>
__device__ __forceinline__ Columns<T, N> load(const T* row, int column, int d) {
  if constexpr (kVector) {
    return *reinterpret_cast<const Columns<T, N>*>(row + (column < d ? column : d - N));
  } else {
    Columns<T, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.values[k] = column + k < d ? row[column + k] : from_float<T>(0.0f);
    return out;
  }
}

template <bool kVector, int N, class T>
__device__ __forceinline__ void store(T* row, int column, int d, const float (&a)[N]) {
  Columns<T, N> out;
#pragma unroll
  for (int k = 0; k < N; ++k) out.values[k] = from_float<T>(a[k]);
  if constexpr (kVector) {
    if (column < d) *reinterpret_cast<Columns<T, N>*>(row + column) = out;
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (column + k < d) row[column + k] = out.values[k];
  }
}

// sum += the entries begin … end.  A lane has P pieces of N columns, a warp's width of pieces apart.  Each lane fetches one of
// 32 entries, whose rows are then gathered by all of them, four pieces under way at a time.
template <int S, bool kVector, int P, int N, class V, class X>
__device__ __forceinline__ void add_run(const Gradient<V, X>& a, int64_t begin, int64_t end, int column, float (&sum)[P][N]) {
  constexpr int kRows = 4 / P;
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = begin; first < end; first += kWarp) {
    const int n = static_cast<int>(end - first < kWarp ? end - first : kWarp);
    int32_t row = 0;
    float value[S] = {};
    if (lane < n) {
      row = a.rows[first + lane];
      const int64_t entry = a.perm[first + lane];
      value[0] = to_float(a.values[entry]);
      if (S == 2) value[S - 1] = to_float(a.values2[entry]);
    }
    for (int j = 0; j < n; j += kRows) {
      Columns<X, N> got[kRows][S][P] = {};  // past the last entry: zeros times zero
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const int64_t start = int64_t(__shfl_sync(kAll, row, j + q)) * a.d;
        if (j + q >= n) continue;
#pragma unroll
        for (int p = 0; p < P; ++p) {
          got[q][0][p] = load<kVector, N>(a.A + start, column + p * (kWarp * N), a.d);
          if (S == 2) got[q][S - 1][p] = load<kVector, N>(a.A2 + start, column + p * (kWarp * N), a.d);
        }
      }
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const float v = __shfl_sync(kAll, value[s], j + q);
#pragma unroll
          for (int p = 0; p < P; ++p) {
#pragma unroll
            for (int k = 0; k < N; ++k) sum[p][k] += v * to_float(got[q][s][p].values[k]);
          }
        }
      }
    }
  }
}

// The same for rows that `lanes` lanes hold, a power of two: a warp takes as many rows at once as that leaves room for, and
// a tree adds up its lanes.
template <int S, bool kVector, int N, class V, class X>
__device__ __forceinline__ void add_narrow(const Gradient<V, X>& a, int64_t begin, int64_t end, int column, int lanes,
                                           float (&sum)[1][N]) {
  const int lane = threadIdx.x % kWarp;
  float own[N] = {};
#pragma unroll 4
  for (int64_t j = begin + lane / lanes; j < end; j += kWarp / lanes) {
    const int64_t entry = a.perm[j], start = int64_t(a.rows[j]) * a.d;
    const Columns<X, N> got = load<kVector, N>(a.A + start, column, a.d);
    const float v = to_float(a.values[entry]);
#pragma unroll
    for (int k = 0; k < N; ++k) own[k] += v * to_float(got.values[k]);
    if (S == 2) {
      const Columns<X, N> got2 = load<kVector, N>(a.A2 + start, column, a.d);
      const float v2 = to_float(a.values2[entry]);
#pragma unroll
      for (int k = 0; k < N; ++k) own[k] += v2 * to_float(got2.values[k]);
    }
  }
  for (int bit = kWarp / 2; bit >= lanes; bit /= 2) {
#pragma unroll
    for (int k = 0; k < N; ++k) own[k] += __shfl_xor_sync(kAll, own[k], bit);
  }
#pragma unroll
  for (int k = 0; k < N; ++k) sum[0][k] += own[k];
}

// Adds the partial rows of feature f.  False if it has none: then its entries are to be walked.
template <bool kVector, int P, int N, class V, class X>
__device__ __forceinline__ bool add_partials(const Gradient<V, X>& a, int64_t f, int column, float (&sum)[P][N]) {
  if (!a.first) return false;
  const int64_t begin = a.first[f], end = a.first[f + 1];
#pragma unroll 4
  for (int64_t run = begin; run < end; ++run) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const Columns<float, N> got = load<kVector, N>(a.partials + run * a.d, column + p * (kWarp * N), a.d);
#pragma unroll
      for (int k = 0; k < N; ++k) sum[p][k] += got.values[k];
    }
  }
  return begin < end;
}

// ---- Launching -------------------------------------------------------------------------------------------------------

// use(a V, an X, the number of sources as a type): values in A's storage, or in float32 beside an A in any.
template <class Use>
void with_sources(Storage values, Storage A, bool two, const Use& use) {
  const auto run = [&](auto v, auto x) {
    if (two) return use(v, x, std::integral_constant<int, 2>());
    use(v, x, std::integral_constant<int, 1>());
  };
  with_storage(A, [&](auto x) {
    if (values == A) return run(x, x);
    if (values == Storage::float32) return run(float(), x);
    throw std::invalid_argument("values in another dtype than A, which is not float32");
  });
}

template <class V, class X>
Gradient<V, X> gradient_of(Address colptr, Address rows, Address perm, Address values, Address A, Address values2, Address A2,
                           Address first, Address partials, int d) {
  return {at<const int64_t>(colptr), at<const int32_t>(rows), at<const int64_t>(perm), at<const V>(values), at<const X>(A),
          at<const V>(values2), at<const X>(A2), at<const int64_t>(first), at<const float>(partials), static_cast<int>(d)};
}

// Whether rows of d columns can be moved in pieces of N: 16 bytes divide every address (null: 0).
template <class... Addresses>
bool in_pieces(int64_t d, int N, Addresses... addresses) { return d % N == 0 && ((addresses % 16 == 0) && ...); }

}  // namespace gpu
}  // namespace sae_fast
