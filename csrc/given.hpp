// From keywords in Python to the arguments of kernels.def: all of them, in its order.  An array is a contiguous tensor of the
// right dtype, or None; a view is a tuple of them.  Whoever calls keeps them alive.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sae_fast/types.hpp"

namespace sae_fast {

namespace py = pybind11;

inline const char* dtype_of(const float*) { return "float32"; }
inline const char* dtype_of(const double*) { return "float64"; }
inline const char* dtype_of(const int32_t*) { return "int32"; }
inline const char* dtype_of(const int64_t*) { return "int64"; }
inline const char* dtype_of(const uint16_t*) { return "bfloat16"; }

// What a tensor has or says, by a name that is made once: `attr` would make a string of it at every call.
struct Names {
  PyObject *dtype = PyUnicode_InternFromString("dtype"), *is_contiguous = PyUnicode_InternFromString("is_contiguous"),
           *data_ptr = PyUnicode_InternFromString("data_ptr"), *numel = PyUnicode_InternFromString("numel");
};
inline const Names& names() {
  static const Names all;
  return all;
}
inline py::object steal(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
inline py::object said(py::handle tensor, PyObject* method) { return steal(PyObject_CallMethodNoArgs(tensor.ptr(), method)); }
inline int64_t size(py::handle tensor) { return PyLong_AsLongLong(said(tensor, names().numel).ptr()); }

inline void* address(const char* name, py::handle tensor, py::handle dtype) {
  if (tensor.is_none()) return nullptr;
  const auto text = [](const py::object& a) { return std::string(py::str(a)); };
  const py::object got = steal(PyObject_GetAttr(tensor.ptr(), names().dtype));
  if (!got.is(dtype)) throw py::type_error(std::string(name) + ": got " + text(got) + ", want " + std::string(py::str(dtype)));
  if (said(tensor, names().is_contiguous).ptr() != Py_True)
    throw std::runtime_error("the engine takes contiguous tensors only: " + std::string(name));
  void* address = PyLong_AsVoidPtr(said(tensor, names().data_ptr).ptr());
  if (!address && size(tensor) != 0)
    throw std::runtime_error("the engine takes tensors with memory, not a " + text(py::type::of(tensor).attr("__name__")) +
                             " on " + text(tensor.attr("device")));
  return address;
}

template <class T>
T* array(const char* name, py::handle tensor) {
  static const py::handle dtype = py::object(py::module_::import("torch").attr(dtype_of(static_cast<T*>(nullptr)))).release();
  return static_cast<T*>(address(name, tensor, dtype));
}

class Given {
 public:
  Given(const char* function, const py::kwargs& keywords) : function_(function), keywords_(keywords) {}

  template <class T>
  void in(const char* name, const T*& to) { to = array<const T>(name, next(name)); }
  template <class T>
  void out(const char* name, T*& to) { to = array<T>(name, next(name)); }
  template <class T>
  void in_out(const char* name, T*& to) { out(name, to); }
  template <class T>
  void by(const char* name, T& to) { to = py::cast<T>(next(name)); }
  void by(const char* name, Activation& to) { to = static_cast<Activation>(py::cast<int>(next(name))); }
  void by(const char* name, Csr& to) {
    const auto [indptr, indices] = py::cast<std::pair<py::handle, py::handle>>(next(name));
    to = {array<const int64_t>("indptr", indptr), array<const int32_t>("indices", indices), size(indptr) - 1};
  }
  void by(const char* name, Csc& to) {
    const auto [colptr, rows, perm] = py::cast<std::tuple<py::handle, py::handle, py::handle>>(next(name));
    to = {array<const int64_t>("colptr", colptr), array<const int32_t>("rows", rows), array<const int64_t>("perm", perm),
          size(colptr) - 1};
  }
  void by(const char* name, Sources& to) {
    const auto [values, A] = py::cast<std::pair<py::sequence, py::sequence>>(next(name));
    for (size_t s = 0; s < values.size(); ++s)
      sources_.push_back({array<const float>("values", py::object(values[s])), array<const float>("A", py::object(A[s]))});
    to = {sources_.data(), static_cast<int>(sources_.size())};
  }
  void by(const char* name, Bounds& to) {
    bounds_ = py::cast<std::vector<int64_t>>(next(name));
    to = {bounds_.data(), static_cast<int64_t>(bounds_.size()) - 1};
  }
  void by(const char* name, Shadow& to) {
    const py::handle shadow = next(name);
    if (shadow.is_none()) return;
    const auto [rows, norms] = py::cast<std::pair<py::handle, py::handle>>(shadow);
    to = {array<uint16_t>("shadow.rows", rows), array<double>("shadow.norms", norms)};
  }
  void memory(Memory& to) {
    to = {this, [](void* self, int64_t bytes) -> void* {
            return static_cast<Given*>(self)->scratch_.emplace_back(new char[bytes]).get();
          }};
  }
  void end() {
    if (PyDict_Next(keywords_.ptr(), &at_, &key_, &value_)) fail("an end");
  }

 private:
  py::handle next(const char* name) {
    if (!PyDict_Next(keywords_.ptr(), &at_, &key_, &value_)) key_ = nullptr;
    if (!key_ || PyUnicode_CompareWithASCIIString(key_, name) != 0) fail(name);
    return value_;
  }
  [[noreturn]] void fail(const char* want) const {
    const std::string got = key_ ? std::string(py::str(py::handle(key_))) : "an end";
    throw py::type_error(std::string(function_) + ": got " + got + ", want " + want + " here (kernels.def)");
  }

  const char* function_;
  const py::kwargs& keywords_;
  Py_ssize_t at_ = 0;
  PyObject *key_ = nullptr, *value_ = nullptr;
  std::vector<Source> sources_;
  std::vector<int64_t> bounds_;
  std::vector<std::unique_ptr<char[]>> scratch_;
};

}  // namespace sae_fast
