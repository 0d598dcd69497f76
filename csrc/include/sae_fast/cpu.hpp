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
  // Rows of A [n, d] as bfloat16, in the first d of K columns, zeros in the others; norms [n, 2] of the rows and of what
  // rounding took.
  void (*round_rows)(const float* A, int64_t n, int64_t d, int64_t K, uint16_t* out, double* norms, int threads);
  // How many rows of A [n, d] are no longer what rounded [n, d] was made from.
  int64_t (*stale_rows)(const float* A, int64_t n, int64_t d, const uint16_t* rounded, const double* norms, int threads);
  // out [parts, d]: sums over runs of rows of the squared rounding residuals; rounded [n, K].
  void (*column_residuals)(const float* A, const uint16_t* rounded, int64_t n, int64_t d, int64_t K, int parts,
                           float* out, int threads);
  // The operands of the screening product: completes rows [n, K] (of round_rows); makes rows [n, K] from rounded [n, d].
  void (*screen_x)(Screen, const float* x, int64_t n, const double* norms, uint16_t* rows, int threads);
  void (*screen_w)(Screen, const uint16_t* rounded, const float* W, int64_t n, const double* norms, const float* bias,
                   const float* cut, uint16_t* rows, int threads);
  // Entries of ub [n], bfloat16, with not (ub <= above), ascending, from `first`: room for n.  Returns their number.
  // above are the bits of a bfloat16, at least 0.
  int64_t (*screen)(const uint16_t* ub, int64_t n, int16_t above, int32_t first, int32_t* indices);
  // The members among n candidates [n] of a row x [d], with not (x . w + bias <= cut): indices and u; may run in place.
  // W, bias and cut start at feature 0.  Returns their number.
  int64_t (*verify)(const float* x, const float* W, int64_t d, const float* bias, const float* cut,
                    const int32_t* candidates, int64_t n, int32_t* indices, float* u);
  // out [rows, features] = x W^T by the same dots as verify's, bit for bit.
  void (*dot_block)(const float* x, int64_t rows, const float* W, int64_t features, int64_t d, float* out);
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
  // The four that follow need gradient_scratch() floats of scratch.
  // out [n, d] += gradient rows of the features list[0..n) (or first .. first + n when list is null).
  void (*outer)(Csc code, const Source* sources, int n_sources, int64_t d, const int64_t* list, int64_t first,
                int64_t n, float* out, float* scratch, int threads);
  // out [n] double: squared norms of the same rows, after adding self_coefficient * W and, on request, projection.
  void (*grad_sqnorm)(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n,
                      const float* W, const float* self_coefficient, bool project, double* out, float* scratch,
                      int threads);
  // One Adam step on the touched rows of W [n, d] (features first .. first + n); the shadow's rows follow.
  void (*weight_step)(Csc code, const Source* sources, int n_sources, int64_t d, int64_t first, int64_t n,
                      const float* self_coefficient, float grad_scale, Adam adam, float* W, float* v,
                      int64_t* last_step, Shadow shadow, float* scratch, int threads);
  // The same from dense gradient rows G [n, d].  With colptr [n + 1] rows without entries are left alone; without it every
  // row counts as touched.
  void (*row_step)(const float* G, const int64_t* colptr, int64_t d, int64_t n, float grad_scale, Adam adam, float* W, float* v,
                   int64_t* last_step, Shadow shadow, float* scratch, int threads);
  // Rows first .. first + n of a CSR (perm null) or CSC as dense out [n, width], zeros elsewhere; and back: out [nnz].
  void (*scatter)(const int64_t* indptr, const int32_t* indices, const int64_t* perm, int64_t first, int64_t n,
                  int64_t width, const float* values, float* out, int threads);
  void (*gather)(const int64_t* indptr, const int32_t* indices, int64_t first, int64_t n, int64_t width,
                 const float* dense, float* out, int threads);
  // dots [rows, features] (r . d_i; dots_aux likewise, of a gated code) becomes the gradient of u, zeros outside the code.
  // sums [parts, 5, features] += over runs of rows: the gradients of the bias, of r_mag and b_mag (gated), of u, and the
  // values that are penalised.  Losses' normaliser and weights as in decode_loss.  row [threads, features] is scratch.
  void (*value_gradients)(bool gated, Csr code, int64_t nnz, const float* u, const float* values, const float* scale,
                          const float* sparsity_weight, double normaliser, int64_t features, int parts, float* dots,
                          const float* dots_aux, float* sums, float* row, int threads);
};

// Floats of scratch for the gradient rows of any features: a row a worker, or a row a run of the longest feature.
static inline int64_t gradient_scratch(const int64_t* colptr, int64_t features, int64_t d, int threads) {
  int64_t rows = threads;
  for (int64_t i = 0; i < features; ++i) {
    const int64_t runs = (colptr[i + 1] - colptr[i] + kRun - 1) / kRun;
    rows = runs > rows ? runs : rows;
  }
  return rows * d;
}

#ifdef SAE_FAST_HAS_AVX512
namespace avx512 { const Kernels& kernels(); }
#endif
#ifdef SAE_FAST_HAS_AVX2
namespace avx2 { const Kernels& kernels(); }
#endif
namespace plain { const Kernels& kernels(); }

}  // namespace sae_fast
