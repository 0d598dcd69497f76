// Sums of decoder rows.  A thread owns a row of the batch; each W row is read once for all value sets.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void decode(const args::decode& a) {
  const Csr code = a.code;
  const int64_t d = a.d, *bounds = a.bounds.at;
  parallel_for(code.rows, 8, a.threads, [&](int64_t b, int) {
    int64_t j = code.indptr[b];
    const int64_t end = code.indptr[b + 1];
    while (j < end && code.indices[j] < bounds[0]) ++j;
    for (int64_t g = 0; g < a.bounds.n; ++g) {
      int64_t stop = j;
      while (stop < end && code.indices[stop] < bounds[g + 1]) ++stop;
      const auto target = [&](int64_t v) { return a.out + ((v * a.bounds.n + g) * code.rows + b) * d; };
      for (int64_t v = 0; v < a.V; ++v) zero(target(v), d);
      for (; j + 4 <= stop; j += 4) {
        const float* rows[4];
        for (int q = 0; q < 4; ++q) rows[q] = a.W + code.indices[j + q] * d;
        for (int64_t v = 0; v < a.V; ++v) axpy4(target(v), rows, a.values + v * a.nnz + j, d);
      }
      for (; j < stop; ++j)
        for (int64_t v = 0; v < a.V; ++v) axpy(target(v), a.W + code.indices[j] * d, a.values[v * a.nnz + j], d);
    }
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
