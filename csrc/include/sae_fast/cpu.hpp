// The CPU kernels, from their list.  Each instruction set compiles csrc/cpu/*.cpp into its own namespace; `kernels()` of that
// namespace is its table of functions, and csrc/bindings.cpp chooses a table at run time.
//
// Rules for csrc/cpu: raw pointers only, and no standard containers or other inline library code.  A template or inline
// function that is instantiated there under -mavx512 may be the copy that the linker keeps for the whole module.
//
// Every kernel owns what it writes (a row of the batch, or a feature), so results do not depend on the thread count.
#pragma once
#include "sae_fast/types.hpp"

namespace sae_fast {

// The arguments of each: args::decode_loss ...
namespace args {
#define IN(T, name) const T* name;
#define OUT(T, name) T* name;
#define INOUT(T, name) T* name;
#define BY(T, name) T name;
#define THREADS int threads;
#define MEMORY Memory memory;
#define TILE(name, fields) struct name { fields };
#define KERNEL(Result, name, fields) TILE(name, fields)
#include "sae_fast/kernels.def"
#undef IN
#undef OUT
#undef INOUT
#undef BY
#undef THREADS
#undef MEMORY
}  // namespace args

struct Kernels {
#define KERNEL(Result, name, fields) Result (*name)(const args::name&);
#include "sae_fast/kernels.def"
};

#ifdef SAE_FAST_HAS_AVX512
namespace avx512 { const Kernels& kernels(); }
#endif
#ifdef SAE_FAST_HAS_AVX2
namespace avx2 { const Kernels& kernels(); }
#endif
namespace plain { const Kernels& kernels(); }

}  // namespace sae_fast
