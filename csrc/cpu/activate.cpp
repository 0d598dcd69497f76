// The pointwise functions on entries: u -> values.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// ReLU that keeps a NaN, so that nothing non-finite vanishes before the loss is checked.
static inline float relu(float a) { return a <= 0.0f ? 0.0f : a; }

void activate(const args::activate& a) {
  constexpr int64_t run = 4096;
  parallel_for((a.nnz + run - 1) / run, 1, a.threads, [&](int64_t r, int) {
    const int64_t end = (r + 1) * run < a.nnz ? (r + 1) * run : a.nnz;
#pragma omp simd
    for (int64_t j = r * run; j < end; ++j) {
      const int32_t i = a.indices[j];
      const float pi = a.u[j] + a.bias[i];
      switch (a.kind) {
        case Activation::gated:
          a.values[j] = pi <= 0.0f ? 0.0f : relu(a.scale[i] * a.u[j] + a.b_mag[i]);
          a.values[a.nnz + j] = relu(pi);
          break;
        case Activation::relu:
          a.values[j] = relu(pi);
          break;
        case Activation::jumprelu:
          a.values[j] = pi <= a.threshold[i] ? 0.0f : relu(pi);
          break;
      }
    }
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
