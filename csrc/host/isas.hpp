// The instruction sets that are built and that this processor has, the widest first.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "sae_fast/cpu.hpp"

namespace sae_fast {

inline std::vector<std::pair<std::string, const Kernels*>> supported_isas() {
  std::vector<std::pair<std::string, const Kernels*>> isas;
#ifdef SAE_FAST_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
    isas.emplace_back("avx512", &avx512::kernels());
#endif
#ifdef SAE_FAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    isas.emplace_back("avx2", &avx2::kernels());
#endif
  isas.emplace_back("plain", &plain::kernels());
  return isas;
}

}  // namespace sae_fast
