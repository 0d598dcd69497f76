// The pointwise functions on entries: u -> values.
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// ReLU that keeps a NaN, so that nothing non-finite vanishes before the loss is checked.
static inline float relu(float a) { return a <= 0.0f ? 0.0f : a; }

void activate(Activation kind, int64_t nnz, const int32_t* indices, const float* u, const float* bias,
              const float* scale, const float* b_mag, const float* threshold, float* values, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static) if (nnz > 8192)
  for (int64_t j = 0; j < nnz; ++j) {
    const int32_t i = indices[j];
    const float pi = u[j] + bias[i];
    switch (kind) {
      case Activation::gated:
        values[j] = pi <= 0.0f ? 0.0f : relu(scale[i] * u[j] + b_mag[i]);
        values[nnz + j] = relu(pi);
        break;
      case Activation::relu:
        values[j] = relu(pi);
        break;
      case Activation::jumprelu:
        values[j] = pi <= threshold[i] ? 0.0f : relu(pi);
        break;
    }
  }
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
