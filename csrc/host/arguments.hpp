// each(a, visit): visit.in("pre", a.pre), visit.by("n", a.n) ... for a kernel's or a tile's arguments, in the list's order.
#pragma once
#include <cmath>

#include "sae_fast/cpu.hpp"

namespace sae_fast {
namespace args {

#define IN(T, name) visit.in(#name, a.name);
#define OUT(T, name) visit.out(#name, a.name);
#define INOUT(T, name) visit.in_out(#name, a.name);
#define BY(T, name) visit.by(#name, a.name);
#define THREADS visit.by("threads", a.threads);
#define MEMORY visit.memory(a.memory);
#define TILE(name, fields) \
  template <class Visit>   \
  void each(name& a, Visit& visit) { fields }
#define KERNEL(Result, name, fields) TILE(name, fields)
#include "sae_fast/kernels.def"
#undef IN
#undef OUT
#undef INOUT
#undef BY
#undef THREADS
#undef MEMORY

}  // namespace args

inline Adam make_adam(double lr, double beta1, double beta2, double eps, int64_t step, bool project, bool renormalise) {
  const auto correction = [&](double beta) { return 1.0 - std::pow(beta, static_cast<double>(step)); };
  return {beta1, beta2, static_cast<float>(lr / correction(beta1)), static_cast<float>(1.0 / std::sqrt(correction(beta2))),
          static_cast<float>(eps), step, project, renormalise};
}

}  // namespace sae_fast
