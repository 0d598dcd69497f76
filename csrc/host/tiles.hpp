// Collectors of entries: pre-activations come tile by tile (a block of rows, some features) and leave as CSR.  Plain code: the
// vector loops are the kernels'.
#pragma once
#include <cstring>
#include <new>
#include <vector>

#include "arguments.hpp"
#include "sae_fast/parallel.hpp"  // first: it names the namespace of what is compiled here
#include "sae_fast/bf16.hpp"

namespace sae_fast {

class Tiles {
 public:
  virtual ~Tiles() = default;
#define TILE(name, fields) virtual void name(const args::name&) = 0;
#include "sae_fast/kernels.def"
  virtual int64_t candidates() const = 0;  // that were verified one by one

 protected:
  explicit Tiles(const Kernels& kernels) : kernels_(kernels) {}

  static constexpr int64_t kBlock = 48;  // rows that stay in cache beside the features' rows; a multiple of dot_block's 3 and 4

  // out [n, width]: u of the rows b .. b + n.
  void dots(const Layer& layer, int64_t b, int64_t n, int64_t width, int32_t first, float* out) const {
    kernels_.dot_block({.x = layer.x + b * layer.d, .rows = n, .W = layer.W + first * layer.d, .features = width,
                        .d = layer.d, .out = out});
  }

  // body(i, worker) for each i < n.  An exception must not leave a parallel region: there is none but of memory.
  template <class Body>
  static void for_each(int64_t n, int threads, const Body& body) {
    bool out_of_memory = false;
    host::parallel_for(n, 1, threads, [&](int64_t i, int worker) {
      try {
        body(i, worker);
      } catch (...) {
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      }
    });
    if (out_of_memory) throw std::bad_alloc();
  }

  const Kernels& kernels_;
};

}  // namespace sae_fast
