// Dots of a row of A with the weight rows of its entries: gradients with respect to values.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void sampled_dots(Csr code, const float* A, const float* W, int64_t d, float* out, int threads) {
  parallel_for(code.rows, 8, threads, [&](int64_t b, int) {
    const float* a = A + b * d;
    int64_t j = code.indptr[b];
    const int64_t end = code.indptr[b + 1];
    for (; j + 4 <= end; j += 4) {
      const float* rows[4];
      for (int q = 0; q < 4; ++q) rows[q] = W + code.indices[j + q] * d;
      dot4(a, rows, out + j, d);
    }
    for (; j < end; ++j) out[j] = dot(a, W + code.indices[j] * d, d);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
