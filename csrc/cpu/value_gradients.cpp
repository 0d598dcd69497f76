// From r . d_i in every place of a dense chunk to the gradient of the pre-activations there, and its sums by feature:
// the pointwise part of a step whose code is so dense that products of dense matrices are faster.  MATH.md §2.
#include "sae_fast/activation.hpp"
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void value_gradients(const args::value_gradients& a) {
  const float two = static_cast<float>(2.0 / a.normaliser), one = static_cast<float>(1.0 / a.normaliser);
  const Csr code = a.code;
  const int64_t features = a.features, parts = a.parts;
  float* rows = take<float>(a.memory, features * a.threads);
  parallel_for(parts, 1, a.threads, [&](int64_t p, int worker) {
    float* delta = rows + worker * features;
    float *bias = a.sums + p * 5 * features, *first = bias + features, *second = first + features,
          *delta_sum = second + features, *cost = delta_sum + features;
    for (int64_t b = code.rows * p / parts; b < code.rows * (p + 1) / parts; ++b) {
      zero(delta, features);
      for (int64_t j = code.indptr[b]; j < code.indptr[b + 1]; ++j) {
        const int32_t i = code.indices[j];
        const float dot = two * a.dots[b * features + i], penalty = one * a.sparsity_weight[i];
        with_activation(a.kind, [&](auto kind) {
          using Kind = decltype(kind);
          constexpr bool gates = Kind::value_sets == 2;
          const float magnitude = a.values[j], gate = gates ? a.values[a.nnz + j] : 0.0f;
          const float g_mag = magnitude == 0.0f ? 0.0f : gates ? dot : dot + penalty;
          const float g_gate = gate == 0.0f ? 0.0f : two * a.dots_aux[b * features + i] + penalty;
          const Pulled pulled = Kind::pullback(a.u[j], g_mag, g_gate, [&] { return a.first[i]; });
          cost[i] += gates ? gate : magnitude;
          delta[i] = pulled.u;
          bias[i] += pulled.bias;
          if (Kind::parameters > 0) first[i] += pulled.first;
          if (Kind::parameters > 1) second[i] += pulled.second;
        });
      }
      for (int64_t i = 0; i < features; ++i) a.dots[b * features + i] = delta[i];
      axpy(delta_sum, delta, 1.0f, features);
    }
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
