// The dots that decide: u in fp32 for chosen entries of a row, or for all entries of a block, in the same fixed order.
#include "sae_fast/dots.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

int64_t verify(const float* x, const float* W, int64_t d, const float* bias, const float* cut,
               const int32_t* candidates, int64_t n, int32_t* indices, float* u) {
  int64_t members = 0;
  for (int64_t j = 0; j < n; j += 4) {
    const int64_t here = n - j < 4 ? n - j : 4;
    const float* rows[4];
    float dots[4], *out[1] = {dots};
    for (int q = 0; q < 4; ++q) rows[q] = W + candidates[j + (q < here ? q : 0)] * d;
    fixed_dots<1, 4>(&x, rows, d, out);
    for (int q = 0; q < here; ++q) {
      const int32_t i = candidates[j + q];
      if (dots[q] + bias[i] <= (cut ? cut[i] : 0.0f)) continue;  // a NaN stays
      indices[members] = i;
      u[members++] = dots[q];
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

void dot_block(const float* x, int64_t rows, const float* W, int64_t features, int64_t d, float* out) {
  for (int64_t i = 0; i < features; i += kBlockFeatures)
    for (int64_t b = 0; b < rows; b += kBlockRows)
      ragged_dots<kBlockRows, kBlockFeatures>(x + b * d, rows - b, W + i * d, features - i, d, out + b * features + i,
                                              features);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
