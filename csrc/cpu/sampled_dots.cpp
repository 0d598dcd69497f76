// Dots of a row of A with the weight rows of its entries: gradients with respect to values.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void sampled_dots(const args::sampled_dots& a) {
  const Csr code = a.code;
  const int64_t d = a.d;
  parallel_for(code.rows, 8, a.threads, [&](int64_t b, int) {
    const float* row = a.A + b * d;
    int64_t j = code.indptr[b];
    const int64_t end = code.indptr[b + 1];
    for (; j + 4 <= end; j += 4) {
      const float* rows[4];
      for (int q = 0; q < 4; ++q) rows[q] = a.W + code.indices[j + q] * d;
      dot4(row, rows, a.out + j, d);
    }
    for (; j < end; ++j) a.out[j] = dot(row, a.W + code.indices[j] * d, d);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
