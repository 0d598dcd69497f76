// From r . d_i in every place of a dense chunk to the gradient of the pre-activations there, and its sums by feature:
// the pointwise part of a step whose code is so dense that products of dense matrices are faster.  MATH.md §2.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void value_gradients(bool gated, Csr code, int64_t nnz, const float* u, const float* values, const float* scale,
                     const float* sparsity_weight, double normaliser, int64_t features, int parts, float* dots,
                     const float* dots_aux, float* sums, float* row, int threads) {
  const float two = static_cast<float>(2.0 / normaliser), one = static_cast<float>(1.0 / normaliser);
  const float* sparse = gated ? values + nnz : values;
  parallel_for(parts, 1, threads, [&](int64_t p, int worker) {
    float* delta = row + worker * features;
    float *bias = sums + p * 5 * features, *r_mag = bias + features, *b_mag = r_mag + features,
          *delta_sum = b_mag + features, *cost = delta_sum + features;
    for (int64_t b = code.rows * p / parts; b < code.rows * (p + 1) / parts; ++b) {
      zero(delta, features);
      for (int64_t j = code.indptr[b]; j < code.indptr[b + 1]; ++j) {
        const int32_t i = code.indices[j];
        const float dot = two * dots[b * features + i], penalty = one * sparsity_weight[i];
        cost[i] += sparse[j];
        if (!gated) {
          delta[i] = values[j] == 0.0f ? 0.0f : dot + penalty;
          bias[i] += delta[i];
          continue;
        }
        const float g_mag = values[j] == 0.0f ? 0.0f : dot;
        const float g_gate = sparse[j] == 0.0f ? 0.0f : two * dots_aux[b * features + i] + penalty;
        delta[i] = g_gate + scale[i] * g_mag;
        bias[i] += g_gate;
        r_mag[i] += scale[i] * g_mag * u[j];
        b_mag[i] += g_mag;
      }
      for (int64_t i = 0; i < features; ++i) dots[b * features + i] = delta[i];
      axpy(delta_sum, delta, 1.0f, features);
    }
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
