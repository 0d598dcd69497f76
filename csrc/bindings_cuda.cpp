// sae_fast._C_cuda: the CUDA kernels; in the tests the same over the shim.
#include <pybind11/pybind11.h>

#include "sae_fast/cuda/ops.hpp"
#ifdef SAE_FAST_SHIM
#include "sae_fast/cuda/device.cuh"
#endif

namespace py = pybind11;
using namespace sae_fast::gpu;

#ifndef SAE_FAST_CUDA_MODULE
#define SAE_FAST_CUDA_MODULE _C_cuda
#endif

PYBIND11_MODULE(SAE_FAST_CUDA_MODULE, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  py::enum_<Storage>(m, "Storage")
      .value("float32", Storage::float32)
      .value("float16", Storage::float16)
      .value("bfloat16", Storage::bfloat16);
  m.attr("residual_columns") = kResidualColumns;
  m.attr("counted_rows") = kCountedRows;
  m.attr("step_columns") = kStepColumns;
  m.attr("unit_columns") = kUnitColumns;
#define DEFINE(name) m.def(#name, &name, release());
  SAE_FAST_CUDA_FUNCTIONS(DEFINE)
#undef DEFINE
#ifdef SAE_FAST_SHIM
  m.def("set_schedule", [](int which) { sae_fast::shim::Block::schedule() = which; });
  m.attr("schedules") = static_cast<int>(sae_fast::shim::n_schedules);
#endif
}
