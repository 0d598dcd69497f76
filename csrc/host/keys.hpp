// The order of pre-activations in the bits of floats: the key of a positive one ascends with it, a NaN's is above all; and the
// bfloat16 bounds that a screen gives of them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

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

// The key that an entry of this bound has at least: what was rounded to `bound` exceeds the bfloat16 before it, and the
// pre-activation by at most `excess`.
inline uint32_t at_least(int16_t bound, float excess) {
  const double least = static_cast<double>(host::widen(static_cast<uint16_t>(bound - 1))) - excess;
  if (!(least > 0)) return 0;
  float key = static_cast<float>(least);
  uint32_t bits = host::bits(key);
  return static_cast<double>(key) > least ? bits - 1 : bits;
}

}  // namespace keys
}  // namespace sae_fast
