// outer, projection, Adam (beta1 = 0) and renormalisation of a weight row in one visit.  A thread owns a feature; a feature
// without entries is not visited: its step is zero, and the decay of its v is made up for on the next visit.
#include <math.h>

#include "sae_fast/bf16.hpp"
#include "sae_fast/gradient_row.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

static inline void adam_row(float* __restrict w, float* __restrict v, float* __restrict g, int64_t d, float grad_scale,
                            const Adam& adam, int64_t* last_step) {
  if (grad_scale != 1.0f)
    for (int64_t k = 0; k < d; ++k) g[k] *= grad_scale;
  if (adam.project) project_row(g, w, d);
  const int64_t idle = adam.step - *last_step;
  *last_step = adam.step;
  const float decay = static_cast<float>(idle == 1 ? adam.beta2 : ::pow(adam.beta2, static_cast<double>(idle)));
  const float fresh = static_cast<float>(1.0 - adam.beta2);
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const float second = decay * v[k] + fresh * g[k] * g[k];
    v[k] = second;
    w[k] -= adam.step_size * g[k] / (__builtin_sqrtf(second) * adam.inv_sqrt_correction + adam.eps);
  }
  if (!adam.renormalise) return;
  const float norm2 = dot(w, w, d);
  if (norm2 > 0) {
    const float inverse = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(norm2)));
    for (int64_t k = 0; k < d; ++k) w[k] *= inverse;
  }
}

static inline void follow(const Shadow& shadow, const float* W, int64_t i, int64_t d) {
  if (shadow.rows) round_row(W + i * d, d, shadow.rows + i * d, shadow.norms + 2 * i);
}

void weight_step(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n,
                 const float* self_coefficient, float grad_scale, Adam adam, float* W, float* v, int64_t* last_step,
                 Shadow shadow, float* scratch, int threads) {
  for_gradient_rows({code, sources, n_sources, d}, nullptr, first, n, scratch, threads, false, [&](int64_t i, float* g) {
    if (self_coefficient) axpy(g, W + i * d, self_coefficient[i], d);
    adam_row(W + i * d, v + i * d, g, d, grad_scale, adam, last_step + i);
    follow(shadow, W, i, d);
  });
}

void row_step(const float* G, const int64_t* colptr, int64_t d, int64_t n, float grad_scale, Adam adam, float* W, float* v,
              int64_t* last_step, Shadow shadow, float* scratch, int threads) {
  parallel_for(n, 16, threads, [&](int64_t i, int worker) {
    if (colptr && colptr[i] == colptr[i + 1]) return;
    float* g = scratch + worker * d;
    for (int64_t k = 0; k < d; ++k) g[k] = G[i * d + k];
    adam_row(W + i * d, v + i * d, g, d, grad_scale, adam, last_step + i);
    follow(shadow, W, i, d);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
