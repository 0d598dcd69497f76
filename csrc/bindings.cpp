// sae_fast._C: tensors and sizes in, results in place.  Shapes and devices are checked above, in sae_fast/ops.
#include <cstdlib>

#include "given.hpp"
#include "host/arguments.hpp"
#include "host/compactor.hpp"
#include "host/isas.hpp"
#include "host/largest.hpp"
#include "host/sound.hpp"
#include "sae_fast/activation.hpp"

using namespace sae_fast;

namespace {

// ---- Instruction sets: the widest that this processor has, unless SAE_FAST_CPU_ISA or set_isa says otherwise --------

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
  for (const auto& [supported, kernels] : supported_isas()) {
    known += (known.empty() ? "" : ", ") + supported;
    if (supported != name) continue;
    current_isa = name;
    current = kernels;
    return;
  }
  throw py::value_error("instruction set (SAE_FAST_CPU_ISA): got '" + name + "', this machine has: " + known);
}

using release = py::call_guard<py::gil_scoped_release>;

template <class Result, class Args>
void define(py::module_& m, const char* name, Result (*Kernels::*kernel)(const Args&)) {
  m.def(name, [name, kernel](const py::kwargs& keywords) {
    Args a{};
    Given given(name, keywords);
    args::each(a, given);
    given.end();
    const py::gil_scoped_release released;
    return (current->*kernel)(a);
  });
}

template <class Args>
void define(py::class_<Tiles>& type, const char* name, void (Tiles::*method)(const Args&)) {
  type.def(name, [name, method](Tiles& self, const py::kwargs& keywords) {
    Args a{};
    Given given(name, keywords);
    args::each(a, given);
    given.end();
    const py::gil_scoped_release released;
    (self.*method)(a);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of sae_fast on tensors; use sae_fast.ops instead.";
  const char* wanted = std::getenv("SAE_FAST_CPU_ISA");
  set_isa(wanted && *wanted ? wanted : supported_isas().front().first);

  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const auto& [name, kernels] : supported_isas()) names.push_back(name);
    return names;
  });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("isa", [] { return current_isa; });
  m.def("has_bf16_product", &has_bf16_product);

  // Whether the kernels may follow these offsets and indices.
  m.def("sound_csr", [](py::handle indptr, py::handle indices, int64_t features) {
    return sound_csr(array<const int64_t>("indptr", indptr), size(indptr) - 1, array<const int32_t>("indices", indices),
                     size(indices), features);
  }, py::arg("indptr"), py::arg("indices"), py::arg("features"));
  m.def("sound_csc", [](py::handle colptr, py::handle rows, py::handle perm, int64_t batch) {
    return sound_csc(array<const int64_t>("colptr", colptr), size(colptr) - 1, array<const int32_t>("rows", rows),
                     size(rows), array<const int64_t>("perm", perm), batch);
  }, py::arg("colptr"), py::arg("rows"), py::arg("perm"), py::arg("batch"));

  py::class_<Layer>(m, "Layer")
      .def(py::init([](py::handle x, py::handle W, int64_t d, py::handle bias, py::handle cut) {
        return Layer{array<const float>("x", x), array<const float>("W", W), d, array<const float>("bias", bias),
                     array<const float>("cut", cut)};
      }), py::kw_only(), py::arg("x"), py::arg("W"), py::arg("d"), py::arg("bias"), py::arg("cut"));
  py::class_<Screen>(m, "Screen")
      .def(py::init([](int64_t d, int64_t K, py::handle outliers, int64_t m, double gamma, py::handle terms, uint16_t open) {
        return Screen{d, K, array<const int64_t>("outliers", outliers), m, gamma, array<const double>("terms", terms), open};
      }), py::kw_only(), py::arg("d"), py::arg("K"), py::arg("outliers"), py::arg("m"), py::arg("gamma"), py::arg("terms"),
          py::arg("open"));
  py::class_<Adam>(m, "Adam")
      .def(py::init(&make_adam), py::kw_only(), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
           py::arg("step"), py::arg("project"), py::arg("renormalise"));

  py::class_<Tiles> tiles(m, "Tiles");
  tiles.def("candidates", &Tiles::candidates);
  py::class_<Compactor, Tiles>(m, "Compactor")
      .def(py::init([](int64_t rows, int parts) { return std::make_unique<Compactor>(*current, rows, parts); }),
           py::kw_only(), py::arg("rows"), py::arg("parts"))
      .def("nnz", &Compactor::nnz);
  py::class_<Largest, Tiles>(m, "Largest")
      .def(py::init([](int64_t rows, int64_t k, int64_t budget, bool signs, int64_t room, int lift) {
        return std::make_unique<Largest>(*current, rows, k, budget, signs, room, lift);
      }), py::kw_only(), py::arg("rows"), py::arg("k"), py::arg("budget"), py::arg("signs"), py::arg("room"), py::arg("lift"))
      .def("begin", [](Largest& self, int64_t first, int64_t n, py::handle guess) {
        self.begin(first, n, array<const float>("guess", guess));
      }, py::kw_only(), py::arg("first"), py::arg("n"), py::arg("guess"))
      .def("settle", &Largest::settle, py::kw_only(), py::arg("layer"), py::arg("threads"), release())
      .def("select", &Largest::select, py::kw_only(), py::arg("threads"), release());

  m.attr("run") = kRun;
  m.attr("screen_terms") = static_cast<int>(Screen::n_terms);
  m.attr("screen_pieces") = Screen::kPieces;
  m.attr("screen_margins") = Screen::kMargins;
  py::enum_<Activation> activations(m, "Activation");
#define VALUE(name, number, Struct) activations.value(#name, Activation::name);
  SAE_FAST_ACTIVATIONS(VALUE) VALUE(relu, 1, Relu)
#undef VALUE

#define KERNEL(Result, name, fields) define(m, #name, &Kernels::name);
#define TILE(name, fields) define(tiles, #name, &Tiles::name);
#include "sae_fast/kernels.def"
}
