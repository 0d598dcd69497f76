// Rows of a weight gradient, each summed over the entries of its feature in ascending row order, by runs of a fixed length:
// a feature that is active almost everywhere would keep one thread busy long after the others, so its runs are shared.
// The sum is the same whoever sums.
#pragma once
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

static inline void add_run(const Csc& code, const Sources& sources, int64_t d, int64_t begin, int64_t end, float* g) {
  for (int s = 0; s < sources.n; ++s) {
    const float *values = sources.of[s].values, *A = sources.of[s].A;
    int64_t j = begin;
    if (d == 1) {  // a parameter vector: the same sums, without the loops over d
      const auto term = [&](int64_t at) { return values[code.perm[at]] * A[code.rows[at]]; };
      for (; j + 4 <= end; j += 4) g[0] += (term(j) + term(j + 1)) + (term(j + 2) + term(j + 3));
      for (; j < end; ++j) g[0] += term(j);
      continue;
    }
    for (; j + 4 <= end; j += 4) {
      const float* rows[4];
      float c[4];
      for (int q = 0; q < 4; ++q) {
        rows[q] = A + code.rows[j + q] * d;
        c[q] = values[code.perm[j + q]];
      }
      axpy4(g, rows, c, d);
    }
    for (; j < end; ++j) axpy(g, A + code.rows[j] * d, values[code.perm[j]], d);
  }
}

// Floats for the gradient rows of any features: a row a worker, or a row a run of the longest feature.
static inline float* gradient_rows(const Memory& memory, const Csc& code, int64_t d, int threads) {
  int64_t rows = threads;
  for (int64_t i = 0; i < code.features; ++i) {
    const int64_t runs = (code.colptr[i + 1] - code.colptr[i] + kRun - 1) / kRun;
    rows = runs > rows ? runs : rows;
  }
  return take<float>(memory, rows * d);
}

// use(i, g) with the gradient row g [d] of feature list[i] (or a.first + i when list is null), for every i < a.n whose
// feature has entries, or for every i with `empty`.
template <class Args, class Use>
static inline void for_gradient_rows(const Args& a, const int64_t* list, bool empty, const Use& use) {
  const Csc code = a.code;
  const int64_t d = a.d, n = a.n, *colptr = code.colptr;
  float* scratch = gradient_rows(a.memory, code, d, a.threads);
  const auto feature = [&](int64_t i) { return list ? list[i] : a.first + i; };
  const auto runs = [&](int64_t i) { return (colptr[feature(i) + 1] - colptr[feature(i)] + kRun - 1) / kRun; };
  for (int64_t i = 0; i < n; ++i) {
    if (runs(i) <= 1) continue;
    const int64_t begin = colptr[feature(i)], end = colptr[feature(i) + 1];
    parallel_for(runs(i), 1, a.threads, [&](int64_t r, int) {
      float* g = scratch + r * d;
      zero(g, d);
      add_run(code, a.sources, d, begin + r * kRun, begin + (r + 1) * kRun < end ? begin + (r + 1) * kRun : end, g);
    });
    for (int64_t r = 1; r < runs(i); ++r) axpy(scratch, scratch + r * d, 1.0f, d);
    use(i, scratch);
  }
  parallel_for(n, 64, a.threads, [&](int64_t i, int worker) {
    if (runs(i) > 1 || (runs(i) == 0 && !empty)) return;
    float* g = scratch + worker * d;
    zero(g, d);
    add_run(code, a.sources, d, colptr[feature(i)], colptr[feature(i) + 1], g);
    use(i, g);
  });
}

// g -= (g . w / |w|^2) w
static inline void project_row(float* __restrict g, const float* __restrict w, int64_t d) {
  const float norm2 = dot(w, w, d);
  if (norm2 > 0) axpy(g, w, -dot(g, w, d) / norm2, d);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
