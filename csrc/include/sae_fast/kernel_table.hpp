// Declarations of one instruction set's kernels; csrc/cpu/table.cpp collects them.  Contracts: cpu.hpp.
#pragma once
#include "sae_fast/types.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

int64_t compact(const float*, const float*, const float*, int64_t, int32_t, int32_t*, float*);
void round_rows(const float*, int64_t, int64_t, int64_t, uint16_t*, double*, int);
int64_t stale_rows(const float*, int64_t, int64_t, const uint16_t*, const double*, int);
void column_residuals(const float*, const uint16_t*, int64_t, int64_t, int64_t, int, float*, int);
void screen_x(Screen, const float*, int64_t, const double*, uint16_t*, int);
void screen_w(Screen, const uint16_t*, const float*, int64_t, const double*, const float*, const float*, uint16_t*, int);
int64_t screen(const uint16_t*, int64_t, int16_t, int32_t, int32_t*);
int64_t verify(const float*, const float*, int64_t, const float*, const float*, const int32_t*, int64_t, int32_t*, float*);
void dot_block(const float*, int64_t, const float*, int64_t, int64_t, float*);
void activate(Activation, int64_t, const int32_t*, const float*, const float*, const float*, const float*,
              const float*, float*, int);
void decode(Csr, int64_t, const float*, int64_t, const float*, int64_t, const int64_t*, int64_t, float*, int);
void sampled_dots(Csr, const float*, const float*, int64_t, float*, int);
void decode_loss(Csr, int64_t, const float*, const float*, const float*, const float*, const float*, const float*,
                 double, int64_t, float*, float*, float*, float*, int);
void transpose(Csr, int64_t, int, int64_t*, int64_t*, int32_t*, int64_t*, int);
void outer(Csc, const Source*, int, int64_t, const int64_t*, int64_t, int64_t, float*, float*, int);
void grad_sqnorm(Csc, const Source*, int, int64_t, int64_t, int64_t, const float*, const float*, bool, double*, float*, int);
void weight_step(Csc, const Source*, int, int64_t, int64_t, int64_t, const float*, float, Adam, float*, float*,
                 int64_t*, Shadow, float*, int);
void row_step(const float*, const int64_t*, int64_t, int64_t, float, Adam, float*, float*, int64_t*, Shadow, float*, int);
void scatter(const int64_t*, const int32_t*, const int64_t*, int64_t, int64_t, int64_t, const float*, float*, int);
void gather(const int64_t*, const int32_t*, int64_t, int64_t, int64_t, const float*, float*, int);
void value_gradients(bool, Csr, int64_t, const float*, const float*, const float*, const float*, double, int64_t, int,
                     float*, const float*, float*, float*, int);

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
