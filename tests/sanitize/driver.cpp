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
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "host/arguments.hpp"
#include "host/compactor.hpp"
#include "host/isas.hpp"
#include "host/largest.hpp"
#include "host/sound.hpp"

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

struct AnyBlock {
  virtual ~AnyBlock() = default;
};

// A heap block of exactly n elements: a copy of content, or poison.  Null for none, as torch gives an empty tensor.
template <class T>
class Block : public AnyBlock {
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
  Arguments(const Call& call, int threads, std::string where) : call_(call), threads_(threads), where_(std::move(where)) {}

  double real() {
    const Argument& a = take();
    if (a.dtype) throw std::runtime_error(where_ + ": an array in the place of a number");
    return a.number;
  }
  void skip() { take(); }
  int64_t integer() { return static_cast<int64_t>(real()); }
  template <class T>
  T* array(bool content) {
    const Argument& a = take();
    if (a.dtype ? item_size(a.dtype) != sizeof(T) : a.number != 0)
      throw std::runtime_error(where_ + ": argument " + std::to_string(at_ - 1) + " is not an array of the right type");
    if (a.dtype == 0 || a.before->empty()) return nullptr;  // torch gives an empty tensor the address 0
    const T* from = content ? reinterpret_cast<const T*>(a.before->data()) : nullptr;
    return block<T>(static_cast<int64_t>(a.before->size() / sizeof(T)), from);
  }
  int64_t elements() const {  // of the array whose turn is next
    const Argument& a = call_.arguments.at(at_);
    return a.dtype ? static_cast<int64_t>(a.before->size() / item_size(a.dtype)) : 0;
  }

  // What args::each visits.
  template <class T>
  void in(const char*, const T*& to) { to = array<T>(true); }
  template <class T>
  void out(const char*, T*& to, bool content = false) {
    to = array<T>(content);
    if (to) written_.emplace_back(at_ - 1, reinterpret_cast<const char*>(to));
  }
  template <class T>
  void in_out(const char* name, T*& to) { out(name, to, true); }
  template <class T>
  void by(const char*, T& to) { to = static_cast<T>(real()); }
  void by(const char* name, int& to) {
    const int recorded = static_cast<int>(integer());
    to = std::strcmp(name, "threads") == 0 ? threads_ : recorded;
  }
  void by(const char*, Csr& to) {
    const int64_t rows = elements() - 1;
    to = {array<int64_t>(true), array<int32_t>(true), rows};
  }
  void by(const char*, Csc& to) {
    const int64_t features = elements() - 1;
    to = {array<int64_t>(true), array<int32_t>(true), array<int64_t>(true), features};
  }
  void by(const char*, Sources& to) {
    sources_.resize(integer());
    for (Source& source : sources_) source.values = array<float>(true);
    for (Source& source : sources_) source.A = array<float>(true);
    to = {sources_.data(), static_cast<int>(sources_.size())};
  }
  void by(const char*, Bounds& to) {
    const int64_t groups = elements() - 1;
    to = {array<int64_t>(true), groups};
  }
  void by(const char*, Screen& to) {
    to = {integer(), integer(), array<int64_t>(true), integer(), real(), array<double>(true), static_cast<uint16_t>(integer())};
  }
  void by(const char*, Adam& to) {
    const double lr = real(), beta1 = real(), beta2 = real(), eps = real();
    const int64_t step = integer();
    const bool project = integer();
    to = make_adam(lr, beta1, beta2, eps, step, project, integer());
  }
  void by(const char*, Layer& to) {
    to = {array<float>(true), array<float>(true), integer(), array<float>(true), array<float>(true)};
  }
  void by(const char* name, Shadow& to) {
    if (elements() == 0) return skip();
    in_out(name, to.rows);
    in_out(name, to.norms);
  }
  void memory(Memory& to) {
    to = {this, [](void* self, int64_t bytes) -> void* { return static_cast<Arguments*>(self)->block<char>(bytes); }};
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
  T* block(int64_t n, const T* content = nullptr) {
    auto block = std::make_unique<Block<T>>(n, content);
    T* data = *block;
    blocks_.push_back(std::move(block));
    return data;
  }

  const Call& call_;
  int threads_;
  std::string where_;
  std::vector<Source> sources_;
  size_t at_ = 0;
  std::vector<std::unique_ptr<AnyBlock>> blocks_;
  std::vector<std::pair<size_t, const char*>> written_;
};

// What a Compactor does, row by row, in blocks of exactly the documented size: n + kSlack for compact, n for the others.
class Rows : public Tiles {
 public:
  Rows(const Kernels& kernels, int64_t n) : Tiles(kernels), indices_(n), u_(n) {}

  void add_tile(const args::add_tile& a) override { add_exact(a, a.tile); }
  void add_dense(const args::add_dense& a) override { add_dots(a); }
  void add_bounded_tile(const args::add_bounded_tile& a) override { add_dots(a); }
  void add_screened_tile(const args::add_screened_tile& a) override {
    const Layer& of = a.layer;
    for (size_t b = 0; b < u_.size(); ++b) {
      const Block<int32_t> found = screen(a, b);
      const int64_t n = found.size();
      Block<int32_t> indices(n), in_place(n, found);
      Block<float> u(n), again(n);
      const auto verify = [&](const int32_t* candidates, int32_t* members, float* dots) {
        return kernels_.verify({.x = of.x + b * of.d, .W = of.W, .d = of.d, .bias = of.bias, .cut = of.cut,
                                .candidates = candidates, .n = n, .indices = members, .u = dots});
      };
      const int64_t members = verify(found, indices, u);
      append(b, indices, u, members);
      if (verify(in_place, in_place, again) != members || !std::equal(indices + 0, indices + members, in_place + 0))
        fail("verify", "in place, other members");
    }
  }
  void add_rounded_tile(const args::add_rounded_tile& a) override {
    for (size_t b = 0; b < u_.size(); ++b) {
      const Block<int32_t> found = screen(a, b);
      Block<float> u(found.size());
      for (int64_t j = 0; j < found.size(); ++j) {
        const int32_t i = found[j];
        u[j] = static_cast<float>(element('h', reinterpret_cast<const char*>(a.tile + b * a.width), i - a.first)) -
               (a.layer.bias[i] - (a.layer.cut ? a.layer.cut[i] : 0.0f));
      }
      append(b, found, u, found.size());
    }
  }
  void finish(const args::finish& a) override {
    *a.indptr = 0;
    int64_t at = 0;
    for (size_t b = 0; b < u_.size(); ++b) {
      std::copy(indices_[b].begin(), indices_[b].end(), a.indices + at);
      std::copy(u_[b].begin(), u_[b].end(), a.u + at);
      a.indptr[b + 1] = at += static_cast<int64_t>(u_[b].size());
    }
  }
  int64_t candidates() const override { return 0; }

 private:
  template <class Tile>
  void add_exact(const Tile& a, const float* tile) {
    const float* cut = a.layer.cut ? a.layer.cut + a.first : nullptr;
    for (size_t b = 0; b < u_.size(); ++b) {
      Block<int32_t> indices(a.width + kSlack);
      Block<float> u(a.width + kSlack);
      append(b, indices, u, kernels_.compact({.pre = tile + b * a.width, .bias = a.layer.bias + a.first, .cut = cut,
                                              .n = a.width, .first = a.first, .indices = indices, .u = u}));
    }
  }
  template <class Tile>
  void add_dots(const Tile& a) {
    const int64_t rows = static_cast<int64_t>(u_.size());
    Block<float> tile(rows * a.width);
    dots(a.layer, 0, rows, a.width, a.first, tile);
    add_exact(a, tile);
  }
  template <class Tile>
  Block<int32_t> screen(const Tile& a, size_t b) const {
    Block<int32_t> room(a.width);
    const int64_t n = kernels_.screen({.ub = a.tile + b * a.width, .n = a.width, .above = 0, .first = a.first, .indices = room});
    return Block<int32_t>(n, room);
  }
  void append(size_t b, const int32_t* indices, const float* u, int64_t n) {
    indices_[b].insert(indices_[b].end(), indices, indices + n);
    u_[b].insert(u_[b].end(), u, u + n);
  }

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

using Replay = std::function<void(Engine&, Arguments&)>;

template <class Result, class Args>
Replay of(Result (*Kernels::*kernel)(const Args&)) {
  return [kernel](Engine& e, Arguments& arguments) {
    Args a{};
    args::each(a, arguments);
    if constexpr (std::is_void_v<Result>) (e.k.*kernel)(a);
    else arguments.result((e.k.*kernel)(a));
  };
}

template <class Args>
Replay of_compactor(void (Tiles::*method)(const Args&)) {
  return [method](Engine& e, Arguments& arguments) {
    Args a{};
    args::each(a, arguments);
    (e.compactor.get()->*method)(a);
    if constexpr (!std::is_same_v<Args, args::finish>) (e.rows.get()->*method)(a);
  };
}

template <class Args>
Replay of_largest(void (Tiles::*method)(const Args&)) {
  return [method](Engine& e, Arguments& arguments) {
    Args a{};
    args::each(a, arguments);
    (e.largest.get()->*method)(a);
  };
}

void finish(Engine& e, Arguments& a) {
  const int64_t rows = a.elements();
  args::finish got{};
  args::each(got, a);
  e.compactor->finish(got);
  const int64_t nnz = got.indptr[rows - 1];
  Block<int64_t> indptr(rows);
  Block<int32_t> indices(nnz);
  Block<float> u(nnz);
  e.rows->finish({.indptr = indptr, .indices = indices, .u = u, .threads = 1});
  const auto same = [&](const char* name, char dtype, const void* found, const std::string& want) {
    compare(a.where() + ", against the kernels alone, " + name, dtype, static_cast<const char*>(found), want, true);
  };
  same("indptr", 'l', got.indptr, indptr.bytes());
  same("indices", 'i', got.indices, indices.bytes());
  same("u", 'f', got.u, u.bytes());
}

// name -> the call.
const std::map<std::string, Replay> kReplay = [] {
  std::map<std::string, Replay> all = {
#define KERNEL(Result, name, fields) {#name, of(&Kernels::name)},
#define TILE(name, fields) {"Compactor." #name, of_compactor(&Tiles::name)}, {"Largest." #name, of_largest(&Tiles::name)},
#include "sae_fast/kernels.def"
  };
  for (const char* of_tiles : {"compact", "screen", "verify", "dot_block"}) all.erase(of_tiles);  // Rows calls them
  all["Compactor.finish"] = finish;
  all["sound_csr"] = [](Engine&, Arguments& a) {
    const int64_t rows = a.elements() - 1, *indptr = a.array<int64_t>(true), nnz = a.elements();
    const int32_t* indices = a.array<int32_t>(true);
    a.result(sound_csr(indptr, rows, indices, nnz, a.integer()));
  };
  all["sound_csc"] = [](Engine&, Arguments& a) {
    const int64_t features = a.elements() - 1, *colptr = a.array<int64_t>(true), nnz = a.elements();
    const int32_t* rows = a.array<int32_t>(true);
    const int64_t* perm = a.array<int64_t>(true);
    a.result(sound_csc(colptr, features, rows, nnz, perm, a.integer()));
  };
  all["Compactor"] = [](Engine& e, Arguments& a) {
    const int64_t rows = a.integer();
    a.skip();  // the parts there
    e.compactor = std::make_unique<Compactor>(e.k, rows, e.threads);
    e.rows = std::make_unique<Rows>(e.k, rows);
  };
  all["Compactor.nnz"] = [](Engine& e, Arguments& a) {
    a.result(e.compactor->nnz());
    if (e.compactor->candidates() < 0) fail("candidates", "a negative number");
  };
  all["Largest"] = [](Engine& e, Arguments& a) {
    const int64_t rows = a.integer(), k = a.integer(), budget = a.integer();
    const bool signs = a.integer();
    const int64_t room = a.integer();
    e.largest = std::make_unique<Largest>(e.k, rows, k, budget, signs, room, static_cast<int>(a.integer()));
  };
  all["Largest.begin"] = [](Engine& e, Arguments& a) {
    const int64_t first = a.integer(), n = a.integer();
    const float* guess = nullptr;
    a.in("guess", guess);
    e.largest->begin(first, n, guess);
  };
  all["Largest.settle"] = [](Engine& e, Arguments& a) {
    Layer layer;
    a.by("layer", layer);
    a.skip();  // the threads there
    a.result(e.largest->settle(layer, e.threads));
  };
  all["Largest.select"] = [](Engine& e, Arguments& a) {
    a.skip();
    a.result(e.largest->select(e.threads));
  };
  return all;
}();

void replay(const Call& call, std::vector<Engine>& engines, const std::string& where) {
  const auto entry = kReplay.find(call.name);
  if (entry == kReplay.end()) throw std::runtime_error(where + ": nothing replays this");
  std::vector<std::string> first;
  for (Engine& engine : engines) {
    Arguments arguments(call, engine.threads, where + ", threads " + std::to_string(engine.threads));
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
