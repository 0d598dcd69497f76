// Weight-gradient rows, and their squared norms without storing them.  A thread owns a feature.
#include "sae_fast/gradient_row.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void outer(Csc code, const Source* sources, int n_sources, int64_t d, const int64_t* list, int64_t first, int64_t n,
           float* out, float* scratch, int threads) {
  for_gradient_rows({code, sources, n_sources, d}, list, first, n, scratch, threads, false,
                    [&](int64_t i, const float* g) { axpy(out + i * d, g, 1.0f, d); });
}

void grad_sqnorm(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n, const float* W,
                 const float* self_coefficient, bool project, double* out, float* scratch, int threads) {
  for_gradient_rows({code, sources, n_sources, d}, nullptr, first, n, scratch, threads, true, [&](int64_t i, float* g) {
    if (self_coefficient) axpy(g, W + i * d, self_coefficient[i], d);
    if (project) project_row(g, W + i * d, d);
    double sum = 0;  // squares of floats overflow and underflow
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(g[k]) * g[k];
    out[i] = sum;
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
