#include "sae_fast/cpu.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = {
      compact, activate,    decode,      sampled_dots, decode_loss, transpose,
      outer,   grad_sqnorm, weight_step, row_step,     scatter,     gather,
  };
  return table;
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
