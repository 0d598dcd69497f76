// From a dtype that is known at run time to a type.
#pragma once
#include <stdexcept>

#include "sae_fast/cuda/launch.cuh"
#include "sae_fast/cuda/ops.hpp"

namespace sae_fast {
namespace gpu {

template <class T>
T* at(Address a) { return reinterpret_cast<T*>(a); }

template <class Use>
void with_storage(Storage storage, const Use& use) {
  switch (storage) {
    case Storage::float32: return use(float());
    case Storage::float16: return use(Half());
    case Storage::bfloat16: return use(Bfloat());
  }
  throw std::invalid_argument("storage: want 0 (float32), 1 (float16) or 2 (bfloat16)");
}

}  // namespace gpu
}  // namespace sae_fast
