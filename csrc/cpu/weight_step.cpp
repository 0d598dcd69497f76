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

template <class Args>
static inline void step(const Args& a, int64_t i, float* g) {
  adam_row(a.W + i * a.d, a.v + i * a.d, g, a.d, a.grad_scale, a.adam, a.last_step + i);
  if (a.shadow.rows) round_row(a.W + i * a.d, a.d, a.shadow.rows + i * a.d, a.shadow.norms + 2 * i);
}

void weight_step(const args::weight_step& a) {
  for_gradient_rows(a, nullptr, false, [&](int64_t i, float* g) {
    if (a.self_coefficient) axpy(g, a.W + i * a.d, a.self_coefficient[i], a.d);
    step(a, i, g);
  });
}

void row_step(const args::row_step& a) {
  float* rows = take<float>(a.memory, a.d * a.threads);
  parallel_for(a.n, 16, a.threads, [&](int64_t i, int worker) {
    if (a.colptr && a.colptr[i] == a.colptr[i + 1]) return;
    float* g = rows + worker * a.d;
    for (int64_t k = 0; k < a.d; ++k) g[k] = a.G[i * a.d + k];
    step(a, i, g);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
