// bfloat16 as 16 bits: the upper half of a float.
#pragma once
#include <cstdint>
#include <cstring>

namespace sae_fast {
namespace SAE_FAST_ISA {

static inline uint32_t bits(float a) {
  uint32_t u;
  std::memcpy(&u, &a, 4);
  return u;
}

static inline float widen(uint16_t a) {
  const uint32_t u = static_cast<uint32_t>(a) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// Nearest, ties to even; subnormals become 0, as the hardware's products read them.  A finite value may become infinite.
static inline uint16_t nearest(float a) {
  const uint32_t u = bits(a), rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((rounded & 0x7f80u) == 0 ? 0 : rounded);
}

// Margins are never rounded down, and never so small that a product flushes them: at least a (1 + 2^-16) and 2^-60, but
// 0 for 0.  0 <= a < 2^100.
constexpr double kSmallestMargin = 0x1p-60;
static inline uint16_t upward(double a) {
  if (a == 0) return 0;
  const double inflated = (a > kSmallestMargin ? a : kSmallestMargin) * (1.0 + 0x1p-16);
  return static_cast<uint16_t>((bits(static_cast<float>(inflated) * (1.0f + 0x1p-22f)) + 0xffffu) >> 16);
}

// A row rounded, with norms [2]: its own, and that of what rounding took from it.  Sums in double neither overflow nor
// lose small terms.
static inline void round_row(const float* __restrict a, int64_t d, uint16_t* __restrict to, double* norms) {
  double norm2 = 0, residual2 = 0;
#pragma omp simd reduction(+ : norm2, residual2)
  for (int64_t k = 0; k < d; ++k) {
    const uint16_t rounded = nearest(a[k]);
    to[k] = rounded;
    const float residual = a[k] - widen(rounded);
    norm2 += static_cast<double>(a[k]) * a[k];
    residual2 += static_cast<double>(residual) * residual;
  }
  norms[0] = __builtin_sqrt(norm2);
  norms[1] = __builtin_sqrt(residual2);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
