// outer, projection, Adam and renormalisation of a weight row in one visit.  A thread owns a feature.  A feature without
// entries and without momentum is not visited: its step is zero, and the decay of its v is made up for on the next visit.
#include <cfloat>
#include <math.h>

#include "sae_fast/bf16.hpp"
#include "sae_fast/gradient_row.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// Both moments, then the row.  The first is m + (1 - beta1) (g - m), taken from the nearer end, as torch's lerp does; below
// the normal numbers it is 0, or a row that rests would never be left alone.  With momentum the next row
// is almost sure to move: it is fetched meanwhile.
template <bool kMomentum>
static inline void move_row(float* __restrict w, float* __restrict m, float* __restrict v, const float* __restrict g,
                            int64_t d, float decay, const Adam& adam) {
  const float fresh = static_cast<float>(1.0 - adam.beta2);
  const bool from_m = adam.beta1 > 0.5;
  const float part = static_cast<float>(from_m ? 1.0 - adam.beta1 : adam.beta1);
  for (int64_t begin = 0; begin < d; begin += kAhead) {
    const int64_t end = begin + kAhead < d ? begin + kAhead : d;
    if (kMomentum) {
      prefetch(w + d, begin, end);
      prefetch(m + d, begin, end);
      prefetch(v + d, begin, end);
    }
#pragma omp simd
    for (int64_t k = begin; k < end; ++k) {
      float first = g[k];
      if (kMomentum) {
        const float from = from_m ? m[k] : g[k], to = from_m ? g[k] : m[k];
        first = from + part * (to - from);
        first = __builtin_fabsf(first) < FLT_MIN ? 0.0f : first;
        m[k] = first;
      }
      const float second = decay * v[k] + fresh * g[k] * g[k];
      v[k] = second;
      w[k] -= adam.step_size * first / (__builtin_sqrtf(second) * adam.inv_sqrt_correction + adam.eps);
    }
  }
}

static inline bool all_zero(const float* a, int64_t d) {
  for (int64_t first = 0; first < d; first += 64) {
    const int64_t last = first + 64 < d ? first + 64 : d;
    uint32_t any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t k = first; k < last; ++k) any |= bits(a[k]) << 1;
    if (any) return false;
  }
  return true;
}

// Row i, whose gradient is g, or 0 if it is not `touched`.
template <class Args>
static inline void step(const Args& a, int64_t i, float* g, bool touched) {
  const Adam& adam = a.adam;
  const int64_t d = a.d;
  float *w = a.W + i * d, *m = a.m ? a.m + i * d : nullptr, *v = a.v + i * d;
  if (!touched && all_zero(m, d)) return;
  if (touched && a.grad_scale != 1.0f)
    for (int64_t k = 0; k < d; ++k) g[k] *= a.grad_scale;
  if (touched && adam.project) project_row(g, w, d);
  const int64_t idle = adam.step - a.last_step[i];
  a.last_step[i] = adam.step;
  const float decay = static_cast<float>(idle == 1 ? adam.beta2 : ::pow(adam.beta2, static_cast<double>(idle)));
  m ? move_row<true>(w, m, v, g, d, decay, adam) : move_row<false>(w, m, v, g, d, decay, adam);
  if (adam.renormalise) {
    const float norm2 = dot(w, w, d);
    const float inverse = norm2 > 0 ? static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(norm2))) : 1.0f;
    for (int64_t k = 0; k < d; ++k) w[k] *= inverse;
  }
  if (a.shadow.rows) round_row(w, d, a.shadow.rows + i * d, a.shadow.norms + 2 * i);
}

void weight_step(const args::weight_step& a) {
  const int64_t* colptr = a.code.colptr + a.first;
  for_gradient_rows(a, nullptr, a.m != nullptr, [&](int64_t i, float* g) {
    const bool touched = colptr[i] != colptr[i + 1];
    if (touched && a.self_coefficient) axpy(g, a.W + i * a.d, a.self_coefficient[i], a.d);
    step(a, i, g, touched);
  });
}

void row_step(const args::row_step& a) {
  float* rows = take<float>(a.memory, a.d * a.threads);
  parallel_for(a.n, 16, a.threads, [&](int64_t i, int worker) {
    const bool touched = !a.colptr || a.colptr[i] != a.colptr[i + 1];
    if (!touched && !a.m) return;
    float* g = rows + worker * a.d;
    for (int64_t k = 0; k < a.d; ++k) g[k] = touched ? a.G[i * a.d + k] : 0.0f;
    step(a, i, g, touched);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
