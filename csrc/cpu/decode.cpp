// Sums of decoder rows.  A thread owns a row of the batch; each W row is read once for all value sets.
#include "sae_fast/entries.hpp"
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void decode(const args::decode& a) {
  const Csr code = a.code;
  const int64_t d = a.d, groups = a.bounds.n, *bounds = a.bounds.at;
  const int64_t run = run_of_features(code, bounds[groups] - bounds[0], d);
  for (int64_t g = 0; g < groups; ++g) {
    for_entries(code, bounds[g], bounds[g + 1], run, a.threads, [&](int64_t b, int64_t j, int64_t end, bool starts) {
      const auto target = [&](int64_t v) { return a.out + ((v * groups + g) * code.rows + b) * d; };
      for (int64_t v = 0; v < a.V && starts; ++v) zero(target(v), d);
      for (; j + 4 <= end; j += 4) {
        const float* rows[4];
        for (int q = 0; q < 4; ++q) rows[q] = a.W + code.indices[j + q] * d;
        for (int64_t v = 0; v < a.V; ++v) axpy4(target(v), rows, a.values + v * a.nnz + j, d);
      }
      for (; j < end; ++j)
        for (int64_t v = 0; v < a.V; ++v) axpy(target(v), a.W + code.indices[j] * d, a.values[v * a.nnz + j], d);
    });
  }
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
