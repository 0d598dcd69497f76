// Weight-gradient rows, and their squared norms without storing them.  A thread owns a feature.
#include "sae_fast/gradient_row.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void outer(const args::outer& a) {
  for_gradient_rows(a, a.list, false, [&](int64_t i, const float* g) { axpy(a.out + i * a.d, g, 1.0f, a.d); });
}

void grad_sqnorm(const args::grad_sqnorm& a) {
  for_gradient_rows(a, nullptr, true, [&](int64_t i, float* g) {
    const int64_t d = a.d;
    if (a.self_coefficient) axpy(g, a.W + i * d, a.self_coefficient[i], d);
    if (a.project) project_row(g, a.W + i * d, d);
    double sum = 0;  // squares of floats overflow and underflow
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(g[k]) * g[k];
    a.out[i] = sum;
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
