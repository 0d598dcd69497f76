// The CPU kernels.  Each instruction set compiles csrc/cpu/*.cpp into its own namespace; `kernels()` of that namespace is
// its table of functions, and csrc/bindings.cpp chooses a table at run time.
//
// Rules for csrc/cpu: raw pointers only, and no standard containers or other inline library code.  A template or inline
// function that is instantiated there under -mavx512 may be the copy that the linker keeps for the whole module.
//
// Every kernel owns what it writes (a row of the batch, or a feature), so results do not depend on the thread count.
#pragma once
#include "sae_fast/types.hpp"

namespace sae_fast {

struct Kernels {
  // Entries of pre [n] with not (pre + bias <= cut), ascending: indices from `first`, and pre itself.  A NaN is an entry.
  // cut may be null (0).  The outputs need room for n + 16.  Returns their number.
  int64_t (*compact)(const float* pre, const float* bias, const float* cut, int64_t n, int32_t first,
                     int32_t* indices, float* u);
  // values [V, nnz] from u: gated (magnitudes, gates), relu, jumprelu (magnitudes).  scale = exp(r_mag).
  void (*activate)(Activation kind, int64_t nnz, const int32_t* indices, const float* u, const float* bias,
                   const float* scale, const float* b_mag, const float* threshold, float* values, int threads);
  // out [V, G, rows, d]: sums of values * W rows; bounds [G + 1] are the feature ranges of the groups.
  void (*decode)(Csr code, int64_t nnz, const float* values, int64_t V, const float* W, int64_t d,
                 const int64_t* bounds, int64_t G, float* out, int threads);
  // out [nnz]: A[row] . W[feature]
  void (*sampled_dots)(Csr code, const float* A, const float* W, int64_t d, float* out, int threads);
  // Residuals r = x_hat - target (and r_aux, when gates is not null), per-row losses [rows, 3] (not yet divided by the
  // normaliser), value gradients [V, nnz] (divided).
  void (*decode_loss)(Csr code, int64_t nnz, const float* magnitudes, const float* gates, const float* W,
                      const float* b_dec, const float* target, const float* sparsity_weight, double normaliser,
                      int64_t d, float* residual, float* residual_aux, float* losses, float* grads, int threads);
  // CSR -> CSC.  scratch [parts, features] int64; rows ascend within a feature.
  void (*transpose)(Csr code, int64_t features, int parts, int64_t* scratch, int64_t* colptr, int32_t* rows,
                    int64_t* perm, int threads);
  // out [n, d] += gradient rows of the features list[0..n) (or first .. first + n when list is null).
  void (*outer)(Csc code, const Source* sources, int n_sources, int64_t d, const int64_t* list, int64_t first,
                int64_t n, float* out, int threads);
  // out [n] double: squared norms of the same rows, after adding self_coefficient * W and, on request, projection.
  void (*grad_sqnorm)(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n,
                      const float* W, const float* self_coefficient, bool project, double* out, int threads);
  // One Adam step on the touched rows of W [n, d] (features first .. first + n).
  void (*weight_step)(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n,
                      const float* self_coefficient, float grad_scale, Adam adam, float* W, float* v,
                      int64_t* last_step, int threads);
  // The same from dense gradient rows G [n, d].  With colptr [n + 1] rows without entries are left alone; without it every
  // row counts as touched.
  void (*row_step)(const float* G, const int64_t* colptr, int64_t d, int64_t n, float grad_scale, Adam adam, float* W, float* v,
                   int64_t* last_step, int threads);
  // Rows first .. first + n of a CSR (perm null) or CSC as dense out [n, width], zeros elsewhere; and back: out [nnz].
  void (*scatter)(const int64_t* indptr, const int32_t* indices, const int64_t* perm, int64_t first, int64_t n,
                  int64_t width, const float* values, float* out, int threads);
  void (*gather)(const int64_t* indptr, const int32_t* indices, int64_t first, int64_t n, int64_t width,
                 const float* dense, float* out, int threads);
};

#ifdef SAE_FAST_HAS_AVX512
namespace avx512 { const Kernels& kernels(); }
#endif
#ifdef SAE_FAST_HAS_AVX2
namespace avx2 { const Kernels& kernels(); }
#endif
namespace plain { const Kernels& kernels(); }

}  // namespace sae_fast
