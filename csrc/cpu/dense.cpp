// Between a code and dense rows, for batches so dense that a matrix product beats gathering.  The same two loops serve CSR
// (rows of the batch) and CSC (rows are features, columns the batch; values go through perm).
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void scatter(const args::scatter& a) {
  parallel_for(a.n, 16, a.threads, [&](int64_t b, int) {
    float* row = a.out + b * a.width;
    zero(row, a.width);
    const int64_t end = a.indptr[a.first + b + 1];
    for (int64_t j = a.indptr[a.first + b]; j < end; ++j) row[a.indices[j]] = a.values[a.perm ? a.perm[j] : j];
  });
}

void gather(const args::gather& a) {
  parallel_for(a.n, 16, a.threads, [&](int64_t b, int) {
    const int64_t end = a.indptr[a.first + b + 1];
    for (int64_t j = a.indptr[a.first + b]; j < end; ++j) a.out[j] = a.dense[b * a.width + a.indices[j]];
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
