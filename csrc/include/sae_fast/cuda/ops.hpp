// What sae_fast._C_cuda has: addresses and sizes, in the order of the launchers in kernels/*.py, which check them.  A stream is
// CUDA's handle.  Errors of a launch are exceptions that name the op and its sizes.
#pragma once
#include <cstdint>

namespace sae_fast {
namespace gpu {

using Address = uintptr_t;
// What the launchers have to know of the kernels.
constexpr int kResidualColumns = 128;  // of a slice of decode_loss
constexpr int kCountedRows = 256;      // of a chunk of transpose
constexpr int kStepColumns = 512;      // of a slice of weight_step, whose norms are kept together
constexpr int kUnitColumns = 8192;     // of a unit row of weight_step, at most; of one that is not aligned, half as many

enum class Storage : int { float32 = 0, float16 = 1, bfloat16 = 2 };

void residuals(Storage, Storage target_storage, int V, Address begin, Address end, Address indices, Address values, Address W,
               Address b_dec, Address target, Address residuals, Address partials, Address squares, int64_t rows, int64_t d,
               int64_t slices, int64_t capacity, Address stream);
void finish(Storage, int V, int kind, bool auxiliary, bool zeros, int formula, int window, Address begin, Address end,
            Address indices, Address values, Address cost, Address partials, Address squares, Address losses, Address grads,
            Address u, Address bias, Address first, Address second, Address coefficient, Address l0, Address delta,
            Address entries, Address decoder, Address along, Address norms, int64_t rows, int64_t slices, int64_t capacity,
            double normaliser, double number, double bandwidth, Address stream);
void partials(Storage, Storage A_storage, Address owner, Address first, Address colptr, Address rows, Address perm,
              Address values, Address A, Address values2, Address A2, Address out, int64_t M, int64_t d, int64_t first_feature,
              int64_t last_feature, int64_t run, Address stream);
void outer(Storage, Storage out_storage, Address colptr, Address rows, Address perm, Address values, Address A, Address values2,
           Address A2, Address first, Address partials, Address features, Address out, int64_t n, int64_t d,
           int64_t first_feature, bool accumulate, Address stream);
void weight_step(Storage A_storage, Address W, Address m, Address v, Address decay, Address colptr, Address rows, Address perm,
                 Address values, Address A, Address values2, Address A2, Address first, Address partials, Address own,
                 Address constants, Address scale, Address skip, int skip_bytes, Address shadow, Address norms,
                 Address along, Address squares, int64_t n, int64_t d, int64_t first_feature, int64_t K, int64_t norm_columns,
                 bool unit_rows, Address stream);
void verify(Storage, Storage out_storage, int kind, Address x, Address W, Address x_norms, Address W_norms, Address bias,
            Address cut, Address first, Address second, Address begin, Address end, Address candidates,
            Address indices, Address u, Address values, Address end_out, int64_t rows, int64_t d, int64_t x_norm_columns,
            int64_t W_norm_columns, int64_t capacity, Address stream);
void transpose_count(Address begin, Address end, Address indices, Address counts, Address colptr, int64_t B, int64_t features,
                     int64_t chunks, Address stream);
void transpose_place(Address begin, Address end, Address indices, Address counts, Address colptr, Address rows, Address perm,
                     int64_t B, int64_t features, int64_t chunks, Address stream);

#define SAE_FAST_CUDA_FUNCTIONS(EACH) \
  EACH(residuals) EACH(finish) EACH(partials) EACH(outer) EACH(weight_step) EACH(verify) EACH(transpose_count) \
  EACH(transpose_place)

}  // namespace gpu
}  // namespace sae_fast
