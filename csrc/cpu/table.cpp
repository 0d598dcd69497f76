#include "sae_fast/cpu.hpp"
#include "sae_fast/kernel_table.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

const Kernels& kernels() {
  static constexpr Kernels table = {
      compact,  round_rows, stale_rows,   column_residuals, screen_x,  screen_w, screen,      verify,   dot_block,
      activate, decode,     sampled_dots, decode_loss,      transpose, outer,    grad_sqnorm, weight_step, row_step,
      scatter,  gather,     value_gradients,
  };
  return table;
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
