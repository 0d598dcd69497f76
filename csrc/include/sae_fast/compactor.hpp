// Collects the entries of a block of rows while its pre-activations are made tile by tile (all rows, some features), and
// lays them out as CSR at the end.  Nothing is dropped: storage grows.  Plain code: the vector loops are the kernels'.
#pragma once
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "sae_fast/cpu.hpp"
#include "sae_fast/parallel.hpp"  // first: it names the namespace of what is compiled here
#include "sae_fast/bf16.hpp"

namespace sae_fast {

class Compactor {
 public:
  // Each part owns a run of rows, whichever thread serves it, so that the layout does not depend on scheduling.
  Compactor(int64_t rows, int parts) : rows_(rows), parts_(parts) {
    for (size_t p = 0; p < parts_.size(); ++p)
      parts_[p].first = rows * p / parts, parts_[p].last = rows * (p + 1) / parts;
  }

  // What a tile of features is decided by: rows x [rows, d]; W [.., d], bias and cut (or null), which start at feature 0.
  struct Layer {
    const float *x, *W;
    int64_t d;
    const float *bias, *cut;
  };

  // tile [rows, width] of u for the features first .. first + width, which decides.
  void add_tile(const Kernels& kernels, const Layer& layer, const float* tile, int64_t width, int32_t first, int threads) {
    add(width, threads, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      for (int64_t r = 0; r < n; ++r) {
        part.reserve(part.size + width + kSlack);
        counts[r] = part.take(kernels.compact(tile + (b + r) * width, layer.bias + first, from(layer.cut, first), width,
                                              first, part.next_index(), part.next_u()));
      }
    });
  }

  // tile [rows, width] of bfloat16 upper bounds of u + bias - cut: what is not <= 0 is verified.  Where a block of rows
  // has more candidates than dense_above of its entries, all of them are, which is faster then; the result is the same.
  void add_screened_tile(const Kernels& kernels, const Layer& layer, const uint16_t* tile, int64_t width, int32_t first,
                         double dense_above, int threads) {
    add(width, threads, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      part.candidates.reserve(n * width);
      int64_t found[kBlock + 1] = {0};
      for (int64_t r = 0; r < n; ++r) {
        found[r + 1] = found[r] + kernels.screen(tile + (b + r) * width, width, 0, first, part.candidates.data() + found[r]);
        if (found[r + 1] > dense_above * static_cast<double>(n * width))
          return add_dense_block(kernels, layer, part, b, n, width, first, counts);
      }
      verify_found(kernels, layer, part, b, n, found, counts);
    });
  }

  // The same from a tile [rows, width] of float u that is off by at most margins [rows]; bias [width] is the layer's, or NaN
  // where that does not hold.
  void add_bounded_tile(const Kernels& kernels, const Layer& layer, const float* tile, const float* bias, const float* margins,
                        int64_t width, int32_t first, double dense_above, int threads) {
    add(width, threads, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      part.candidates.reserve(n * width + kSlack);
      part.block.reserve(2 * width + kSlack);
      float *cut = part.block.data(), *unused = cut + width;
      int64_t found[kBlock + 1] = {0};
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t i = 0; i < width; ++i) cut[i] = (layer.cut ? layer.cut[first + i] : 0.0f) - margins[b + r];
        found[r + 1] = found[r] + kernels.compact(tile + (b + r) * width, bias, cut, width, first,
                                                  part.candidates.data() + found[r], unused);
        if (found[r + 1] > dense_above * static_cast<double>(n * width))
          return add_dense_block(kernels, layer, part, b, n, width, first, counts);
      }
      verify_found(kernels, layer, part, b, n, found, counts);
    });
  }

  // tile [rows, width] of bfloat16 u + bias - cut, which decides: no verification.
  void add_rounded_tile(const Kernels& kernels, const Layer& layer, const uint16_t* tile, int64_t width, int32_t first,
                        int threads) {
    add(width, threads, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      for (int64_t r = 0; r < n; ++r) {
        part.reserve(part.size + width + kSlack);
        const int64_t found = kernels.screen(tile + (b + r) * width, width, 0, first, part.next_index());
        for (int64_t j = 0; j < found; ++j) {
          const int64_t i = part.next_index()[j];
          const float excess = host::widen(tile[(b + r) * width + i - first]);
          part.next_u()[j] = excess - (layer.bias[i] - (layer.cut ? layer.cut[i] : 0.0f));
        }
        counts[r] = part.take(found);
      }
    });
  }

  // The features first .. first + width by fp32 dots alone.
  void add_dense(const Kernels& kernels, const Layer& layer, int64_t width, int32_t first, int threads) {
    add(width, threads, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      add_dense_block(kernels, layer, part, b, n, width, first, counts);
    });
  }

  int64_t nnz() const { return total(&Part::size); }
  int64_t candidates() const { return total(&Part::screened); }  // that were verified one by one

  // indptr [rows + 1], starting at 0; indices and u [nnz].
  void finish(int64_t* indptr, int32_t* indices, float* u, int threads) const {
    indptr[0] = 0;
    for (int64_t b = 0; b < rows_; ++b) {
      indptr[b + 1] = indptr[b];
      for (const auto& counts : counts_) indptr[b + 1] += counts[b];
    }
    std::vector<int64_t> cursor(indptr, indptr + rows_);
    host::parallel_for(parts_.size(), 1, threads, [&](int64_t p, int) {
      const Part& part = parts_[p];
      int64_t from = 0;
      for (const auto& counts : counts_)
        for (int64_t b = part.first; b < part.last; ++b) {
          const int64_t n = counts[b];
          if (n == 0) continue;
          std::memcpy(indices + cursor[b], part.indices.data() + from, n * sizeof(int32_t));
          std::memcpy(u + cursor[b], part.u.data() + from, n * sizeof(float));
          cursor[b] += n;
          from += n;
        }
    });
  }

 private:
  static constexpr int64_t kSlack = 16;  // compact() stores whole vectors
  static constexpr int64_t kBlock = 48;  // rows that stay in cache beside the features' rows; a multiple of dot_block's 3 and 4

  // Memory that grows in place where the system can, and is not written before it is used.
  template <class T>
  class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }
    void reserve(int64_t n) {
      if (n <= capacity_) return;
      void* grown = std::realloc(data_, sizeof(T) * (n + n / 2));
      if (grown == nullptr) throw std::bad_alloc();
      data_ = static_cast<T*>(grown);
      capacity_ = n + n / 2;
    }
    T* data() { return data_; }
    const T* data() const { return data_; }

   private:
    T* data_ = nullptr;
    int64_t capacity_ = 0;
  };

  struct Part {
    int64_t first = 0, last = 0, size = 0, screened = 0;
    Buffer<int32_t> indices, candidates;
    Buffer<float> u, block;
    void reserve(int64_t n) {
      indices.reserve(n);
      u.reserve(n);
    }
    int32_t* next_index() { return indices.data() + size; }
    float* next_u() { return u.data() + size; }
    int32_t take(int64_t n) {
      size += n;
      return static_cast<int32_t>(n);
    }
  };

  int64_t total(int64_t Part::* count) const {
    int64_t sum = 0;
    for (const Part& part : parts_) sum += part.*count;
    return sum;
  }

  static const float* from(const float* vector, int64_t first) { return vector ? vector + first : nullptr; }

  // The dots of the candidates found[r] .. found[r + 1] of each row.
  void verify_found(const Kernels& kernels, const Layer& layer, Part& part, int64_t b, int64_t n, const int64_t* found,
                    int32_t* counts) {
    part.screened += found[n];
    part.reserve(part.size + found[n] + kSlack);
    for (int64_t r = 0; r < n; ++r)
      counts[r] = part.take(kernels.verify(layer.x + (b + r) * layer.d, layer.W, layer.d, layer.bias, layer.cut,
                                           part.candidates.data() + found[r], found[r + 1] - found[r], part.next_index(),
                                           part.next_u()));
  }

  void add_dense_block(const Kernels& kernels, const Layer& layer, Part& part, int64_t b, int64_t n, int64_t width,
                       int32_t first, int32_t* counts) {
    part.block.reserve(kBlock * width);
    kernels.dot_block(layer.x + b * layer.d, n, layer.W + first * layer.d, width, layer.d, part.block.data());
    for (int64_t r = 0; r < n; ++r) {
      part.reserve(part.size + width + kSlack);
      counts[r] = part.take(kernels.compact(part.block.data() + r * width, layer.bias + first, from(layer.cut, first),
                                            width, first, part.next_index(), part.next_u()));
    }
  }

  // rows(part, b, n, counts) appends the entries of rows b .. b + n and writes how many each has.
  template <class Rows>
  void add(int64_t width, int threads, Rows rows) {
    counts_.emplace_back(rows_);
    int32_t* counts = counts_.back().data();
    bool out_of_memory = false;
    host::parallel_for(parts_.size(), 1, threads, [&](int64_t p, int) {
      Part& part = parts_[p];
      try {
        for (int64_t b = part.first; b < part.last; b += kBlock)
          rows(part, b, part.last - b < kBlock ? part.last - b : kBlock, counts + b);
      } catch (...) {  // an exception must not leave a parallel region
        __atomic_store_n(&out_of_memory, true, __ATOMIC_RELAXED);
      }
    });
    if (out_of_memory) throw std::bad_alloc();
  }

  int64_t rows_;
  std::vector<Part> parts_;
  std::vector<std::vector<int32_t>> counts_;  // per tile, per row
};

}  // namespace sae_fast
