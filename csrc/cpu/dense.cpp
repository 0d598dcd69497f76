// Between a code and dense rows, for batches so dense that a matrix product beats gathering.  The same two loops serve CSR
// (rows of the batch) and CSC (rows are features, columns the batch; values go through perm).
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void scatter(const int64_t* indptr, const int32_t* indices, const int64_t* perm, int64_t first, int64_t n,
             int64_t width, const float* values, float* out, int threads) {
  parallel_for(n, 16, threads, [&](int64_t b, int) {
    float* row = out + b * width;
    zero(row, width);
    for (int64_t j = indptr[first + b]; j < indptr[first + b + 1]; ++j) row[indices[j]] = values[perm ? perm[j] : j];
  });
}

void gather(const int64_t* indptr, const int32_t* indices, int64_t first, int64_t n, int64_t width, const float* dense,
            float* out, int threads) {
  parallel_for(n, 16, threads, [&](int64_t b, int) {
    for (int64_t j = indptr[first + b]; j < indptr[first + b + 1]; ++j) out[j] = dense[b * width + indices[j]];
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
