#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

const Kernels& kernels() {
#define KERNEL(Result, name, fields) name,
  static constexpr Kernels table = {
#include "sae_fast/kernels.def"
  };
  return table;
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
