// The pointwise functions on entries: u -> values.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// ReLU that keeps a NaN, so that nothing non-finite vanishes before the loss is checked.
static inline float relu(float a) { return a <= 0.0f ? 0.0f : a; }

void activate(Activation kind, int64_t nnz, const int32_t* indices, const float* u, const float* bias,
              const float* scale, const float* b_mag, const float* threshold, float* values, int threads) {
  constexpr int64_t run = 4096;
  parallel_for((nnz + run - 1) / run, 1, threads, [&](int64_t r, int) {
    const int64_t end = (r + 1) * run < nnz ? (r + 1) * run : nnz;
#pragma omp simd
    for (int64_t j = r * run; j < end; ++j) {
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
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
