// The activations, for host and device, by their numbers in sae_fast/activations: a struct each, and its place in
// SAE_FAST_ACTIVATIONS.  pi = u + bias, positive = relu(pi); `first` and `second` give an entry's element of the activation's
// vectors.
#pragma once
#include "sae_fast/types.hpp"

#ifdef __CUDACC__
#define SAE_FAST_INLINE __device__ __forceinline__
#else
#define SAE_FAST_INLINE inline
#endif

// All but relu, which is asked for last.
#define SAE_FAST_ACTIVATIONS(EACH) EACH(gated, 0, Gated) EACH(jumprelu, 2, JumpRelu)

namespace sae_fast {

#define NUMBER(name, number, Struct) name = number,
enum class Activation : int { SAE_FAST_ACTIVATIONS(NUMBER) relu = 1 };
#undef NUMBER

namespace {  // an instruction set's, or the GPU's, own

struct Pulled {  // gradients of u, of the bias and of what the vectors are made from
  float u, bias, first, second;
};

// Keeps a NaN, so that nothing non-finite vanishes before the loss is checked.
SAE_FAST_INLINE float relu(float a) { return a <= 0.0f ? 0.0f : a; }

// a b + c, with one rounding where the processor has that; a GPU's compiler decides for itself.
SAE_FAST_INLINE float fused(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) && !defined(__CUDACC__)
  return __builtin_fmaf(a, b, c);
#else
  return c + a * b;
#endif
}

struct Gated {  // first: exp(r_mag), second: b_mag; its gates, the second value set, are `positive`
  static constexpr int value_sets = 2, parameters = 2;
  template <class First, class Second>
  static SAE_FAST_INLINE float magnitude(float u, float pi, float, const First& first, const Second& second) {
    return pi <= 0.0f ? 0.0f : relu(first() * u + second());
  }
  template <class First>
  static SAE_FAST_INLINE Pulled pullback(float u, float g_mag, float g_gate, const First& first) {
    const float scaled = first() * g_mag;
    return {fused(first(), g_mag, g_gate), g_gate, scaled * u, g_mag};
  }
};

struct Relu {
  static constexpr int value_sets = 1, parameters = 0;
  template <class First, class Second>
  static SAE_FAST_INLINE float magnitude(float, float, float positive, const First&, const Second&) {
    return positive;
  }
  template <class First>
  static SAE_FAST_INLINE Pulled pullback(float, float g_mag, float, const First&) {
    return {g_mag, g_mag, 0.0f, 0.0f};
  }
};

struct JumpRelu : Relu {  // first: the threshold
  template <class First, class Second>
  static SAE_FAST_INLINE float magnitude(float, float pi, float positive, const First& first, const Second&) {
    return pi <= first() ? 0.0f : positive;
  }
};

// use(the activation of a kind)
template <class Use>
SAE_FAST_INLINE void with_activation(Activation kind, const Use& use) {
#define USE(name, number, Struct) if (kind == Activation::name) return use(Struct());
  SAE_FAST_ACTIVATIONS(USE)
#undef USE
  use(Relu());
}

}  // namespace
}  // namespace sae_fast
