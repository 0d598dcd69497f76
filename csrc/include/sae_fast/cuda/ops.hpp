// What sae_fast._C_cuda has: addresses and sizes, in the order of the launchers in kernels/*.py, which check them.  A stream is
// CUDA's handle.  Errors of a launch are exceptions that name the op and its sizes.
#pragma once
#include <cstdint>

namespace sae_fast {
namespace gpu {

using Address = uintptr_t;
enum class Storage : int { float32 = 0, float16 = 1, bfloat16 = 2 };

void residuals(Storage, Storage target_storage, int V, Address begin, Address end, Address indices, Address values, Address W,
               Address b_dec, Address target, Address residuals, Address partials, Address squares, int64_t rows, int64_t d,
               int64_t slices, int64_t capacity, Address stream);
void finish(Storage, int V, Address begin, Address end, Address indices, Address values, Address weight, Address partials,
            Address squares, Address losses, Address grads, Address u, Address scale, Address delta, Address entries,
            Address decoder, int64_t rows, int64_t slices, int64_t capacity, double normaliser, Address stream);

}  // namespace gpu
}  // namespace sae_fast
