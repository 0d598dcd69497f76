// Replays the calls that record.py wrote down on every instruction set of this machine, with several numbers of threads,
// each array in a heap block of exactly its size, for the sanitizers to watch; and compares the results with the recorded
// ones.  Integers must be the same, floats the same within rounding (sanitizers change what the compiler vectorises), and
// bit for bit at every number of threads.  driver FILE
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "sae_fast/compactor.hpp"
#include "sae_fast/cpu.hpp"
#include "sae_fast/largest.hpp"
#include "sae_fast/sound.hpp"

using namespace sae_fast;

namespace {

constexpr int kThreads[] = {1, 3};

// ---- The recording: see record.py -----------------------------------------------------------------------------------

struct Argument {
  double number = 0;
  char dtype = 0;  // h bfloat16, i int32, l int64, f float, d double; 0 for a number
  const std::string *before = nullptr, *after = nullptr;
};

struct Call {
  std::string name;
  std::vector<Argument> arguments;
  int64_t result;
};

struct Recording {
  std::vector<std::unique_ptr<std::string>> bytes;
  std::vector<Call> calls;
};

Recording read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  Recording recording;
  std::string word;
  const auto fail_unless = [&](bool good) {
    if (!good) throw std::runtime_error(std::string(path) + ": no recording, or not all of one");
  };
  const auto next = [&] {
    fail_unless(static_cast<bool>(file >> word));
    return word;
  };
  const auto number = [&] { return std::strtod(next().c_str(), nullptr); };
  const auto bytes = [&] { return recording.bytes.at(static_cast<size_t>(number())).get(); };
  while (file >> word) {
    if (word == "bytes") {
      recording.bytes.push_back(std::make_unique<std::string>(static_cast<size_t>(number()), '\0'));
      file.get();
      std::string& content = *recording.bytes.back();
      fail_unless(static_cast<bool>(file.read(content.data(), static_cast<std::streamsize>(content.size()))));
    } else {
      fail_unless(word == "call");
      recording.calls.push_back({next(), {}, 0});
      recording.calls.back().arguments.resize(static_cast<size_t>(number()));
      for (Argument& a : recording.calls.back().arguments) {
        if (next() == "number") {
          a.number = number();
        } else {
          a.dtype = next()[0];
          a.before = bytes();
          a.after = bytes();
        }
      }
      next();
      recording.calls.back().result = static_cast<int64_t>(number());
    }
  }
  fail_unless(!recording.calls.empty());
  return recording;
}

// ---- Comparing ------------------------------------------------------------------------------------------------------

int failures = 0;

void fail(const std::string& where, const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "%s: %s\n", where.c_str(), what.c_str());
}

double element(char dtype, const char* bytes, size_t i) {
  const auto as = [&](auto value) {
    std::memcpy(&value, bytes + i * sizeof value, sizeof value);
    return value;
  };
  switch (dtype) {
    case 'i': return as(int32_t{});
    case 'l': return static_cast<double>(as(int64_t{}));
    case 'f': return as(float{});
    case 'd': return as(double{});
  }
  const uint32_t wide = static_cast<uint32_t>(as(uint16_t{})) << 16;  // h
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

size_t item_size(char dtype) { return dtype == 'h' ? 2 : dtype == 'i' || dtype == 'f' ? 4 : 8; }

// `exact`: but for the sign and payload of a NaN.
void compare(const std::string& where, char dtype, const char* got, const std::string& want, bool exact) {
  if (want.empty() || std::memcmp(got, want.data(), want.size()) == 0) return;
  const size_t n = want.size() / item_size(dtype);
  const bool integer = dtype == 'i' || dtype == 'l';
  double largest = 0;
  for (size_t i = 0; i < n; ++i) {
    const double size = std::fabs(element(dtype, want.data(), i));
    if (std::isfinite(size) && size > largest) largest = size;
  }
  for (size_t i = 0; i < n; ++i) {
    const double a = element(dtype, got, i), b = element(dtype, want.data(), i);
    if (a == b || (std::isnan(a) && std::isnan(b))) continue;
    const double relative = dtype == 'h' ? 0x1p-7 : 0x1p-14;  // a bfloat16 may be rounded to its neighbour
    if (!integer && !exact && std::fabs(a - b) <= relative * std::fabs(b) + 0x1p-18 * largest) continue;
    char message[200];
    std::snprintf(message, sizeof message, "element %zu of %zu is %.9g, want %.9g", i, n, a, b);
    return fail(where, message);
  }
}

// ---- Replaying ------------------------------------------------------------------------------------------------------

struct Memory {
  virtual ~Memory() = default;
};

// A heap block of exactly n elements: a copy of content, or poison.  Null for none, as torch gives an empty tensor.
template <class T>
class Block : public Memory {
 public:
  explicit Block(int64_t n, const T* content = nullptr) : size_(n), data_(n ? new T[n] : nullptr) {
    if (n && content) std::memcpy(data_.get(), content, n * sizeof(T));
    if (n && !content) std::memset(static_cast<void*>(data_.get()), 0xff, n * sizeof(T));  // NaN, or -1
  }
  operator T*() const { return data_.get(); }
  int64_t size() const { return size_; }
  std::string bytes() const { return size_ ? std::string(reinterpret_cast<char*>(data_.get()), size_ * sizeof(T)) : ""; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

// One call's arguments, taken in turn: in braces the turn is from left to right.
class Arguments {
 public:
  Arguments(const Call& call, std::string where) : call_(call), where_(std::move(where)) {}

  void skip(size_t n) { at_ += n; }
  double real() {
    const Argument& a = take();
    if (a.dtype) throw std::runtime_error(where_ + ": an array in the place of a number");
    return a.number;
  }
  int64_t integer() { return static_cast<int64_t>(real()); }
  bool flag() { return real() != 0; }
  template <class T>
  const T* in() { return block<T>(true); }
  template <class T>
  T* out() { return written<T>(false); }
  template <class T>
  T* in_out() { return written<T>(true); }
  size_t elements() const {  // of the array whose turn is next
    const Argument& a = call_.arguments.at(at_);
    return a.dtype ? a.before->size() / item_size(a.dtype) : 0;
  }

  Csr csr() { return {in<int64_t>(), in<int32_t>(), integer()}; }
  Csc csc() { return {in<int64_t>(), in<int32_t>(), in<int64_t>()}; }
  std::vector<Source> sources() {
    std::vector<Source> all(integer());
    for (Source& source : all) source = Source{in<float>(), in<float>()};
    return all;
  }
  Screen screen() { return {integer(), integer(), in<int64_t>(), integer(), real(), in<double>(), static_cast<uint16_t>(integer())}; }
  Shadow shadow() { return {in_out<uint16_t>(), in_out<double>()}; }
  Compactor::Layer layer() { return {in<float>(), in<float>(), integer(), in<float>(), in<float>()}; }
  Adam adam() {  // as in csrc/bindings.cpp
    const double lr = real(), beta2 = real(), eps = real();
    const int64_t step = integer();
    const double correction = 1.0 - std::pow(beta2, static_cast<double>(step));
    return {beta2, static_cast<float>(lr), static_cast<float>(1.0 / std::sqrt(correction)), static_cast<float>(eps), step,
            flag(), flag()};
  }

  const std::string& where() const { return where_; }
  void result(int64_t got) const {
    if (got != call_.result) fail(where_, "returns " + std::to_string(got) + ", want " + std::to_string(call_.result));
  }
  // What was written against the recording, and against `first`, another run's, which it becomes if it is empty.
  void check(bool exact, std::vector<std::string>& first) {
    if (at_ != call_.arguments.size()) throw std::runtime_error(where_ + ": was recorded with other arguments");
    const bool fill = first.empty();
    for (size_t w = 0; w < written_.size(); ++w) {
      const auto& [at, data] = written_[w];
      const Argument& a = call_.arguments[at];
      const std::string name = where_ + ", argument " + std::to_string(at);
      compare(name, a.dtype, data, *a.after, exact);
      if (fill) first.emplace_back(data, a.after->size());
      else compare(name + ", against 1 thread", a.dtype, data, first[w], true);
    }
  }

 private:
  const Argument& take() {
    if (at_ == call_.arguments.size()) throw std::runtime_error(where_ + ": was recorded with other arguments");
    return call_.arguments[at_++];
  }
  template <class T>
  T* block(bool content) {
    const Argument& a = take();
    if (a.dtype ? item_size(a.dtype) != sizeof(T) : a.number != 0)
      throw std::runtime_error(where_ + ": argument " + std::to_string(at_ - 1) + " is not an array of the right type");
    if (a.dtype == 0 || a.before->empty()) return nullptr;  // torch gives an empty tensor the address 0
    const T* from = content ? reinterpret_cast<const T*>(a.before->data()) : nullptr;
    auto block = std::make_unique<Block<T>>(a.before->size() / sizeof(T), from);
    T* data = *block;
    blocks_.push_back(std::move(block));
    return data;
  }
  template <class T>
  T* written(bool content) {
    T* data = block<T>(content);
    if (data) written_.emplace_back(at_ - 1, reinterpret_cast<const char*>(data));
    return data;
  }

  const Call& call_;
  std::string where_;
  size_t at_ = 0;
  std::vector<std::unique_ptr<Memory>> blocks_;
  std::vector<std::pair<size_t, const char*>> written_;
};

// What the Compactor calls, row by row, into blocks of exactly the documented size: n + 16 for compact, n for the others.
class Rows {
 public:
  Rows(const Kernels& kernels, int64_t n) : k_(kernels), indices_(n), u_(n) {}

  void add_tile(const Compactor::Layer& layer, const float* tile, int64_t width, int32_t first) {
    for (size_t b = 0; b < u_.size(); ++b) {
      Block<int32_t> indices(width + 16);
      Block<float> u(width + 16);
      append(b, indices, u, k_.compact(tile + b * width, layer.bias + first, layer.cut ? layer.cut + first : nullptr, width,
                                       first, indices, u));
    }
  }
  void add_dense(const Compactor::Layer& layer, int64_t width, int32_t first) {
    const int64_t rows = static_cast<int64_t>(u_.size());
    Block<float> tile(rows * width);
    k_.dot_block(layer.x, rows, layer.W + first * layer.d, width, layer.d, tile);
    add_tile(layer, tile, width, first);
  }
  void add_screened_tile(const Compactor::Layer& layer, const uint16_t* tile, int64_t width, int32_t first) {
    for (size_t b = 0; b < u_.size(); ++b) {
      const Block<int32_t> found = screen(tile + b * width, width, first);
      const int64_t n = found.size();
      Block<int32_t> indices(n), in_place(n, found);
      Block<float> u(n), again(n);
      const auto verify = [&](const int32_t* candidates, int32_t* members, float* dots) {
        return k_.verify(layer.x + b * layer.d, layer.W, layer.d, layer.bias, layer.cut, candidates, n, members, dots);
      };
      const int64_t members = verify(found, indices, u);
      append(b, indices, u, members);
      if (verify(in_place, in_place, again) != members || !std::equal(indices + 0, indices + members, in_place + 0))
        fail("verify", "in place, other members");
    }
  }
  void add_rounded_tile(const Compactor::Layer& layer, const uint16_t* tile, int64_t width, int32_t first) {
    for (size_t b = 0; b < u_.size(); ++b) {
      const Block<int32_t> found = screen(tile + b * width, width, first);
      Block<float> u(found.size());
      for (int64_t j = 0; j < found.size(); ++j) {
        const int32_t i = found[j];
        u[j] = static_cast<float>(element('h', reinterpret_cast<const char*>(tile + b * width), i - first)) -
               (layer.bias[i] - (layer.cut ? layer.cut[i] : 0.0f));
      }
      append(b, found, u, found.size());
    }
  }
  void finish(int64_t* indptr, int32_t* indices, float* u) const {
    *indptr = 0;
    for (size_t b = 0; b < u_.size(); ++b) {
      indices = std::copy(indices_[b].begin(), indices_[b].end(), indices);
      u = std::copy(u_[b].begin(), u_[b].end(), u);
      indptr[b + 1] = indptr[b] + static_cast<int64_t>(u_[b].size());
    }
  }

 private:
  Block<int32_t> screen(const uint16_t* tile, int64_t width, int32_t first) const {
    Block<int32_t> room(width);
    const int64_t n = k_.screen(tile, width, 0, first, room);
    return Block<int32_t>(n, room);
  }
  void append(size_t b, const int32_t* indices, const float* u, int64_t n) {
    indices_[b].insert(indices_[b].end(), indices, indices + n);
    u_[b].insert(u_[b].end(), u, u + n);
  }

  const Kernels& k_;
  std::vector<std::vector<int32_t>> indices_;
  std::vector<std::vector<float>> u_;
};

struct Engine {
  const Kernels& k;
  int threads;
  std::unique_ptr<Compactor> compactor = nullptr;  // the one of the calls at hand
  std::unique_ptr<Rows> rows = nullptr;
  std::unique_ptr<Largest> largest = nullptr;
};

static_assert(sizeof(Kernels) == 21 * sizeof(void (*)()), "another kernel: record.py and kReplay have to call it");

// name -> the call.  compact, screen, verify and dot_block are called by the Compactor, and by Rows.
const std::map<std::string, void (*)(Engine&, Arguments&)> kReplay = {
    {"round_rows", [](Engine& e, Arguments& a) {
       std::apply(e.k.round_rows, std::tuple{a.in<float>(), a.integer(), a.integer(), a.integer(), a.out<uint16_t>(),
                                             a.out<double>(), e.threads});
     }},
    {"sound_csr", [](Engine&, Arguments& a) {
       const auto arguments = std::tuple{a.in<int64_t>(), a.integer(), a.in<int32_t>(), a.integer(), a.integer()};
       a.result(std::apply(sound_csr, arguments));
     }},
    {"sound_csc", [](Engine&, Arguments& a) {
       const auto arguments = std::tuple{a.in<int64_t>(), a.integer(), a.in<int32_t>(), a.integer(), a.in<int64_t>(),
                                         a.integer()};
       a.result(std::apply(sound_csc, arguments));
     }},
    {"stale_rows", [](Engine& e, Arguments& a) {
       const auto arguments = std::tuple{a.in<float>(), a.integer(), a.integer(), a.in<uint16_t>(),
                                          a.in<double>(), e.threads};
       a.result(std::apply(e.k.stale_rows, arguments));
     }},
    {"column_residuals", [](Engine& e, Arguments& a) {
       std::apply(e.k.column_residuals, std::tuple{a.in<float>(), a.in<uint16_t>(), a.integer(), a.integer(), a.integer(),
                                                   a.integer(), a.out<float>(), e.threads});
     }},
    {"screen_x", [](Engine& e, Arguments& a) {
       std::apply(e.k.screen_x, std::tuple{a.screen(), a.in<float>(), a.integer(), a.in<double>(), a.in_out<uint16_t>(),
                                           e.threads});
     }},
    {"screen_w", [](Engine& e, Arguments& a) {
       std::apply(e.k.screen_w, std::tuple{a.screen(), a.in<uint16_t>(), a.in<float>(), a.integer(), a.in<double>(),
                                           a.in<float>(), a.in<float>(), a.out<uint16_t>(), e.threads});
     }},
    {"activate", [](Engine& e, Arguments& a) {
       const auto kind = static_cast<Activation>(a.integer());
       std::apply(e.k.activate, std::tuple{kind, a.integer(), a.in<int32_t>(), a.in<float>(), a.in<float>(), a.in<float>(),
                                           a.in<float>(), a.in<float>(), a.out<float>(), e.threads});
     }},
    {"decode", [](Engine& e, Arguments& a) {
       const Csr code = a.csr();
       const int64_t nnz = a.integer();
       const float* values = a.in<float>();
       const int64_t V = a.integer();
       const float* W = a.in<float>();
       const int64_t d = a.integer(), groups = static_cast<int64_t>(a.elements()) - 1;
       const int64_t* bounds = a.in<int64_t>();
       e.k.decode(code, nnz, values, V, W, d, bounds, groups, a.out<float>(), e.threads);
     }},
    {"sampled_dots", [](Engine& e, Arguments& a) {
       std::apply(e.k.sampled_dots, std::tuple{a.csr(), a.in<float>(), a.in<float>(), a.integer(), a.out<float>(),
                                               e.threads});
     }},
    {"decode_loss", [](Engine& e, Arguments& a) {
       std::apply(e.k.decode_loss, std::tuple{a.csr(), a.integer(), a.in<float>(), a.in<float>(), a.in<float>(),
                                              a.in<float>(), a.in<float>(), a.in<float>(), a.real(), a.integer(),
                                              a.out<float>(), a.out<float>(), a.out<float>(), a.out<float>(), e.threads});
     }},
    {"value_gradients", [](Engine& e, Arguments& a) {
       const bool gated = a.flag();
       const Csr code = a.csr();
       const int64_t nnz = a.integer();
       const float *u = a.in<float>(), *values = a.in<float>(), *scale = a.in<float>(), *weight = a.in<float>();
       const double normaliser = a.real();
       const int64_t features = a.integer(), parts = a.integer();
       float* dots = a.in_out<float>();
       const float* dots_aux = a.in<float>();
       Block<float> row(features * e.threads);
       e.k.value_gradients(gated, code, nnz, u, values, scale, weight, normaliser, features, static_cast<int>(parts), dots,
                           dots_aux, a.in_out<float>(), row, e.threads);
     }},
    {"transpose", [](Engine& e, Arguments& a) {
       const Csr code = a.csr();
       const int64_t features = a.integer();
       a.skip(2);  // the parts there, and their scratch
       Block<int64_t> scratch(features * e.threads);
       int64_t* colptr = a.out<int64_t>();
       int32_t* rows = a.out<int32_t>();
       e.k.transpose(code, features, e.threads, scratch, colptr, rows, a.out<int64_t>(), e.threads);
     }},
    {"outer", [](Engine& e, Arguments& a) {
       const Csc code = a.csc();
       const int64_t features = a.integer();
       const std::vector<Source> sources = a.sources();
       const int64_t d = a.integer();
       const int64_t* list = a.in<int64_t>();
       const int64_t first = a.integer(), n = a.integer();
       Block<float> scratch(gradient_scratch(code.colptr, features, d, e.threads));
       e.k.outer(code, sources.data(), static_cast<int>(sources.size()), d, list, first, n, a.in_out<float>(), scratch,
                 e.threads);
     }},
    {"grad_sqnorm", [](Engine& e, Arguments& a) {
       const Csc code = a.csc();
       const int64_t features = a.integer();
       const std::vector<Source> sources = a.sources();
       const int64_t d = a.integer(), first = a.integer(), n = a.integer();
       const float *W = a.in<float>(), *self_coefficient = a.in<float>();
       const bool project = a.flag();
       Block<float> scratch(gradient_scratch(code.colptr, features, d, e.threads));
       e.k.grad_sqnorm(code, sources.data(), static_cast<int>(sources.size()), d, first, n, W, self_coefficient, project,
                       a.out<double>(), scratch, e.threads);
     }},
    {"weight_step", [](Engine& e, Arguments& a) {
       const Csc code = a.csc();
       const int64_t features = a.integer();
       const std::vector<Source> sources = a.sources();
       const int64_t d = a.integer(), first = a.integer(), n = a.integer();
       const float* self_coefficient = a.in<float>();
       const float grad_scale = static_cast<float>(a.real());
       const Adam adam = a.adam();
       float *W = a.in_out<float>(), *v = a.in_out<float>();
       int64_t* last_step = a.in_out<int64_t>();
       Block<float> scratch(gradient_scratch(code.colptr, features, d, e.threads));
       e.k.weight_step(code, sources.data(), static_cast<int>(sources.size()), d, first, n, self_coefficient, grad_scale,
                       adam, W, v, last_step, a.shadow(), scratch, e.threads);
     }},
    {"row_step", [](Engine& e, Arguments& a) {
       const float* G = a.in<float>();
       const int64_t* colptr = a.in<int64_t>();
       const int64_t d = a.integer(), n = a.integer();
       const float grad_scale = static_cast<float>(a.real());
       const Adam adam = a.adam();
       float *W = a.in_out<float>(), *v = a.in_out<float>();
       int64_t* last_step = a.in_out<int64_t>();
       Block<float> scratch(d * e.threads);
       e.k.row_step(G, colptr, d, n, grad_scale, adam, W, v, last_step, a.shadow(), scratch, e.threads);
     }},
    {"scatter", [](Engine& e, Arguments& a) {
       std::apply(e.k.scatter, std::tuple{a.in<int64_t>(), a.in<int32_t>(), a.in<int64_t>(), a.integer(), a.integer(),
                                          a.integer(), a.in<float>(), a.out<float>(), e.threads});
     }},
    {"gather", [](Engine& e, Arguments& a) {
       std::apply(e.k.gather, std::tuple{a.in<int64_t>(), a.in<int32_t>(), a.integer(), a.integer(), a.integer(),
                                         a.in<float>(), a.in_out<float>(), e.threads});
     }},
    {"Compactor", [](Engine& e, Arguments& a) {
       const int64_t rows = a.integer();
       e.compactor = std::make_unique<Compactor>(rows, e.threads);
       e.rows = std::make_unique<Rows>(e.k, rows);
     }},
    {"Compactor.add_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const float* tile = a.in<float>();
       const int64_t width = a.integer(), first = a.integer();
       e.compactor->add_tile(e.k, layer, tile, width, static_cast<int32_t>(first), e.threads);
       e.rows->add_tile(layer, tile, width, static_cast<int32_t>(first));
     }},
    {"Compactor.add_screened_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const uint16_t* tile = a.in<uint16_t>();
       const int64_t width = a.integer(), first = a.integer();
       e.compactor->add_screened_tile(e.k, layer, tile, width, static_cast<int32_t>(first), a.real(), e.threads);
       e.rows->add_screened_tile(layer, tile, width, static_cast<int32_t>(first));
     }},
    {"Compactor.add_rounded_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const uint16_t* tile = a.in<uint16_t>();
       const int64_t width = a.integer(), first = a.integer();
       e.compactor->add_rounded_tile(e.k, layer, tile, width, static_cast<int32_t>(first), e.threads);
       e.rows->add_rounded_tile(layer, tile, width, static_cast<int32_t>(first));
     }},
    {"Compactor.add_dense", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const int64_t width = a.integer(), first = a.integer();
       e.compactor->add_dense(e.k, layer, width, static_cast<int32_t>(first), e.threads);
       e.rows->add_dense(layer, width, static_cast<int32_t>(first));
     }},
    {"Compactor.add_bounded_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const float *tile = a.in<float>(), *bias = a.in<float>(), *margins = a.in<float>();
       const int64_t width = a.integer(), first = a.integer();
       e.compactor->add_bounded_tile(e.k, layer, tile, bias, margins, width, static_cast<int32_t>(first), a.real(), e.threads);
       e.rows->add_dense(layer, width, static_cast<int32_t>(first));
     }},
    {"Compactor.nnz", [](Engine& e, Arguments& a) {
       a.result(e.compactor->nnz());
       if (e.compactor->candidates() < 0) fail("candidates", "a negative number");
     }},
    {"Compactor.finish", [](Engine& e, Arguments& a) {
       const size_t rows = a.elements();
       int64_t* indptr = a.out<int64_t>();
       const size_t nnz = a.elements();
       int32_t* indices = a.out<int32_t>();
       float* u = a.out<float>();
       e.compactor->finish(indptr, indices, u, e.threads);
       Block<int64_t> own_indptr(rows);
       Block<int32_t> own_indices(nnz);
       Block<float> own_u(nnz);
       e.rows->finish(own_indptr, own_indices, own_u);
       const auto same = [&](const char* name, char dtype, const void* got, const std::string& want) {
         compare(a.where() + ", against the kernels alone, " + name, dtype, static_cast<const char*>(got), want, true);
       };
       same("indptr", 'l', indptr, own_indptr.bytes());
       same("indices", 'i', indices, own_indices.bytes());
       same("u", 'f', u, own_u.bytes());
     }},
    {"Largest", [](Engine& e, Arguments& a) {
       const int64_t rows = a.integer(), k = a.integer();
       const bool whole = a.flag();
       const int64_t room = a.integer();
       e.largest = std::make_unique<Largest>(rows, k, whole, room, static_cast<int>(a.integer()));
     }},
    {"Largest.begin", [](Engine& e, Arguments& a) {
       const int64_t first = a.integer();
       e.largest->begin(first, a.integer());
     }},
    {"Largest.expect", [](Engine& e, Arguments& a) { e.largest->expect(a.in<float>()); }},
    {"Largest.add_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const float* tile = a.in<float>();
       const int64_t width = a.integer(), first = a.integer();
       e.largest->add_tile(e.k, layer, tile, width, static_cast<int32_t>(first), e.threads);
     }},
    {"Largest.add_screened_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const uint16_t* tile = a.in<uint16_t>();
       const int64_t width = a.integer(), first = a.integer();
       e.largest->add_screened_tile(e.k, layer, tile, width, static_cast<int32_t>(first), a.real(), e.threads);
     }},
    {"Largest.add_bounded_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const float *tile = a.in<float>(), *bias = a.in<float>();
       const int64_t width = a.integer(), first = a.integer();
       e.largest->add_bounded_tile(e.k, layer, tile, bias, width, static_cast<int32_t>(first), e.threads);
     }},
    {"Largest.add_rounded_tile", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const uint16_t* tile = a.in<uint16_t>();
       const int64_t width = a.integer(), first = a.integer();
       e.largest->add_rounded_tile(e.k, layer, tile, width, static_cast<int32_t>(first), e.threads);
     }},
    {"Largest.add_dense", [](Engine& e, Arguments& a) {
       const Compactor::Layer layer = a.layer();
       const int64_t width = a.integer(), first = a.integer();
       e.largest->add_dense(e.k, layer, width, static_cast<int32_t>(first), e.threads);
     }},
    {"Largest.settle", [](Engine& e, Arguments& a) { e.largest->settle(e.k, a.layer(), e.threads); }},
    {"Largest.select", [](Engine& e, Arguments& a) { a.result(e.largest->select(e.threads)); }},
    {"Largest.finish", [](Engine& e, Arguments& a) {
       int64_t* indptr = a.out<int64_t>();
       int32_t* indices = a.out<int32_t>();
       e.largest->finish(indptr, indices, a.out<float>(), e.threads);
     }},
};

std::vector<std::pair<std::string, const Kernels*>> supported_isas() {  // as in csrc/bindings.cpp
  std::vector<std::pair<std::string, const Kernels*>> isas;
#ifdef SAE_FAST_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2"))
    isas.emplace_back("avx512", &avx512::kernels());
#endif
#ifdef SAE_FAST_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    isas.emplace_back("avx2", &avx2::kernels());
#endif
  isas.emplace_back("plain", &plain::kernels());
  return isas;
}

void replay(const Call& call, std::vector<Engine>& engines, const std::string& where) {
  const auto entry = kReplay.find(call.name);
  if (entry == kReplay.end()) throw std::runtime_error(where + ": nothing replays this");
  std::vector<std::string> first;
  for (Engine& engine : engines) {
    Arguments arguments(call, where + ", threads " + std::to_string(engine.threads));
    entry->second(engine, arguments);
    arguments.check(call.name == "Compactor.finish", first);
  }
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 2) throw std::runtime_error("usage: driver FILE");
  const Recording recording = read(argv[1]);
  std::map<std::string, int> calls;
  for (const Call& call : recording.calls) ++calls[call.name];
  for (const auto& [name, function] : kReplay)
    if (calls[name] == 0) fail(name, "is never called: record.py has to");
  for (const auto& [isa, kernels] : supported_isas()) {
    std::vector<Engine> engines;
    for (const int threads : kThreads) engines.push_back({*kernels, threads});
    for (size_t c = 0; c < recording.calls.size(); ++c)
      replay(recording.calls[c], engines, isa + ", call " + std::to_string(c) + ", " + recording.calls[c].name);
    std::printf("%s: %zu calls with 1 and 3 threads\n", isa.c_str(), recording.calls.size());
  }
  if (failures > 0) std::fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
