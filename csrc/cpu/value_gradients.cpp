// From r . d_i in every place of a dense chunk to the gradient of the pre-activations there, and its sums by feature:
// the pointwise part of a step whose code is so dense that products of dense matrices are faster.  MATH.md §2.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void value_gradients(const args::value_gradients& a) {
  const float two = static_cast<float>(2.0 / a.normaliser), one = static_cast<float>(1.0 / a.normaliser);
  const Csr code = a.code;
  const int64_t features = a.features, parts = a.parts;
  const float *values = a.values, *sparse = a.gated ? values + a.nnz : values;
  float* rows = take<float>(a.memory, features * a.threads);
  parallel_for(parts, 1, a.threads, [&](int64_t p, int worker) {
    float* delta = rows + worker * features;
    float *bias = a.sums + p * 5 * features, *r_mag = bias + features, *b_mag = r_mag + features,
          *delta_sum = b_mag + features, *cost = delta_sum + features;
    for (int64_t b = code.rows * p / parts; b < code.rows * (p + 1) / parts; ++b) {
      zero(delta, features);
      for (int64_t j = code.indptr[b]; j < code.indptr[b + 1]; ++j) {
        const int32_t i = code.indices[j];
        const float dot = two * a.dots[b * features + i], penalty = one * a.sparsity_weight[i];
        cost[i] += sparse[j];
        if (!a.gated) {
          delta[i] = values[j] == 0.0f ? 0.0f : dot + penalty;
          bias[i] += delta[i];
          continue;
        }
        const float g_mag = values[j] == 0.0f ? 0.0f : dot;
        const float g_gate = sparse[j] == 0.0f ? 0.0f : two * a.dots_aux[b * features + i] + penalty;
        delta[i] = g_gate + a.scale[i] * g_mag;
        bias[i] += g_gate;
        r_mag[i] += a.scale[i] * g_mag * a.u[j];
        b_mag[i] += g_mag;
      }
      for (int64_t i = 0; i < features; ++i) a.dots[b * features + i] = delta[i];
      axpy(delta_sum, delta, 1.0f, features);
    }
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
