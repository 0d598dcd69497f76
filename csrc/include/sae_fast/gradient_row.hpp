// One row of a weight gradient, summed over the entries of its feature in ascending row order.
#pragma once
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

static inline void add_gradient_row(const Csc& code, const Source* sources, int n_sources, int64_t feature, int64_t d,
                                    float* g) {
  const int64_t begin = code.colptr[feature], end = code.colptr[feature + 1];
  for (int s = 0; s < n_sources; ++s) {
    const float *values = sources[s].values, *A = sources[s].A;
    int64_t j = begin;
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

// g -= (g . w / |w|^2) w
static inline void project_row(float* __restrict g, const float* __restrict w, int64_t d) {
  const float norm2 = dot(w, w, d);
  if (norm2 > 0) axpy(g, w, -dot(g, w, d) / norm2, d);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
