// Screening of a tile row: which pre-activations pass their threshold.
#include "sae_fast/kernel_table.hpp"

#if defined(SAE_FAST_ISA_AVX512) || defined(SAE_FAST_ISA_AVX2)
#include <immintrin.h>
#endif

namespace sae_fast {
namespace SAE_FAST_ISA {

int64_t compact(const args::compact& a) {
  const float *pre = a.pre, *bias = a.bias, *cut = a.cut;
  const int64_t n = a.n;
  const int32_t first = a.first;
  int32_t* indices = a.indices;
  float* u = a.u;
  int64_t k = 0, count = 0;
#if defined(SAE_FAST_ISA_AVX512)
  // Compress in a register and store whole vectors (hence kSlack): a compressing store to memory is 12-34
  // times slower on Zen 4.  Most vectors hold no entry at all.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; k < n; k += 16) {
    const __mmask16 valid = n - k >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - k)) - 1);
    const __m512 p = _mm512_maskz_loadu_ps(valid, pre + k);
    const __m512 pi = _mm512_add_ps(p, _mm512_maskz_loadu_ps(valid, bias + k));
    const __m512 c = cut ? _mm512_maskz_loadu_ps(valid, cut + k) : _mm512_setzero_ps();
    const __mmask16 m = _mm512_mask_cmp_ps_mask(valid, pi, c, _CMP_NLE_UQ);  // "not <=" keeps a NaN
    if (m == 0) continue;
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(first + static_cast<int32_t>(k)));
    _mm512_storeu_si512(indices + count, _mm512_maskz_compress_epi32(m, index));
    _mm512_storeu_ps(u + count, _mm512_maskz_compress_ps(m, p));
    count += __builtin_popcount(m);
  }
  return count;
#elif defined(SAE_FAST_ISA_AVX2)
  for (; k + 8 <= n; k += 8) {
    const __m256 pi = _mm256_add_ps(_mm256_loadu_ps(pre + k), _mm256_loadu_ps(bias + k));
    const __m256 c = cut ? _mm256_loadu_ps(cut + k) : _mm256_setzero_ps();
    for (unsigned m = _mm256_movemask_ps(_mm256_cmp_ps(pi, c, _CMP_NLE_UQ)); m != 0; m &= m - 1) {
      const int64_t at = k + __builtin_ctz(m);
      indices[count] = first + static_cast<int32_t>(at);
      u[count++] = pre[at];
    }
  }
#endif
  for (; k < n; ++k) {
    if (!(pre[k] + bias[k] <= (cut ? cut[k] : 0.0f))) {
      indices[count] = first + static_cast<int32_t>(k);
      u[count++] = pre[k];
    }
  }
  return count;
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
