// How a kernel is launched: on a stream, or by the tests' shim; what goes wrong is an exception that names it.
#pragma once
#include <stdexcept>
#include <string>

#include "sae_fast/cuda/device.cuh"

namespace sae_fast {
namespace gpu {

#ifdef SAE_FAST_SHIM
template <class Kernel, class Args>
void launch(const char*, const std::string&, Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes, Stream, const Args& args) {
  if (grid.x && grid.y && grid.z) shim::launch(kernel, grid, dim3(threads), shared_bytes, args);
}
#else
inline void check(cudaError_t error, const char* op, const std::string& sizes) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: the next launch would take it for its own
  throw std::runtime_error(std::string(op) + " (" + sizes + "): " + cudaGetErrorString(error));
}

template <class Kernel, class Args>
void launch(const char* op, const std::string& sizes, Kernel kernel, dim3 grid, unsigned threads, size_t shared_bytes,
            Stream stream, const Args& args) {
  if (!grid.x || !grid.y || !grid.z) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), op, sizes);
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  check(cudaGetLastError(), op, sizes);
}
#endif

}  // namespace gpu
}  // namespace sae_fast
