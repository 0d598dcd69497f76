#include "sae_fast/cuda/decode_loss.cuh"
#include "sae_fast/cuda/storage.cuh"

namespace sae_fast {
namespace gpu {

static std::string sizes(int V, int64_t rows, int64_t d, int64_t capacity) {
  return "V " + std::to_string(V) + ", rows " + std::to_string(rows) + ", d " + std::to_string(d) + ", capacity " +
         std::to_string(capacity);
}

template <class T, class X>
static void residuals_of(int V, const Residuals<T, X>& a, Stream stream) {
  const dim3 grid(a.rows, a.slices);
  const auto go = [&](auto kernel) {
    launch("decode_loss", sizes(V, a.rows, a.d, a.capacity), kernel, grid, a.kThreads, a.kShared, stream, a);
  };
  V == 2 ? go(residuals_kernel<T, X, 2>) : go(residuals_kernel<T, X, 1>);
}

void residuals(Storage storage, Storage target_storage, int V, Address begin, Address end, Address indices, Address values,
               Address W, Address b_dec, Address target, Address residuals, Address partials, Address squares, int64_t rows,
               int64_t d, int64_t slices, int64_t capacity, Address stream) {
  const auto run = [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    residuals_of<T, X>(V, {at<const int64_t>(begin), at<const int64_t>(end), at<const int32_t>(indices), at<const T>(values),
                           at<const T>(W), at<const T>(b_dec), at<const X>(target), at<T>(residuals), at<float>(partials),
                           at<float>(squares), rows, d, slices, capacity},
                       reinterpret_cast<Stream>(stream));
  };
  with_storage(storage, [&](auto t) {
    if (storage == target_storage) return run(t, t);
    if constexpr (sizeof(t) == 4) {  // weights in float32, x in its own 16 bits
      if (target_storage == Storage::float16) return run(t, Half());
      if (target_storage == Storage::bfloat16) return run(t, Bfloat());
    }
    throw std::invalid_argument("decode_loss: a target in another dtype than the weights, which are not float32");
  });
}

void finish(Storage storage, int V, int kind, bool auxiliary, bool zeros, int formula, int window, Address begin, Address end,
            Address indices, Address values, Address cost, Address partials, Address squares, Address losses, Address grads,
            Address u, Address bias, Address first, Address second, Address coefficient, Address l0, Address delta,
            Address entries, Address decoder, Address along, Address norms, int64_t rows, int64_t slices, int64_t capacity,
            double normaliser, double number, double bandwidth, Address stream) {
  (void)second;  // no pullback needs it
  with_storage(storage, [&](auto t) {
    using T = decltype(t);
    const Penalty penalty = {static_cast<Formula>(formula), static_cast<Window>(window), static_cast<float>(number),
                             static_cast<float>(bandwidth), at<const float>(coefficient), at<const void>(l0)};
    const Finish<T> a = {at<const int64_t>(begin), at<const int64_t>(end), at<const int32_t>(indices), at<const T>(values),
                         at<const T>(cost), at<const float>(partials), at<const float>(squares), at<float>(losses),
                         at<T>(grads), at<const T>(u), at<const T>(bias), at<const T>(first), at<T>(delta), at<T>(entries),
                         at<T>(decoder), at<T>(along), at<T>(norms), rows, slices, capacity,
                         static_cast<float>(2.0 / normaliser), static_cast<float>(1.0 / normaliser),
                         static_cast<Activation>(kind), auxiliary, zeros, penalty};
    const auto go = [&](auto kernel) {
      launch("decode_loss", sizes(V, rows, 0, capacity), kernel, dim3((rows + 3) / 4), 128, 0, reinterpret_cast<Stream>(stream), a);
    };
    V == 2 ? go(finish_kernel<T, 2>) : go(finish_kernel<T, 1>);
  });
}

}  // namespace gpu
}  // namespace sae_fast
