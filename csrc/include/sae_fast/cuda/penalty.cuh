// The penalties of objectives, by their numbers in sae_fast/penalty.py; as kernels/_penalty.py has them.
#pragma once
#include <cmath>

#include "sae_fast/cuda/device.cuh"

namespace sae_fast {
namespace gpu {

enum class Formula : int { none = 0, linear = 1, power = 2, rooted = 3, step = 4, quadratic = 5, target = 6, tanh = 7 };
enum class Window : int { none = 0, pi = 1, to_input = 2, of_f = 3 };  // straight-through windows

struct Penalty {
  Formula formula;
  Window window;
  float number, bandwidth;
  const float* coefficient;  // 0-d, or null for 1
  const void* l0;            // [rows] int32, or for `target` a double: the batch's mean

  __device__ __forceinline__ float weight() const { return coefficient ? *coefficient : 1.0f; }
  __device__ __forceinline__ bool of_powers() const { return formula == Formula::power || formula == Formula::rooted; }
};

// a^p of what is positive, else 0.
__device__ __forceinline__ double power(double a, double p) { return a > 0 ? ::exp2(p * ::log2(a)) : 0.0; }

struct OfRow {
  double penalty, slope;
};

// An example's penalty and the slope that its entries share, `powers` the sum of its a^p.
__device__ __forceinline__ OfRow of_row(const Penalty& a, int64_t b, double powers) {
  const double c = a.weight(), number = a.number;
  switch (a.formula) {
    case Formula::power: return {c * powers, c};
    case Formula::rooted: return {c * power(powers, 1 / number), c * power(powers, 1 / number - 1) / number};
    case Formula::step: return {c * static_cast<const int32_t*>(a.l0)[b], c};
    case Formula::quadratic: {
      const double off = static_cast<const int32_t*>(a.l0)[b] - number;
      return {c * (2 / number) * off * off, c * (4 / number) * off};
    }
    case Formula::target: {
      const double off = *static_cast<const double*>(a.l0) / number - 1;
      return {c * off * off, c * (2 / number) * off};
    }
    default: return {0.0, 0.0};
  }
}

struct OfEntry {
  float own, g, of_norm;  // what it adds to the penalty; the value's gradient; n / c times that of its row's norm
};

// slope and one are divided by n.
__device__ __forceinline__ OfEntry of_entry(const Penalty& a, bool zeros, float last, float g, float slope, float norm, float one) {
  const float c = a.weight();
  if (a.formula == Formula::tanh) {
    const float x = a.number * last * norm;
    const double e = ::exp(-2.0 * ::fabs(static_cast<double>(x))), squashed = (1 - e) / (1 + e);
    const float its_slope = static_cast<float>(4 * e / ((1 + e) * (1 + e)));
    return {c * static_cast<float>(x < 0 ? -squashed : squashed), g + its_slope * (norm * (a.number * c * one)), its_slope * (a.number * last)};
  }
  float own = 0.0f, penalised = g;
  if (a.formula == Formula::linear) {
    own = c * norm * last;
    penalised = g + one * (c * norm);
  } else if (a.of_powers()) {
    penalised = g + slope * static_cast<float>(a.number * power(last, a.number - 1.0));
  }
  return {own, last == 0.0f ? (zeros ? g : 0.0f) : penalised, 0.0f};
}

struct Estimate {
  float delta, threshold;
};

// The gradients of pi and of the threshold by the windows of MATH.md §9, from those of the values.
__device__ __forceinline__ Estimate estimate(const Penalty& a, float pi, float threshold, float g, float slope) {
  const auto within = [](float z) { return z > -0.5f && z < 0.5f; };
  const bool fires = pi > threshold, inside = within((pi - threshold) / a.bandwidth);
  const float rest = threshold / a.bandwidth;
  float ours = inside ? g * rest : 0.0f;
  if (a.formula != Formula::tanh) {
    float step = inside;
    if (a.window == Window::of_f)  // less what the feature's constant has for all examples
      step = static_cast<float>(inside && fires) - static_cast<float>(fires && within(rest));
    ours += step * (slope / a.bandwidth);
  }
  return {(fires ? g : 0.0f) + (a.window == Window::to_input ? ours : 0.0f), -ours};
}

}  // namespace gpu
}  // namespace sae_fast
