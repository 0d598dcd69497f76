// The order of pre-activations in the bits of floats: the key of a positive one ascends with it, a NaN's is above all; and the
// bfloat16 bounds that a screen gives of them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "sae_fast/bf16.hpp"

namespace sae_fast {
namespace keys {

constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
constexpr int16_t kNoBound = 0x7f80, kNaNBound = 0x7fff;  // from infinity on: of what is out of range

// The least bfloat16 that is no less; of a NaN, and of what is not positive, the bound that keeps or drops it.
inline int16_t upward(float bound) {
  if (bound != bound) return kNaNBound;
  return bound > 0 ? static_cast<int16_t>((host::bits(bound) + 0xffffu) >> 16) : 0;
}

inline uint32_t key_of(float pi) { return pi != pi ? kNaN : host::bits(pi); }

// What a pre-activation has to exceed to be at the floor or above.
inline float below(uint32_t floor) {
  const uint32_t bits = floor == 0 ? 0 : std::min(floor - 1, kInfinity);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Bounds of |pi| from those of pi, which it is below by at most `excess`: what was rounded to `bound` exceeds the bfloat16
// before it, at most 2^-7 of it away, so -pi is less than `excess` minus that.  A NaN stays one.
inline const uint16_t* of_magnitudes(const uint16_t* bounds, int64_t n, float excess, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const float bound = host::widen(bounds[i]), difference = excess - bound;
    const float rounded = 0x1.01p-7f * std::fabs(bound) + 0x1p-22f * std::fabs(difference) + 0x1p-132f;
    const float negated = difference + rounded;
    const uint16_t upward = static_cast<uint16_t>((host::bits(negated < 0 ? 0.0f : negated) + 0xffffu) >> 16);
    out[i] = bound >= negated ? bounds[i] : upward;
  }
  return out;
}

// The key that an entry of this bound has at least: what was rounded to `bound` exceeds the bfloat16 before it, and the
// pre-activation by at most `excess`.
inline uint32_t at_least(int16_t bound, float excess) {
  const double least = static_cast<double>(host::widen(static_cast<uint16_t>(bound - 1))) - excess;
  if (!(least > 0)) return 0;
  float key = static_cast<float>(least);
  uint32_t bits = host::bits(key);
  return static_cast<double>(key) > least ? bits - 1 : bits;
}

// Where a pre-activation of this bound is likely to be: half of the excess below.
inline int16_t about(int16_t bound, float excess) {
  const float likely = host::widen(static_cast<uint16_t>(bound)) - 0.5f * excess;
  return likely > 0 ? static_cast<int16_t>(host::bits(likely) >> 16) : 0;
}

// The largest value that `wanted` of the numbers, none of them negative, reach: 1 to their number.
template <class Number>
Number reached(const std::vector<Number>& numbers, int64_t wanted) {
  Number value = 0;
  for (int bit = 8 * sizeof(Number) - 2; bit >= 0; --bit) {
    const Number higher = static_cast<Number>(value | Number{1} << bit);
    int32_t count = 0;
    for (const Number number : numbers) count += number >= higher;
    if (count >= wanted) value = higher;
  }
  return value;
}

// The same, of how many numbers have each value.
inline int64_t reached_of(const std::vector<int64_t>& counts, int64_t wanted) {
  int64_t value = static_cast<int64_t>(counts.size()) - 1;
  for (int64_t best = 0; value > 0 && (best += counts[value]) < wanted;) --value;
  return value;
}

}  // namespace keys
}  // namespace sae_fast
