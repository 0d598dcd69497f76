// Vector arithmetic on rows of length d, shared by the kernels.  `omp simd` lets the compiler use the whole vector width
// and fixes the order of each sum, so a result repeats bit for bit.
#pragma once
#include <cstdint>

#include "sae_fast/types.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

// acc += sum of coefficient[j] * row[j], four rows a pass: one load and store of acc serves four products.
static inline void axpy4(float* __restrict acc, const float* const* row, const float* c, int64_t d) {
  const float *__restrict r0 = row[0], *__restrict r1 = row[1], *__restrict r2 = row[2], *__restrict r3 = row[3];
  const float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) acc[k] += (c0 * r0[k] + c1 * r1[k]) + (c2 * r2[k] + c3 * r3[k]);
}

static inline void axpy(float* __restrict acc, const float* __restrict row, float c, int64_t d) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) acc[k] += c * row[k];
}

static inline float dot(const float* __restrict a, const float* __restrict b, int64_t d) {
  float s0 = 0, s1 = 0;
  const int64_t half = d / 2;
#pragma omp simd reduction(+ : s0, s1)
  for (int64_t k = 0; k < half; ++k) {
    s0 += a[k] * b[k];
    s1 += a[half + k] * b[half + k];
  }
  if (d & 1) s0 += a[d - 1] * b[d - 1];
  return s0 + s1;
}

// out[j] = a . row[j]: four independent sums hide the latency of each.
static inline void dot4(const float* __restrict a, const float* const* row, float* out, int64_t d) {
  const float *__restrict r0 = row[0], *__restrict r1 = row[1], *__restrict r2 = row[2], *__restrict r3 = row[3];
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t k = 0; k < d; ++k) {
    s0 += a[k] * r0[k];
    s1 += a[k] * r1[k];
    s2 += a[k] * r2[k];
    s3 += a[k] * r3[k];
  }
  out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

constexpr int64_t kAhead = 128;  // floats fetched at a time

// Asks for row[begin .. end), which may lie past the end of an array.
static inline void prefetch(const float* row, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; k += 16) __builtin_prefetch(row + k);
}

// n of them, not initialised.
template <class T>
static inline T* take(const Memory& memory, int64_t n) {
  return static_cast<T*>(memory.take(memory.owner, n * static_cast<int64_t>(sizeof(T))));
}

static inline void zero(float* __restrict a, int64_t d) {
  for (int64_t k = 0; k < d; ++k) a[k] = 0.0f;
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
