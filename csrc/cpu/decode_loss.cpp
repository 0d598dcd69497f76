// decode, loss and sampled_dots in one visit of each example: its decoder rows come from memory once and are still in
// cache when the residuals are dotted with them; or in one walk each, where runs of features pay.
// MATH.md §2 and, of prefixes, §8.
#include "sae_fast/entries.hpp"
#include "sae_fast/kernel_table.hpp"
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

// The sums of prefix g begin with those of the one before.
static inline void start(const Sets& sets, int64_t g, int64_t d) {
  for (int v = 0; v < sets.n; ++v) {
    float* r = sets.r[v] + g * sets.stride;
    zero(r, d);
    if (g > 0) axpy(r, r - sets.stride, 1.0f, d);
  }
}

// Adds the entries j .. end to the sums of prefix g.
static inline void add_entries(const args::decode_loss& a, const Sets& sets, int64_t g, int64_t j, int64_t end) {
  const int64_t d = a.d, at = g * sets.stride;
  const int32_t* indices = a.code.indices;
  for (; j + 4 <= end; j += 4) {
    const float* rows[4];
    for (int q = 0; q < 4; ++q) rows[q] = a.W + indices[j + q] * d;
    for (int v = 0; v < sets.n; ++v) axpy4(sets.r[v] + at, rows, sets.values[v] + j, d);
  }
  for (; j < end; ++j)
    for (int v = 0; v < sets.n; ++v) axpy(sets.r[v] + at, a.W + indices[j] * d, sets.values[v][j], d);
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

// From the sums of each prefix to the residuals that reach each group, and the example's losses.
static inline void finish_example(const args::decode_loss& a, const Sets& sets, int64_t b) {
  const float* sparse = a.gates ? a.gates : a.magnitudes;
  double squares[2] = {0, 0}, sparsity = 0;
  for (int64_t g = a.bounds.n; g-- > 0;)
    for (int v = 0; v < sets.n; ++v) {
      float* r = sets.r[v] + g * sets.stride;
      subtract_from(r, a.b_dec, a.target + b * a.d, a.d);
      const float* next = g + 1 < a.bounds.n ? r + sets.stride : nullptr;
      squares[v] += reach(r, next, a.prefix_weights ? a.prefix_weights[g] : 1.0f, a.d);
    }
  for (int64_t j = a.code.indptr[b]; j < a.code.indptr[b + 1]; ++j)
    sparsity += a.sparsity_weight[a.code.indices[j]] * sparse[j];
  a.losses[b * 3 + 0] = static_cast<float>(squares[0]);
  a.losses[b * 3 + 1] = static_cast<float>(sparsity);
  a.losses[b * 3 + 2] = static_cast<float>(squares[1]);
}

// The gradients of the entries first .. last, of group g; with kZeros also where the value is 0.
template <bool kZeros>
static void value_gradients(const args::decode_loss& a, const Sets& sets, int64_t g, int64_t first,
                            int64_t last) noexcept {
  const float two = static_cast<float>(2.0 / a.normaliser), one = static_cast<float>(1.0 / a.normaliser);
  const int32_t* indices = a.code.indices;
  const float *magnitudes = a.magnitudes, *gates = a.gates, *W = a.W;
  const int64_t d = a.d;
  const float *r = sets.r[0] + g * sets.stride, *ra = gates ? sets.r[1] + g * sets.stride : nullptr;
  float* g_mag = a.grads;
  float* g_gate = gates ? a.grads + a.nnz : a.grads;
  const auto finish = [&](int64_t at, float dot_mag, float dot_aux) {
    const float weight = a.sparsity_weight[indices[at]];
    const float gradient = magnitudes[at] == 0.0f && !kZeros ? 0.0f : two * dot_mag;
    if (gates) {
      g_mag[at] = gradient;
      g_gate[at] = gates[at] == 0.0f ? (kZeros ? two * dot_aux : 0.0f) : two * dot_aux + one * weight;
    } else {
      g_gate[at] = magnitudes[at] == 0.0f ? gradient : gradient + one * weight;
    }
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
}

void decode_loss(const args::decode_loss& a) {
  const auto gradients = a.zeros ? value_gradients<true> : value_gradients<false>;
  const int64_t groups = a.bounds.n, *bounds = a.bounds.at, run = run_of_features(a.code, bounds[groups], a.d);
  if (run < bounds[groups]) {
    for (int64_t g = 0; g < groups; ++g)
      for_entries(a.code, bounds[g], bounds[g + 1], run, a.threads, [&](int64_t b, int64_t j, int64_t end, bool starts) {
        const Sets sets = sets_of(a, b);
        if (starts) start(sets, g, a.d);
        add_entries(a, sets, g, j, end);
      });
    for (int64_t g = 0; g < groups; ++g)
      for_entries(a.code, bounds[g], bounds[g + 1], run, a.threads, [&](int64_t b, int64_t j, int64_t end, bool starts) {
        const Sets sets = sets_of(a, b);
        if (starts && g == 0) finish_example(a, sets, b);
        gradients(a, sets, g, j, end);
      });
    return;
  }
  parallel_for(a.code.rows, 8, a.threads, [&](int64_t b, int) {
    const Sets sets = sets_of(a, b);
    const int64_t begin = a.code.indptr[b], end = a.code.indptr[b + 1];
    const auto border = [&](int64_t g) { return first_from(a.code.indices, begin, end, bounds[g]); };
    for (int64_t g = 0; g < groups; ++g) {
      start(sets, g, a.d);
      add_entries(a, sets, g, border(g), border(g + 1));
    }
    finish_example(a, sets, b);
    for (int64_t g = groups; g-- > 0;) gradients(a, sets, g, border(g), border(g + 1));
  });
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
