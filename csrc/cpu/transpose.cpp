// CSR -> CSC by counting.  Each part owns a run of rows and, after the scan, a slot in every feature, so the result is the
// same for any number of parts: rows ascend within a feature.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void transpose(const args::transpose& a) {
  const Csr code = a.code;
  const int64_t features = a.features, parts = a.threads;
  int64_t* scratch = take<int64_t>(a.memory, parts * features);  // [parts, features]
  const auto first_row = [&](int64_t part) { return code.rows * part / parts; };
  parallel_for(parts, 1, a.threads, [&](int64_t p, int) {
    int64_t* count = scratch + p * features;
    for (int64_t i = 0; i < features; ++i) count[i] = 0;
    const int64_t end = code.indptr[first_row(p + 1)];
    for (int64_t j = code.indptr[first_row(p)]; j < end; ++j) ++count[code.indices[j]];
  });
  int64_t at = 0;
  for (int64_t i = 0; i < features; ++i) {
    a.colptr[i] = at;
    for (int p = 0; p < parts; ++p) {
      const int64_t count = scratch[p * features + i];
      scratch[p * features + i] = at;
      at += count;
    }
  }
  a.colptr[features] = at;
  parallel_for(parts, 1, a.threads, [&](int64_t p, int) {
    int64_t* slot = scratch + p * features;
    const int64_t last = first_row(p + 1);
    for (int64_t b = first_row(p); b < last; ++b)
      for (int64_t j = code.indptr[b]; j < code.indptr[b + 1]; ++j) {
        const int64_t to = slot[code.indices[j]]++;
        a.rows[to] = static_cast<int32_t>(b);
        a.perm[to] = j;
      }
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
