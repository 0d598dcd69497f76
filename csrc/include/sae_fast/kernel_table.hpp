// Declarations of one instruction set's kernels; csrc/cpu/table.cpp collects them.
#pragma once
#include "sae_fast/cpu.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

#define KERNEL(Result, name, fields) Result name(const args::name&);
#include "sae_fast/kernels.def"

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
