// decode, loss and sampled_dots in one visit of each example: its decoder rows come from memory once and are still in
// cache when the residuals are dotted with them.  MATH.md §2 and, of prefixes, §8.
#include "sae_fast/kernel_table.hpp"
#include "sae_fast/parallel.hpp"
#include "sae_fast/rows.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// The value sets of a row of the batch: its residuals of prefix g are r[v] + g * stride.
struct Sets {
  int n;
  const float* values[2];
  float* r[2];
  int64_t stride;
};

static inline Sets sets_of(const args::decode_loss& a, int64_t b) {
  const int64_t at = b * a.d, stride = a.code.rows * a.d;
  if (!a.gates) return {1, {a.magnitudes}, {a.residual + at}, stride};
  return {2, {a.magnitudes, a.gates}, {a.residual + at, a.residual_aux + at}, stride};
}

static inline void subtract_from(float* __restrict r, const float* __restrict b_dec, const float* __restrict target,
                                 int64_t d) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) r[k] += b_dec[k] - target[k];
}

// The same, and the next prefix's sums begin with what r has.
static inline void subtract_from(float* __restrict r, float* __restrict next, const float* __restrict b_dec,
                                 const float* __restrict target, int64_t d) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    next[k] = r[k];
    r[k] += b_dec[k] - target[k];
  }
}

// The residuals of all prefixes, in one walk of the entries.
static void decode_prefixes(const args::decode_loss& a, const Sets& sets, int64_t b) {
  const Csr code = a.code;
  const int64_t d = a.d, end = code.indptr[b + 1], groups = a.bounds.n;
  const float *W = a.W, *target = a.target + b * d;
  int64_t j = code.indptr[b];
  for (int v = 0; v < sets.n; ++v) zero(sets.r[v], d);
  for (int64_t g = 0; g < groups; ++g) {
    int64_t stop = j;
    if (g + 1 == groups) stop = end;
    while (stop < end && code.indices[stop] < a.bounds.at[g + 1]) ++stop;
    const int64_t at = g * sets.stride;
    for (; j + 4 <= stop; j += 4) {
      const float* rows[4];
      for (int q = 0; q < 4; ++q) rows[q] = W + code.indices[j + q] * d;
      for (int v = 0; v < sets.n; ++v) axpy4(sets.r[v] + at, rows, sets.values[v] + j, d);
    }
    for (; j < stop; ++j)
      for (int v = 0; v < sets.n; ++v) axpy(sets.r[v] + at, W + code.indices[j] * d, sets.values[v][j], d);
    for (int v = 0; v < sets.n; ++v) {
      float* r = sets.r[v] + at;
      if (g + 1 == groups) subtract_from(r, a.b_dec, target, d);
      else subtract_from(r, r + sets.stride, a.b_dec, target, d);
    }
  }
}

// A prefix's residual becomes the sum c r + R of the next prefix (null: none).  Returns c |r|^2.
static inline double reach(float* __restrict r, const float* __restrict next, float c, int64_t d) {
  const double square = dot(r, r, d);
  if (next) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) r[k] = c * r[k] + next[k];
  } else if (c != 1.0f) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) r[k] *= c;
  }
  return c * square;
}

// The gradients of the entries first .. last, of group g; with kZeros also where the value is 0.  Returns what they cost,
// not yet divided.
template <bool kZeros>
static double value_gradients(const args::decode_loss& a, const Sets& sets, int64_t g, int64_t first,
                              int64_t last) noexcept {
  const float two = static_cast<float>(2.0 / a.normaliser), one = static_cast<float>(1.0 / a.normaliser);
  const int32_t* indices = a.code.indices;
  const float *magnitudes = a.magnitudes, *gates = a.gates, *W = a.W;
  const int64_t d = a.d;
  const float *r = sets.r[0] + g * sets.stride, *ra = gates ? sets.r[1] + g * sets.stride : nullptr;
  const float* sparse = gates ? gates : magnitudes;
  float* g_mag = a.grads;
  float* g_gate = gates ? a.grads + a.nnz : a.grads;
  double cost = 0;
  const auto finish = [&](int64_t at, float dot_mag, float dot_aux) {
    const float weight = a.sparsity_weight[indices[at]];
    const float gradient = magnitudes[at] == 0.0f && !kZeros ? 0.0f : two * dot_mag;
    if (gates) {
      g_mag[at] = gradient;
      g_gate[at] = gates[at] == 0.0f ? (kZeros ? two * dot_aux : 0.0f) : two * dot_aux + one * weight;
    } else {
      g_gate[at] = magnitudes[at] == 0.0f ? gradient : gradient + one * weight;
    }
    cost += weight * sparse[at];
  };
  int64_t j = first;
  for (; j + 4 <= last; j += 4) {
    const float* rows[4];
    float s[4], sa[4] = {0, 0, 0, 0};
    for (int q = 0; q < 4; ++q) rows[q] = W + indices[j + q] * d;
    dot4(r, rows, s, d);
    if (gates) dot4(ra, rows, sa, d);
    for (int q = 0; q < 4; ++q) finish(j + q, s[q], sa[q]);
  }
  for (; j < last; ++j) {
    const float* row = W + indices[j] * d;
    finish(j, dot(r, row, d), gates ? dot(ra, row, d) : 0.0f);
  }
  return cost;
}

void decode_loss(const args::decode_loss& a) {
  const auto gradients = a.zeros ? value_gradients<true> : value_gradients<false>;
  parallel_for(a.code.rows, 8, a.threads, [&](int64_t b, int) {
    const Sets sets = sets_of(a, b);
    decode_prefixes(a, sets, b);
    double squares[2] = {0, 0}, sparsity = 0;
    const int64_t begin = a.code.indptr[b];
    int64_t last = a.code.indptr[b + 1];
    for (int64_t g = a.bounds.n; g-- > 0;) {
      const float c = a.prefix_weights ? a.prefix_weights[g] : 1.0f;
      for (int v = 0; v < sets.n; ++v) {
        float* r = sets.r[v] + g * sets.stride;
        squares[v] += reach(r, g + 1 < a.bounds.n ? r + sets.stride : nullptr, c, a.d);
      }
      int64_t first = last;
      if (g == 0) first = begin;
      while (first > begin && a.code.indices[first - 1] >= a.bounds.at[g]) --first;
      sparsity += gradients(a, sets, g, first, last);
      last = first;
    }
    a.losses[b * 3 + 0] = static_cast<float>(squares[0]);
    a.losses[b * 3 + 1] = static_cast<float>(sparsity);
    a.losses[b * 3 + 2] = static_cast<float>(squares[1]);
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
