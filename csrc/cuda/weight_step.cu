#include "sae_fast/cuda/weight_step.cuh"

namespace sae_fast {
namespace gpu {

template <int S, int P, bool kUnit, class X>
static void weight_step_of(const WeightStep<X>& a, bool vector, Stream stream) {
  using K = WeightStep<X>;
  const int64_t d = a.gradient.d, piece = P * kWarp * K::kColumns, warps = (d + piece - 1) / piece;
  const unsigned threads = kWarp * (kUnit || warps < 4 ? warps : 4);
  const std::string sizes = "n " + std::to_string(a.n) + ", d " + std::to_string(d);
  const auto go = [&](auto kernel) {
    launch("weight_step", sizes, kernel, dim3(a.n, kUnit ? 1 : (d + K::kSlice - 1) / K::kSlice), threads,
           3 * K::kWarps * sizeof(float), stream, a);
  };
  if (vector) return go(weight_step_kernel<S, P, kUnit, true, X>);
  if constexpr (P < 4) return go(weight_step_kernel<S, P, kUnit, false, X>);  // with four pieces it spills
  throw std::invalid_argument("weight_step (" + sizes + "): unit rows this long have to be aligned");
}

void weight_step(Storage A_storage, Address W, Address m, Address v, Address decay, Address colptr, Address rows, Address perm,
                 Address values, Address A, Address values2, Address A2, Address first, Address partials, Address own,
                 Address constants, Address scale, Address skip, int skip_bytes, Address shadow, Address norms,
                 Address along, Address squares, int64_t n, int64_t d, int64_t first_feature, int64_t K, int64_t norm_columns,
                 bool unit_rows, Address stream) {
  with_sources(Storage::float32, A_storage, A2 != 0, [&](auto, auto x, auto two) {
    using X = decltype(x);
    constexpr int S = decltype(two)::value;
    const WeightStep<X> a = {gradient_of<float, X>(colptr, rows, perm, values, A, values2, A2, first, partials, d),
                             at<float>(W), at<float>(m), at<float>(v), at<const float>(decay), at<const float>(own),
                             at<const float>(constants), at<const float>(scale), at<const void>(skip), at<Half>(shadow),
                             at<float>(norms), at<const float>(along), at<float>(squares), n, first_feature, K,
                             norm_columns, skip_bytes};
    const bool vector = in_pieces(d, a.kColumns, W, m, v, A, A2, partials, shadow, K * sizeof(Half));
    const auto on = reinterpret_cast<Stream>(stream);
    if (!unit_rows) return weight_step_of<S, 1, false>(a, vector, on);
    if (d <= kUnitColumns / 4) return weight_step_of<S, 1, true>(a, vector, on);
    if (d <= kUnitColumns / 2) return weight_step_of<S, 2, true>(a, vector, on);
    if (d <= kUnitColumns) return weight_step_of<S, 4, true>(a, vector, on);
    throw std::invalid_argument("weight_step: unit rows of more than " + std::to_string(kUnitColumns) + " columns");
  });
}

}  // namespace gpu
}  // namespace sae_fast
