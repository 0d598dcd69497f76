// The pointwise functions on entries: u -> values.
#include "sae_fast/activation.hpp"
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

void activate(const args::activate& a) {
  constexpr int64_t run = 4096;
  with_activation(a.kind, [&](auto of_kind) {
    using Kind = decltype(of_kind);
    parallel_for((a.nnz + run - 1) / run, 1, a.threads, [&](int64_t r, int) {
      const int64_t end = (r + 1) * run < a.nnz ? (r + 1) * run : a.nnz;
#pragma omp simd
      for (int64_t j = r * run; j < end; ++j) {
        const int32_t i = a.indices[j];
        const float pi = a.u[j] + a.bias[i], positive = relu(pi);
        a.values[j] = Kind::magnitude(a.u[j], pi, positive, [&] { return a.first[i]; }, [&] { return a.second[i]; });
        if (Kind::value_sets == 2) a.values[a.nnz + j] = positive;
      }
    });
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
