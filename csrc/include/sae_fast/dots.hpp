// Dot products in one fixed order of summation, whatever the number of rows they are taken with: lane l of 16 sums the
// terms k = l, l + 16, l + 32 ... in turn, and the lanes are added as a tree.  encode's `exact` support is defined by these
// dots, so every route to it must take them from here.
#pragma once
#include <cstdint>
#include <cstring>

namespace sae_fast {
namespace SAE_FAST_ISA {

#if defined(SAE_FAST_ISA_AVX512)
constexpr int kWidth = 16, kBlockRows = 4, kBlockFeatures = 6;  // a block's sums fill the registers
#elif defined(SAE_FAST_ISA_AVX2)
constexpr int kWidth = 8, kBlockRows = 3, kBlockFeatures = 2;
#else
constexpr int kWidth = 4, kBlockRows = 3, kBlockFeatures = 1;
#endif
constexpr int kLanes = 16, kParts = kLanes / kWidth;  // a vector of lanes is kParts registers

template <int N>
struct Floats {
  typedef float vector __attribute__((vector_size(4 * N)));
};
using Register = Floats<kWidth>::vector;

static inline Register load(const float* a) {
  Register v;
  std::memcpy(&v, a, sizeof v);
  return v;
}

static inline float sum_lanes(const Register* parts) {
  Floats<8>::vector eight[2];
  std::memcpy(eight, parts, sizeof eight);
  const Floats<8>::vector e = eight[0] + eight[1];
  Floats<4>::vector four[2];
  std::memcpy(four, &e, sizeof four);
  const Floats<4>::vector f = four[0] + four[1];
  return (f[0] + f[2]) + (f[1] + f[3]);
}

// sums[r][c] += the terms of 16 values of each row
template <int R, int C>
static inline __attribute__((always_inline)) void add_terms(const float* const* x, const float* const* w, int64_t k,
                                                            Register (*sums)[C][kParts]) {
  for (int p = 0; p < kParts; ++p) {
    Register xs[R];
    for (int r = 0; r < R; ++r) xs[r] = load(x[r] + k + p * kWidth);
    for (int c = 0; c < C; ++c) {
      const Register ws = load(w[c] + k + p * kWidth);
      for (int r = 0; r < R; ++r) sums[r][c][p] += xs[r] * ws;
    }
  }
}

struct Nothing {
  void operator()(int64_t) const {}
};

// out[r][c] = x[r] . w[c]; before the terms from k on, ahead(k).
template <int R, int C, class Ahead = Nothing>
static inline __attribute__((always_inline)) void fixed_dots(const float* const* x, const float* const* w, int64_t d,
                                                             float* const* out, const Ahead& ahead = {}) {
  Register sums[R][C][kParts] = {};
  const int64_t whole = d / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    ahead(k);
    add_terms<R, C>(x, w, k, sums);
  }
  if (whole < d) {  // the rest, with zeros after it
    float x_rest[R][kLanes] = {}, w_rest[C][kLanes] = {};
    const float *xs[R], *ws[C];
    for (int r = 0; r < R; ++r) xs[r] = x_rest[r];
    for (int c = 0; c < C; ++c) ws[c] = w_rest[c];
    for (int64_t k = whole; k < d; ++k) {
      for (int r = 0; r < R; ++r) x_rest[r][k - whole] = x[r][k];
      for (int c = 0; c < C; ++c) w_rest[c][k - whole] = w[c][k];
    }
    add_terms<R, C>(xs, ws, 0, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sum_lanes(sums[r][c]);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
