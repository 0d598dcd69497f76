// decode, loss and sampled_dots in one visit of each example: its decoder rows come from memory once and are still in
// cache when the residuals are dotted with them.  MATH.md §2.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

static inline void subtract_from(float* __restrict a, const float* __restrict b_dec, const float* __restrict target,
                                 int64_t d) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) a[k] += b_dec[k] - target[k];
}

void decode_loss(const args::decode_loss& a) {
  const float two = static_cast<float>(2.0 / a.normaliser), one = static_cast<float>(1.0 / a.normaliser);
  const Csr code = a.code;
  const float *magnitudes = a.magnitudes, *gates = a.gates, *W = a.W;
  const int64_t d = a.d;
  parallel_for(code.rows, 8, a.threads, [&](int64_t b, int) {
    const int64_t begin = code.indptr[b], end = code.indptr[b + 1];
    float* r = a.residual + b * d;
    float* ra = gates ? a.residual_aux + b * d : nullptr;
    zero(r, d);
    if (gates) zero(ra, d);
    int64_t j = begin;
    for (; j + 4 <= end; j += 4) {
      const float* rows[4];
      for (int q = 0; q < 4; ++q) rows[q] = W + code.indices[j + q] * d;
      axpy4(r, rows, magnitudes + j, d);
      if (gates) axpy4(ra, rows, gates + j, d);
    }
    for (; j < end; ++j) {
      axpy(r, W + code.indices[j] * d, magnitudes[j], d);
      if (gates) axpy(ra, W + code.indices[j] * d, gates[j], d);
    }
    subtract_from(r, a.b_dec, a.target + b * d, d);
    if (gates) subtract_from(ra, a.b_dec, a.target + b * d, d);

    const float* sparse = gates ? gates : magnitudes;
    float* g_mag = a.grads;
    float* g_gate = gates ? a.grads + a.nnz : a.grads;
    double sparsity = 0;
    const auto finish = [&](int64_t at, float dot_mag, float dot_aux) {
      const float weight = a.sparsity_weight[code.indices[at]];
      const float g = magnitudes[at] == 0.0f ? 0.0f : two * dot_mag;
      if (gates) {
        g_mag[at] = g;
        g_gate[at] = gates[at] == 0.0f ? 0.0f : two * dot_aux + one * weight;
      } else {
        g_gate[at] = magnitudes[at] == 0.0f ? 0.0f : g + one * weight;
      }
      sparsity += weight * sparse[at];
    };
    for (j = begin; j + 4 <= end; j += 4) {
      const float* rows[4];
      float s[4], sa[4] = {0, 0, 0, 0};
      for (int q = 0; q < 4; ++q) rows[q] = W + code.indices[j + q] * d;
      dot4(r, rows, s, d);
      if (gates) dot4(ra, rows, sa, d);
      for (int q = 0; q < 4; ++q) finish(j + q, s[q], sa[q]);
    }
    for (; j < end; ++j) {
      const float* row = W + code.indices[j] * d;
      finish(j, dot(r, row, d), gates ? dot(ra, row, d) : 0.0f);
    }
    a.losses[b * 3 + 0] = dot(r, r, d);
    a.losses[b * 3 + 1] = static_cast<float>(sparsity);
    a.losses[b * 3 + 2] = gates ? dot(ra, ra, d) : 0.0f;
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
