// The dots that decide: u in fp32 for chosen entries of a row, or for all entries of a block, in the same fixed order.
#include "sae_fast/dots.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

int64_t verify(const args::verify& a) {
  int64_t members = 0;
  for (int64_t j = 0; j < a.n; j += 4) {
    const int64_t here = a.n - j < 4 ? a.n - j : 4;
    const float *rows[4], *next[4];
    float dots[4], *out[1] = {dots};
    for (int q = 0; q < 4; ++q) next[q] = a.W + a.candidates[j + 4 + q < a.n ? j + 4 + q : a.n - 1] * a.d;
    for (int q = 0; q < 4; ++q) rows[q] = a.W + a.candidates[j + (q < here ? q : 0)] * a.d;
    fixed_dots<1, 4>(&a.x, rows, a.d, out, [&](int64_t k) {
      for (const float* row : next) __builtin_prefetch(row + k);
    });
    for (int q = 0; q < here; ++q) {
      const int32_t i = a.candidates[j + q];
      if (dots[q] + a.bias[i] <= (a.cut ? a.cut[i] : 0.0f)) continue;  // a NaN stays
      a.indices[members] = i;
      a.u[members++] = dots[q];
    }
  }
  return members;
}

// Indices past the end repeat the last row; their results are not written.
template <int R, int C>
static inline void ragged_dots(const float* x, int64_t rows, const float* W, int64_t features, int64_t d, float* out,
                               int64_t stride) {
  const float *xs[R], *ws[C];
  float dots[R][C], *to[R];
  for (int r = 0; r < R; ++r) xs[r] = x + (r < rows ? r : rows - 1) * d, to[r] = dots[r];
  for (int c = 0; c < C; ++c) ws[c] = W + (c < features ? c : features - 1) * d;
  fixed_dots<R, C>(xs, ws, d, to);
  for (int r = 0; r < R && r < rows; ++r)
    for (int c = 0; c < C && c < features; ++c) out[r * stride + c] = dots[r][c];
}

void dot_block(const args::dot_block& a) {
  for (int64_t i = 0; i < a.features; i += kBlockFeatures)
    for (int64_t b = 0; b < a.rows; b += kBlockRows)
      ragged_dots<kBlockRows, kBlockFeatures>(a.x + b * a.d, a.rows - b, a.W + i * a.d, a.features - i, a.d,
                                              a.out + b * a.features + i, a.features);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
