// The operands of the screening product, and the test of what comes out.  Columns of both operands, width K:
//   [0, d)       the rows rounded to bfloat16, x~ and w~
//   [d, d+m)     outlier columns O again: what rounding took from x, against w~
//   then 7       bias - cut as three pieces against ones; four margins, each a product of a factor of x and a factor of w
//   the rest     zeros
// so that the product itself is an upper bound UB of u + bias - cut, and a candidate is what is not (UB <= 0).
// docs/screen.md derives every term.
#include <math.h>
#include <string.h>

#include "sae_fast/bf16.hpp"
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"

#if defined(SAE_FAST_ISA_AVX512)
#include <immintrin.h>
#endif

namespace sae_fast {
namespace SAE_FAST_ISA {

static constexpr uint16_t kOne = 0x3f80, kNaN = 0x7fc0;
enum Column { bias_pieces = 0, by_w_norm = Screen::kPieces, by_w_residual, by_w_outliers, constant, n_columns };
static_assert(n_columns == Screen::kPieces + Screen::kMargins, "a margin is a column");

void round_rows(const args::round_rows& a) {
  parallel_for(a.n, 16, a.threads, [&](int64_t i, int) {
    round_row(a.A + i * a.d, a.d, a.out + i * a.K, a.norms + 2 * i);
    for (int64_t k = a.d; k < a.K; ++k) a.out[i * a.K + k] = 0;
  });
}

int64_t stale_rows(const args::stale_rows& given) {
  int64_t stale = 0;
  parallel_for(given.n, 16, given.threads, [&](int64_t i, int) {
    const int64_t d = given.d;
    const float* row = given.A + i * d;
    const uint16_t* rounded = given.rounded + i * d;
    const double* norms = given.norms + 2 * i;
    int differs = 0;
    double norm2 = 0, residual2 = 0;  // a change within the rounding shows in these alone
#pragma omp simd reduction(| : differs) reduction(+ : norm2, residual2)
    for (int64_t k = 0; k < d; ++k) {
      const float a = row[k], residual = a - widen(rounded[k]);
      differs |= nearest(a) != rounded[k];
      norm2 += static_cast<double>(a) * a;
      residual2 += static_cast<double>(residual) * residual;
    }
    const double slack = 1.0 + 0x1p-40;  // of sums in another order
    differs |= ::sqrt(norm2) > norms[0] * slack || ::sqrt(residual2) > norms[1] * slack;
    if (differs) __atomic_fetch_add(&stale, 1, __ATOMIC_RELAXED);
  });
  return stale;
}

void column_residuals(const args::column_residuals& given) {
  const int64_t n = given.n, d = given.d, parts = given.parts;
  parallel_for(parts, 1, given.threads, [&](int64_t p, int) {
    float* sums = given.out + p * d;
    for (int64_t k = 0; k < d; ++k) sums[k] = 0;
    for (int64_t i = n * p / parts; i < n * (p + 1) / parts; ++i) {
      const float* a = given.A + i * d;
      const uint16_t* r = given.rounded + i * given.K;
#pragma omp simd
      for (int64_t k = 0; k < d; ++k) {
        const float residual = a[k] - widen(r[k]);
        sums[k] += residual * residual;
      }
    }
  });
}

// Whether products of this row neither overflow nor lose their margins to underflow; false for a NaN.
static inline bool in_range(double norm) { return norm == 0 || (norm >= 0x1p-40 && norm <= 0x1p40); }

// A row that leaves the decision to verification: against any row of the other operand its product is
// positive, or NaN.
static inline void always_candidate(Screen s, uint16_t* row, uint16_t* tail) {
  for (int64_t k = 0; k < s.K; ++k) row[k] = 0;
  tail[constant] = s.open;
}

void screen_x(const args::screen_x& a) {
  const Screen s = a.screen;
  const double* norms = a.norms;
  const double inflate = 1.0 + 2.0 * s.gamma;  // the margins are summed by the product too
  parallel_for(a.n, 16, a.threads, [&](int64_t b, int) {
    uint16_t* row = a.rows + b * s.K;
    uint16_t* low_parts = row + s.d;
    uint16_t* tail = low_parts + s.m;
    if (s.terms == nullptr) {
      tail[0] = tail[1] = tail[2] = norms[2 * b] == norms[2 * b] ? kOne : kNaN;
      return;
    }
    if (!in_range(norms[2 * b])) {
      always_candidate(s, row, tail);
      return;
    }
    // Over the outlier columns: |x~ + low|^2, what low still misses, and what to take out of the whole row's sums.
    double kept2 = 0, missed2 = 0, residual2 = 0, rounded2 = 0, all_rounded2 = 0;
    for (int64_t o = 0; o < s.m; ++o) {
      const int64_t k = s.outliers[o];
      const double high = widen(row[k]), residual = a.x[b * s.d + k] - high;
      low_parts[o] = nearest(static_cast<float>(residual));
      const double low = widen(low_parts[o]);
      kept2 += (high + low) * (high + low);
      missed2 += (residual - low) * (residual - low);
      residual2 += residual * residual;
      rounded2 += high * high;
    }
#pragma omp simd reduction(+ : all_rounded2)
    for (int64_t k = 0; k < s.d; ++k) {
      const double high = widen(row[k]);
      all_rounded2 += high * high;
    }
    const double all_residual2 = norms[2 * b + 1] * norms[2 * b + 1];
    // A difference of sums loses up to 2^-50 of the larger: added back, so that it stays an upper bound.
    const double guard = s.m > 0 ? 0x1p-40 : 0.0;
    const double rest_rounded = ::sqrt(::fabs(all_rounded2 - rounded2) + guard * all_rounded2);
    const double rest_residual = ::sqrt(::fabs(all_residual2 - residual2) + guard * all_residual2);
    tail[0] = tail[1] = tail[2] = kOne;
    tail[by_w_norm] = upward((s.terms[Screen::x_residual] * rest_residual + s.terms[Screen::low_residual] * ::sqrt(missed2) +
                              s.terms[Screen::accumulation] * 2.1 * s.gamma * norms[2 * b]) * inflate);
    tail[by_w_residual] = upward(rest_rounded * inflate);
    tail[by_w_outliers] = upward(::sqrt(kept2) * inflate);
    tail[constant] = kOne;
  });
}

void screen_w(const args::screen_w& a) {
  const Screen s = a.screen;
  const double* norms = a.norms;
  parallel_for(a.n, 16, a.threads, [&](int64_t i, int) {
    uint16_t* row = a.rows + i * s.K;
    uint16_t* tail = row + s.d + s.m;
    const double level = a.cut ? a.cut[i] : 0.0, size = ::fabs(a.bias[i]) + ::fabs(level);
    for (int64_t k = s.d + s.m; k < s.K; ++k) row[k] = 0;
    if (s.terms != nullptr && !(in_range(norms[2 * i]) && size <= 0x1p100)) {
      always_candidate(s, row, tail);
      return;
    }
    if (a.rounded != nullptr) ::memcpy(row, a.rounded + i * s.d, s.d * sizeof(uint16_t));
    double outlier2 = 0;
    for (int64_t o = 0; o < s.m; ++o) {
      row[s.d + o] = row[s.outliers[o]];
      const double residual = a.W[i * s.d + s.outliers[o]] - widen(row[s.d + o]);
      outlier2 += residual * residual;
    }
    double rest = a.bias[i] - level;
    for (int piece = 0; piece < Screen::kPieces; ++piece) {
      tail[piece] = nearest(static_cast<float>(rest));
      rest -= widen(tail[piece]);
      if (!(::fabs(rest) < 0x1p127)) rest = 0;  // the first piece is an infinity or NaN
    }
    if (s.terms == nullptr) {
      if (norms[2 * i] != norms[2 * i]) tail[0] = kNaN;
      return;
    }
    tail[by_w_norm] = upward(norms[2 * i]);
    tail[by_w_residual] = upward(s.terms[Screen::w_residual] * norms[2 * i + 1]);
    tail[by_w_outliers] = upward(s.terms[Screen::w_outliers] * ::sqrt(outlier2));
    const double bias_error = ::fabs(rest) + (1.1 * s.gamma + 0x1p-22) * size;
    tail[constant] = upward((s.terms[Screen::bias] * bias_error + s.terms[Screen::least] * kSmallestMargin) *
                            (1.0 + 2.0 * s.gamma));
  });
}

int64_t screen(const args::screen& a) {
  const uint16_t* ub = a.ub;
  const int64_t n = a.n;
  const int16_t above = a.above;
  const int32_t first = a.first;
  int32_t* indices = a.indices;
  int64_t count = 0, k = 0;
  constexpr int16_t kMinusInfinity = static_cast<int16_t>(0xff80);
#if defined(SAE_FAST_ISA_AVX512)
  const __m512i level = _mm512_set1_epi16(above), minus_infinity = _mm512_set1_epi16(kMinusInfinity);
  for (; k + 32 <= n; k += 32) {
    const __m512i v = _mm512_loadu_si512(ub + k);
    uint32_t m = _mm512_cmpgt_epi16_mask(v, level) | _mm512_cmpgt_epu16_mask(v, minus_infinity);
    for (; m != 0; m &= m - 1) indices[count++] = first + static_cast<int32_t>(k) + __builtin_ctz(m);
  }
#endif
  for (; k < n; ++k)  // a positive number above, or a NaN of either sign
    if (static_cast<int16_t>(ub[k]) > above || ub[k] > static_cast<uint16_t>(kMinusInfinity))
      indices[count++] = first + static_cast<int32_t>(k);
  return count;
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
