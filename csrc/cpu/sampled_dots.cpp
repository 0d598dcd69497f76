// Dots of a row of A with the weight rows of its entries: gradients with respect to values.
#include "sae_fast/entries.hpp"
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void sampled_dots(const args::sampled_dots& a) {
  const int64_t d = a.d, run = run_of_features(a.code, a.features, d);
  const int32_t* indices = a.code.indices;
  for_entries(a.code, 0, a.features, run, a.threads, [&](int64_t b, int64_t j, int64_t end, bool) {
    const float* row = a.A + b * d;
    for (; j + 4 <= end; j += 4) {
      const float* rows[4];
      for (int q = 0; q < 4; ++q) rows[q] = a.W + indices[j + q] * d;
      dot4(row, rows, a.out + j, d);
    }
    for (; j < end; ++j) a.out[j] = dot(row, a.W + indices[j] * d, d);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
