#include "sae_fast/cuda/outer.cuh"

namespace sae_fast {
namespace gpu {

static std::string sizes(int64_t items, int64_t d) { return "items " + std::to_string(items) + ", d " + std::to_string(d); }

void partials(Storage storage, Storage A_storage, Address owner, Address first, Address colptr, Address rows, Address perm,
              Address values, Address A, Address values2, Address A2, Address out, int64_t M, int64_t d, int64_t first_feature,
              int64_t last_feature, int64_t run, Address stream) {
  with_sources(storage, A_storage, A2 != 0, [&](auto v, auto x, auto two) {
    using V = decltype(v);
    using X = decltype(x);
    constexpr int S = decltype(two)::value, N = 16 / sizeof(X);
    const Share share(d, N);
    const Partials<V, X> a = {gradient_of<V, X>(colptr, rows, perm, values, A, values2, A2, 0, 0, d), at<const int64_t>(owner),
                              at<const int64_t>(first), at<float>(out), M, first_feature, last_feature, run, share};
    const auto go = [&](auto kernel) {
      launch("outer, runs", sizes(M, d), kernel, share.grid(M, d, N), 128, 0, reinterpret_cast<Stream>(stream), a);
    };
    in_pieces(d, N, A, A2, out) ? go(partials_kernel<S, true, V, X>) : go(partials_kernel<S, false, V, X>);
  });
}

void outer(Storage storage, Storage out_storage, Address colptr, Address rows, Address perm, Address values, Address A,
           Address values2, Address A2, Address first, Address partials, Address features, Address out, int64_t n, int64_t d,
           int64_t first_feature, bool accumulate, Address stream) {
  with_sources(storage, storage, A2 != 0, [&](auto t, auto, auto two) {
    using T = decltype(t);
    constexpr int S = decltype(two)::value, N = 16 / sizeof(T);
    const Share share(d, N);
    const auto run = [&](auto o) {
      using O = decltype(o);
      const Outer<T, O> a = {gradient_of<T, T>(colptr, rows, perm, values, A, values2, A2, first, partials, d),
                             at<const int64_t>(features), at<O>(out), n, first_feature, accumulate, share};
      const auto go = [&](auto kernel) {
        launch("outer", sizes(n, d), kernel, share.grid(n, d, N), 128, 0, reinterpret_cast<Stream>(stream), a);
      };
      in_pieces(d, N, A, A2, partials, out) ? go(outer_kernel<S, true, T, O>) : go(outer_kernel<S, false, T, O>);
    };
    if (out_storage == storage) return run(t);
    if constexpr (sizeof(T) == 2)  // sums that more are added to
      if (out_storage == Storage::float32) return run(float());
    throw std::invalid_argument("outer: rows in another dtype than A, which is not float32");
  });
}

}  // namespace gpu
}  // namespace sae_fast
