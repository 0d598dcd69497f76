// sae_fast._C: addresses and sizes in, results in place.  Shapes, dtypes and strides are checked above, in sae_fast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>

#include "sae_fast/compactor.hpp"
#include "sae_fast/cpu.hpp"
#include "sae_fast/largest.hpp"
#include "sae_fast/sound.hpp"

namespace py = pybind11;
using namespace sae_fast;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// ---- Instruction sets: the widest that this processor has, unless SAE_FAST_CPU_ISA or set_isa says otherwise --------

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
#ifdef SAE_FAST_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
    names.push_back("avx512");
#endif
#ifdef SAE_FAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    names.push_back("avx2");
#endif
  names.push_back("plain");
  return names;
}

// Whether this processor multiplies bfloat16 with sums in float: only then is the screening product cheap.
bool has_bf16_product() {
#ifdef SAE_FAST_HAS_AVX512
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

std::string current_isa;
const Kernels* current = nullptr;

void set_isa(const std::string& name) {
  std::string known;
  for (const std::string& supported : supported_isas()) {
    known += (known.empty() ? "" : ", ") + supported;
    if (supported != name) continue;
    current_isa = name;
    current = &plain::kernels();
#ifdef SAE_FAST_HAS_AVX512
    if (name == "avx512") current = &avx512::kernels();
#endif
#ifdef SAE_FAST_HAS_AVX2
    if (name == "avx2") current = &avx2::kernels();
#endif
    return;
  }
  throw py::value_error("instruction set (SAE_FAST_CPU_ISA): got '" + name + "', this machine has: " + known);
}

std::vector<Source> make_sources(const std::vector<std::pair<Address, Address>>& sources) {
  std::vector<Source> out;
  for (const auto& [values, A] : sources) out.push_back({at<const float>(values), at<const float>(A)});
  return out;
}

Csr csr(const std::pair<Address, Address>& code, int64_t rows) {
  return {at<const int64_t>(code.first), at<const int32_t>(code.second), rows};
}

using CscAddresses = std::tuple<Address, Address, Address>;
Csc csc(const CscAddresses& code) {
  return {at<const int64_t>(std::get<0>(code)), at<const int32_t>(std::get<1>(code)),
          at<const int64_t>(std::get<2>(code))};
}

std::vector<float> scratch(const CscAddresses& code, int64_t features, int64_t d, int threads) {
  return std::vector<float>(gradient_scratch(csc(code).colptr, features, d, threads));
}

using release = py::call_guard<py::gil_scoped_release>;

// What a class that takes tiles and gives CSR has in common.
template <class Tiles>
void takes_tiles(py::class_<Tiles>& type) {
  using Layer = Compactor::Layer;
  type.def("add_tile", [](Tiles& self, const Layer& layer, Address tile, int64_t width, int32_t first, int threads) {
        self.add_tile(*current, layer, at<const float>(tile), width, first, threads);
      }, release())
      .def("add_screened_tile", [](Tiles& self, const Layer& layer, Address tile, int64_t width, int32_t first,
                                   double dense_above, int threads) {
        self.add_screened_tile(*current, layer, at<const uint16_t>(tile), width, first, dense_above, threads);
      }, release())
      .def("add_rounded_tile", [](Tiles& self, const Layer& layer, Address tile, int64_t width, int32_t first, int threads) {
        self.add_rounded_tile(*current, layer, at<const uint16_t>(tile), width, first, threads);
      }, release())
      .def("add_dense", [](Tiles& self, const Layer& layer, int64_t width, int32_t first, int threads) {
        self.add_dense(*current, layer, width, first, threads);
      }, release())
      .def("candidates", &Tiles::candidates)
      .def("finish", [](const Tiles& self, Address indptr, Address indices, Address u, int threads) {
        self.finish(at<int64_t>(indptr), at<int32_t>(indices), at<float>(u), threads);
      }, release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sae_fast on raw addresses; use sae_fast.ops instead.";
  const char* wanted = std::getenv("SAE_FAST_CPU_ISA");
  set_isa(wanted && *wanted ? wanted : supported_isas().front());

  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("isa", [] { return current_isa; });

  py::class_<Compactor::Layer>(m, "Layer")
      .def(py::init([](Address x, Address W, int64_t d, Address bias, Address cut) {
        return Compactor::Layer{at<const float>(x), at<const float>(W), d, at<const float>(bias), at<const float>(cut)};
      }), py::arg("x"), py::arg("W"), py::arg("d"), py::arg("bias"), py::arg("cut"));

  py::class_<Compactor> compactor(m, "Compactor");
  compactor.def(py::init<int64_t, int>(), py::arg("rows"), py::arg("parts")).def("nnz", &Compactor::nnz);
  compactor.def("add_bounded_tile", [](Compactor& self, const Compactor::Layer& layer, Address tile, Address bias,
                                       Address margins, int64_t width, int32_t first, double dense_above, int threads) {
    self.add_bounded_tile(*current, layer, at<const float>(tile), at<const float>(bias), at<const float>(margins), width,
                          first, dense_above, threads);
  }, release());
  takes_tiles(compactor);

  py::class_<Largest> largest(m, "Largest");
  largest
      .def(py::init<int64_t, int64_t, bool, int64_t, int>(), py::arg("rows"), py::arg("k"), py::arg("whole"), py::arg("room"),
           py::arg("raise"))
      .def("begin", &Largest::begin)
      .def("expect", [](Largest& self, Address excess) { self.expect(at<const float>(excess)); })
      .def("add_bounded_tile", [](Largest& self, const Compactor::Layer& layer, Address tile, Address bias, int64_t width,
                                  int32_t first, int threads) {
        self.add_bounded_tile(*current, layer, at<const float>(tile), at<const float>(bias), width, first, threads);
      }, release())
      .def("settle", [](Largest& self, const Compactor::Layer& layer, int threads) {
        self.settle(*current, layer, threads);
      }, release())
      .def("select", &Largest::select, release());
  takes_tiles(largest);

  m.def("sound_csr", [](Address indptr, int64_t rows, Address indices, int64_t nnz, int64_t features) {
    return sound_csr(at<const int64_t>(indptr), rows, at<const int32_t>(indices), nnz, features);
  }, release());
  m.def("sound_csc", [](Address colptr, int64_t features, Address rows, int64_t nnz, Address perm, int64_t batch) {
    return sound_csc(at<const int64_t>(colptr), features, at<const int32_t>(rows), nnz, at<const int64_t>(perm), batch);
  }, release());
  m.def("has_bf16_product", &has_bf16_product);
  m.def("round_rows", [](Address A, int64_t n, int64_t d, int64_t K, Address out, Address norms, int threads) {
    current->round_rows(at<const float>(A), n, d, K, at<uint16_t>(out), at<double>(norms), threads);
  }, release());
  m.def("stale_rows", [](Address A, int64_t n, int64_t d, Address rounded, Address norms, int threads) {
    return current->stale_rows(at<const float>(A), n, d, at<const uint16_t>(rounded), at<const double>(norms), threads);
  }, release());
  m.def("column_residuals", [](Address A, Address rounded, int64_t n, int64_t d, int64_t K, int parts, Address out,
                               int threads) {
    current->column_residuals(at<const float>(A), at<const uint16_t>(rounded), n, d, K, parts, at<float>(out), threads);
  }, release());

  py::class_<Screen>(m, "Screen")
      .def(py::init([](int64_t d, int64_t K, Address outliers, int64_t m, double gamma, Address terms, uint16_t open) {
        return Screen{d, K, at<const int64_t>(outliers), m, gamma, at<const double>(terms), open};
      }), py::arg("d"), py::arg("K"), py::arg("outliers"), py::arg("m"), py::arg("gamma"), py::arg("terms"), py::arg("open"));
  m.def("screen_x", [](const Screen& screen, Address x, int64_t n, Address norms, Address rows, int threads) {
    current->screen_x(screen, at<const float>(x), n, at<const double>(norms), at<uint16_t>(rows), threads);
  }, release());
  m.def("screen_w", [](const Screen& screen, Address rounded, Address W, int64_t n, Address norms, Address bias, Address cut,
                       Address rows, int threads) {
    current->screen_w(screen, at<const uint16_t>(rounded), at<const float>(W), n, at<const double>(norms),
                      at<const float>(bias), at<const float>(cut), at<uint16_t>(rows), threads);
  }, release());

  m.def("activate", [](int kind, int64_t nnz, Address indices, Address u, Address bias, Address scale, Address b_mag,
                       Address threshold, Address values, int threads) {
    current->activate(static_cast<Activation>(kind), nnz, at<const int32_t>(indices), at<const float>(u),
                      at<const float>(bias), at<const float>(scale), at<const float>(b_mag),
                      at<const float>(threshold), at<float>(values), threads);
  }, release());

  m.def("decode", [](std::pair<Address, Address> code, int64_t rows, int64_t nnz, Address values, int64_t V, Address W,
                     int64_t d, const std::vector<int64_t>& bounds, Address out, int threads) {
    current->decode(csr(code, rows), nnz, at<const float>(values), V, at<const float>(W), d, bounds.data(),
                    static_cast<int64_t>(bounds.size()) - 1, at<float>(out), threads);
  }, release());

  m.def("sampled_dots", [](std::pair<Address, Address> code, int64_t rows, Address A, Address W, int64_t d,
                           Address out, int threads) {
    current->sampled_dots(csr(code, rows), at<const float>(A), at<const float>(W), d, at<float>(out), threads);
  }, release());

  m.def("decode_loss", [](std::pair<Address, Address> code, int64_t rows, int64_t nnz, Address magnitudes,
                          Address gates, Address W, Address b_dec, Address target, Address sparsity_weight,
                          double normaliser, int64_t d, Address residual, Address residual_aux, Address losses,
                          Address grads, int threads) {
    current->decode_loss(csr(code, rows), nnz, at<const float>(magnitudes), at<const float>(gates),
                         at<const float>(W), at<const float>(b_dec), at<const float>(target),
                         at<const float>(sparsity_weight), normaliser, d, at<float>(residual),
                         at<float>(residual_aux), at<float>(losses), at<float>(grads), threads);
  }, release());

  m.def("transpose", [](std::pair<Address, Address> code, int64_t rows, int64_t features, int parts, Address scratch,
                        Address colptr, Address out_rows, Address perm, int threads) {
    current->transpose(csr(code, rows), features, parts, at<int64_t>(scratch), at<int64_t>(colptr),
                       at<int32_t>(out_rows), at<int64_t>(perm), threads);
  }, release());

  using Sources = std::vector<std::pair<Address, Address>>;
  m.def("outer", [](CscAddresses code, int64_t features, const Sources& sources, int64_t d, Address list, int64_t first,
                    int64_t n, Address out, int threads) {
    const auto s = make_sources(sources);
    current->outer(csc(code), s.data(), static_cast<int>(s.size()), d, at<const int64_t>(list), first, n, at<float>(out),
                   scratch(code, features, d, threads).data(), threads);
  }, release());

  m.def("grad_sqnorm", [](CscAddresses code, int64_t features, const Sources& sources, int64_t d, int64_t first, int64_t n,
                          Address W, Address self_coefficient, bool project, Address out, int threads) {
    const auto s = make_sources(sources);
    current->grad_sqnorm(csc(code), s.data(), static_cast<int>(s.size()), d, first, n, at<const float>(W),
                         at<const float>(self_coefficient), project, at<double>(out),
                         scratch(code, features, d, threads).data(), threads);
  }, release());

  py::class_<Adam>(m, "Adam")
      .def(py::init([](double lr, double beta2, double eps, int64_t step, bool project, bool renormalise) {
        const double correction = 1.0 - std::pow(beta2, static_cast<double>(step));
        return Adam{beta2, static_cast<float>(lr), static_cast<float>(1.0 / std::sqrt(correction)),
                    static_cast<float>(eps), step, project, renormalise};
      }), py::arg("lr"), py::arg("beta2"), py::arg("eps"), py::arg("step"), py::arg("project"),
           py::arg("renormalise"));

  using ShadowAddresses = std::pair<Address, Address>;
  const auto shadow = [](const ShadowAddresses& s) { return Shadow{at<uint16_t>(s.first), at<double>(s.second)}; };
  m.def("weight_step", [shadow](CscAddresses code, int64_t features, const Sources& sources, int64_t d, int64_t first,
                                int64_t n, Address self_coefficient, float grad_scale, const Adam& adam, Address W,
                                Address v, Address last_step, ShadowAddresses W_shadow, int threads) {
    const auto s = make_sources(sources);
    current->weight_step(csc(code), s.data(), static_cast<int>(s.size()), d, first, n, at<const float>(self_coefficient),
                         grad_scale, adam, at<float>(W), at<float>(v), at<int64_t>(last_step), shadow(W_shadow),
                         scratch(code, features, d, threads).data(), threads);
  }, release());

  m.def("row_step", [shadow](Address G, Address colptr, int64_t d, int64_t n, float grad_scale, const Adam& adam, Address W,
                             Address v, Address last_step, ShadowAddresses W_shadow, int threads) {
    std::vector<float> rows(d * threads);
    current->row_step(at<const float>(G), at<const int64_t>(colptr), d, n, grad_scale, adam, at<float>(W), at<float>(v),
                      at<int64_t>(last_step), shadow(W_shadow), rows.data(), threads);
  }, release());

  m.def("scatter", [](Address indptr, Address indices, Address perm, int64_t first, int64_t n, int64_t width,
                      Address values, Address out, int threads) {
    current->scatter(at<const int64_t>(indptr), at<const int32_t>(indices), at<const int64_t>(perm), first, n, width,
                     at<const float>(values), at<float>(out), threads);
  }, release());

  m.def("value_gradients", [](bool gated, std::pair<Address, Address> code, int64_t rows, int64_t nnz, Address u, Address values,
                              Address scale, Address sparsity_weight, double normaliser, int64_t features, int parts,
                              Address dots, Address dots_aux, Address sums, int threads) {
    std::vector<float> row(features * threads);
    current->value_gradients(gated, csr(code, rows), nnz, at<const float>(u), at<const float>(values), at<const float>(scale),
                             at<const float>(sparsity_weight), normaliser, features, parts, at<float>(dots),
                             at<const float>(dots_aux), at<float>(sums), row.data(), threads);
  }, release());

  m.def("gather", [](Address indptr, Address indices, int64_t first, int64_t n, int64_t width, Address dense,
                     Address out, int threads) {
    current->gather(at<const int64_t>(indptr), at<const int32_t>(indices), first, n, width, at<const float>(dense),
                    at<float>(out), threads);
  }, release());
}
