// Collects the entries of a block of rows, and lays them out as CSR at the end.  Nothing is dropped: storage grows.
#pragma once
#include <cstdlib>

#include "tiles.hpp"

namespace sae_fast {

class Compactor : public Tiles {
 public:
  // Each part owns a run of rows, whichever thread serves it, so that the layout does not depend on scheduling.
  Compactor(const Kernels& kernels, int64_t rows, int parts) : Tiles(kernels), rows_(rows), parts_(parts) {
    for (size_t p = 0; p < parts_.size(); ++p)
      parts_[p].first = rows * p / parts, parts_[p].last = rows * (p + 1) / parts;
  }

  void add_tile(const args::add_tile& a) override {
    add(a, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      for (int64_t r = 0; r < n; ++r) counts[r] = take_exact(a, part, a.tile + (b + r) * a.width);
    });
  }

  void add_screened_tile(const args::add_screened_tile& a) override {
    add(a, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      part.candidates.reserve(n * a.width);
      verify_found(a, part, b, n, counts, [&](int64_t r, int32_t* to) {
        return kernels_.screen({.ub = a.tile + r * a.width, .n = a.width, .above = 0, .first = a.first, .indices = to});
      });
    });
  }

  void add_bounded_tile(const args::add_bounded_tile& a) override {
    add(a, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      part.candidates.reserve(n * a.width + kSlack);
      part.block.reserve(2 * a.width + kSlack);
      float *cut = part.block.data(), *unused = cut + a.width;
      verify_found(a, part, b, n, counts, [&](int64_t r, int32_t* to) {
        for (int64_t i = 0; i < a.width; ++i) cut[i] = (a.layer.cut ? a.layer.cut[a.first + i] : 0.0f) - a.margins[r];
        return kernels_.compact({.pre = a.tile + r * a.width, .bias = a.bias, .cut = cut, .n = a.width, .first = a.first,
                                 .indices = to, .u = unused});
      });
    });
  }

  void add_rounded_tile(const args::add_rounded_tile& a) override {
    add(a, [&](Part& part, int64_t b, int64_t n, int32_t* counts) {
      for (int64_t r = 0; r < n; ++r) {
        const uint16_t* tile = a.tile + (b + r) * a.width;
        part.reserve(part.size + a.width + kSlack);
        const int64_t found = kernels_.screen({.ub = tile, .n = a.width, .above = 0, .first = a.first,
                                               .indices = part.next_index()});
        for (int64_t j = 0; j < found; ++j) {
          const int64_t i = part.next_index()[j];
          part.next_u()[j] = host::widen(tile[i - a.first]) - (a.layer.bias[i] - (a.layer.cut ? a.layer.cut[i] : 0.0f));
        }
        counts[r] = part.take(found);
      }
    });
  }

  void add_dense(const args::add_dense& a) override {
    add(a, [&](Part& part, int64_t b, int64_t n, int32_t* counts) { take_dots(a, part, b, n, counts); });
  }

  int64_t nnz() const { return total(&Part::size); }
  int64_t candidates() const override { return total(&Part::screened); }

  void finish(const args::finish& a) override {
    a.indptr[0] = 0;
    for (int64_t b = 0; b < rows_; ++b) {
      a.indptr[b + 1] = a.indptr[b];
      for (const auto& counts : counts_) a.indptr[b + 1] += counts[b];
    }
    std::vector<int64_t> cursor(a.indptr, a.indptr + rows_);
    host::parallel_for(parts_.size(), 1, a.threads, [&](int64_t p, int) {
      const Part& part = parts_[p];
      int64_t from = 0;
      for (const auto& counts : counts_)
        for (int64_t b = part.first; b < part.last; ++b) {
          const int64_t n = counts[b];
          if (n == 0) continue;
          std::memcpy(a.indices + cursor[b], part.indices.data() + from, n * sizeof(int32_t));
          std::memcpy(a.u + cursor[b], part.u.data() + from, n * sizeof(float));
          cursor[b] += n;
          from += n;
        }
    });
  }

 private:
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

  // The entries among u [width] of a row, appended.
  template <class Tile>
  int32_t take_exact(const Tile& a, Part& part, const float* u) {
    part.reserve(part.size + a.width + kSlack);
    const float* cut = a.layer.cut ? a.layer.cut + a.first : nullptr;
    return part.take(kernels_.compact({.pre = u, .bias = a.layer.bias + a.first, .cut = cut, .n = a.width, .first = a.first,
                                       .indices = part.next_index(), .u = part.next_u()}));
  }

  template <class Tile>
  void take_dots(const Tile& a, Part& part, int64_t b, int64_t n, int32_t* counts) {
    part.block.reserve(kBlock * a.width);
    dots(a.layer, b, n, a.width, a.first, part.block.data());
    for (int64_t r = 0; r < n; ++r) counts[r] = take_exact(a, part, part.block.data() + r * a.width);
  }

  // The dots of the candidates of each row, which find(row, to) lists; or of all of the block, once they are too many.
  template <class Tile, class Find>
  void verify_found(const Tile& a, Part& part, int64_t b, int64_t n, int32_t* counts, const Find& find) {
    int64_t found[kBlock + 1] = {0};
    for (int64_t r = 0; r < n; ++r) {
      found[r + 1] = found[r] + find(b + r, part.candidates.data() + found[r]);
      if (found[r + 1] > a.dense_above * static_cast<double>(n * a.width)) return take_dots(a, part, b, n, counts);
    }
    part.screened += found[n];
    part.reserve(part.size + found[n] + kSlack);
    const Layer& of = a.layer;
    for (int64_t r = 0; r < n; ++r)
      counts[r] = part.take(kernels_.verify({.x = of.x + (b + r) * of.d, .W = of.W, .d = of.d, .bias = of.bias, .cut = of.cut,
                                             .candidates = part.candidates.data() + found[r], .n = found[r + 1] - found[r],
                                             .indices = part.next_index(), .u = part.next_u()}));
  }

  // rows(part, b, n, counts) appends the entries of rows b .. b + n and writes how many each has.
  template <class Tile, class Rows>
  void add(const Tile& a, const Rows& rows) {
    counts_.emplace_back(rows_);
    int32_t* counts = counts_.back().data();
    for_each(parts_.size(), a.threads, [&](int64_t p, int) {
      Part& part = parts_[p];
      for (int64_t b = part.first; b < part.last; b += kBlock)
        rows(part, b, part.last - b < kBlock ? part.last - b : kBlock, counts + b);
    });
  }

  int64_t rows_;
  std::vector<Part> parts_;
  std::vector<std::vector<int32_t>> counts_;  // per tile, per row
};

}  // namespace sae_fast
