#include "sae_fast/cuda/verify.cuh"

#include <type_traits>

#include "sae_fast/cuda/storage.cuh"

namespace sae_fast {
namespace gpu {

template <class T, class O>
static void verify_of(const Verify<T, O>& a, Stream stream) {
  const auto address = [](const T* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool aligned = a.d * sizeof(T) % 16 == 0 && (address(a.W) | address(a.x)) % 16 == 0;
  const std::string sizes = "rows " + std::to_string(a.rows) + ", d " + std::to_string(a.d) + ", capacity " +
                            std::to_string(a.capacity);
  const auto go = [&](auto kernel) {
    launch("verify", sizes, kernel, dim3(a.rows), a.kThreads, a.shared_bytes(a.d), stream, a);
  };
  if (a.d <= a.kStaged) return aligned ? go(verify_kernel<T, O, true, true>) : go(verify_kernel<T, O, false, true>);
  return aligned ? go(verify_kernel<T, O, true, false>) : go(verify_kernel<T, O, false, false>);
}

void verify(Storage storage, Storage out_storage, int kind, Address x, Address W, Address x_norms, Address W_norms,
            Address bias, Address cut, Address first, Address second, Address begin, Address end,
            Address candidates, Address indices, Address u, Address values, Address end_out, int64_t rows, int64_t d,
            int64_t x_norm_columns, int64_t W_norm_columns, int64_t capacity, Address stream) {
  const auto run = [&](auto t, auto o) {
    using T = decltype(t);
    using O = decltype(o);
    verify_of<T, O>({at<const T>(x), at<const T>(W), at<const float>(x_norms), at<const float>(W_norms), at<const O>(bias),
                     at<const O>(cut), at<const O>(first), at<const O>(second), at<const int64_t>(begin),
                     at<const int64_t>(end), at<const int32_t>(candidates), at<int32_t>(indices), at<O>(u), at<O>(values),
                     at<int64_t>(end_out), rows, d, x_norm_columns, W_norm_columns, capacity,
                     static_cast<Activation>(kind)},
                    reinterpret_cast<Stream>(stream));
  };
  with_storage(storage, [&](auto t) {
    if (storage == out_storage) return run(t, t);
    if constexpr (std::is_same_v<decltype(t), Half>) {  // scaled copies
      if (out_storage == Storage::float32) return run(t, float());
      if (out_storage == Storage::bfloat16) return run(t, Bfloat());
    }
    throw std::invalid_argument("verify: outputs in another dtype than x and W, which are not float16 copies");
  });
}

}  // namespace gpu
}  // namespace sae_fast
