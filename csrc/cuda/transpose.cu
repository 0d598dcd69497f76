#include "sae_fast/cuda/transpose.cuh"

#include "sae_fast/cuda/storage.cuh"

namespace sae_fast {
namespace gpu {

static Transposition transposition(Address begin, Address end, Address indices, Address counts, Address colptr, Address rows,
                                   Address perm, int64_t B, int64_t features, int64_t chunks) {
  return {at<const int64_t>(begin), at<const int64_t>(end), at<const int32_t>(indices), at<int32_t>(counts),
          at<int64_t>(colptr), at<int32_t>(rows), at<int64_t>(perm), B, features, chunks};
}

static void launch_transpose(void (*kernel)(const Transposition), dim3 grid, size_t shared_bytes, Address stream,
                             const Transposition& a) {
  launch("transpose", "rows " + std::to_string(a.B) + ", features " + std::to_string(a.features), kernel, grid, a.kThreads,
         shared_bytes, reinterpret_cast<Stream>(stream), a);
}

static dim3 owners(const Transposition& a) { return dim3((a.features + a.kFeatures - 1) / a.kFeatures, a.chunks); }

void transpose_count(Address begin, Address end, Address indices, Address counts, Address colptr, int64_t B, int64_t features,
                     int64_t chunks, Address stream) {
  const Transposition a = transposition(begin, end, indices, counts, colptr, 0, 0, B, features, chunks);
  launch_transpose(count_kernel, owners(a), a.kShared, stream, a);
  launch_transpose(scan_kernel, dim3((features + a.kThreads - 1) / a.kThreads), 0, stream, a);
}

void transpose_place(Address begin, Address end, Address indices, Address counts, Address colptr, Address rows, Address perm,
                     int64_t B, int64_t features, int64_t chunks, Address stream) {
  const Transposition a = transposition(begin, end, indices, counts, colptr, rows, perm, B, features, chunks);
  launch_transpose(place_kernel, owners(a), a.kShared, stream, a);
}

}  // namespace gpu
}  // namespace sae_fast
