// Weight-gradient rows, and their squared norms without storing them.  A thread owns a feature.
#include "sae_fast/entries.hpp"
#include "sae_fast/gradient_row.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// By runs of examples where they pay and no feature is so long that threads share it; that changes no bit of a sum from 0.
void outer(const args::outer& a) {
  const Csr by_feature{a.code.colptr + a.first, a.code.rows, a.n};
  const int64_t run = a.list || a.examples > kRun ? a.examples : run_of_features(by_feature, a.examples, a.d);
  if (run == a.examples)
    return for_gradient_rows(a, a.list, false, [&](int64_t i, const float* g) { axpy(a.out + i * a.d, g, 1.0f, a.d); });
  for (int s = 0; s < a.sources.n; ++s)
    for_entries(by_feature, 0, a.examples, run, a.threads, [&](int64_t i, int64_t begin, int64_t end, bool) {
      add_run(a.code, {a.sources.of + s, 1}, a.d, begin, end, a.out + i * a.d);
    });
}

// Squares of floats overflow and underflow: sums in double.
static inline double sqnorm(const float* __restrict g, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += static_cast<double>(g[k]) * g[k];
  return sum;
}

// |g - (g . w / |w|^2) w|^2 as |g|^2 - (g . w)^2 / |w|^2, whose cancellation a double has the digits for: what is lost is less
// than what rounding g to floats took.
static inline double sqnorm_beside(const float* __restrict g, const float* __restrict w, int64_t d) {
  double gg = 0, gw = 0, ww = 0;
  for (int64_t begin = 0; begin < d; begin += kAhead) {
    const int64_t end = begin + kAhead < d ? begin + kAhead : d;
    prefetch(w + d, begin, end);
#pragma omp simd reduction(+ : gg, gw, ww)
    for (int64_t k = begin; k < end; ++k) {
      const double a = g[k], b = w[k];
      gg += a * a;
      gw += a * b;
      ww += b * b;
    }
  }
  const double beside = ww > 0 ? gg - gw / ww * gw : gg;
  return beside < 0 ? 0 : beside;
}

void grad_sqnorm(const args::grad_sqnorm& a) {
  for_gradient_rows(a, nullptr, true, [&](int64_t i, float* g) {
    const int64_t d = a.d;
    if (a.self_coefficient) axpy(g, a.W + i * d, a.self_coefficient[i], d);
    a.out[i] = a.project ? sqnorm_beside(g, a.W + i * d, d) : sqnorm(g, d);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
