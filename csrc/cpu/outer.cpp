// Weight-gradient rows, and their squared norms without storing them.  A thread owns a feature.
#include <stdlib.h>

#include "sae_fast/gradient_row.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void outer(Csc code, const Source* sources, int n_sources, int64_t d, const int64_t* list, int64_t first, int64_t n,
           float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
  for (int64_t i = 0; i < n; ++i) add_gradient_row(code, sources, n_sources, list ? list[i] : first + i, d, out + i * d);
}

void grad_sqnorm(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n, const float* W,
                 const float* self_coefficient, bool project, double* out, int threads) {
#pragma omp parallel num_threads(threads)
  {
    float* g = static_cast<float*>(::malloc(sizeof(float) * d));
#pragma omp for schedule(dynamic, 64)
    for (int64_t i = 0; i < n; ++i) {
      zero(g, d);
      add_gradient_row(code, sources, n_sources, first + i, d, g);
      if (self_coefficient) axpy(g, W + i * d, self_coefficient[i], d);
      if (project) project_row(g, W + i * d, d);
      double sum = 0;  // squares of floats overflow and underflow
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(g[k]) * g[k];
      out[i] = sum;
    }
    ::free(g);
  }
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
