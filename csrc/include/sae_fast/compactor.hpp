// Collects the entries of a block of rows while its pre-activations are made tile by tile (all rows, some features), and
// lays them out as CSR at the end.  Nothing is dropped: storage grows.  Plain code: the vectors are the kernel's.
#pragma once
#include <cstring>
#include <new>
#include <vector>

#include "sae_fast/cpu.hpp"

namespace sae_fast {

class Compactor {
 public:
  // Each part owns a run of rows, whichever thread serves it, so that the layout does not depend on scheduling.
  Compactor(int64_t rows, int parts) : rows_(rows), parts_(parts) {
    for (size_t p = 0; p < parts_.size(); ++p)
      parts_[p].first = rows * p / parts, parts_[p].last = rows * (p + 1) / parts;
  }

  // tile [rows, width] of pre-activations for the features first .. first + width; bias and cut start at that feature.
  void add_tile(const Kernels& kernels, const float* tile, int64_t width, int32_t first, const float* bias,
                const float* cut, int threads) {
    constexpr int64_t slack = 16;
    counts_.emplace_back(rows_);
    int32_t* counts = counts_.back().data();
    bool out_of_memory = false;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(|| : out_of_memory)
    for (size_t p = 0; p < parts_.size(); ++p) {
      Part& part = parts_[p];
      try {
        for (int64_t b = part.first; b < part.last; ++b) {
          part.reserve(part.size + width + slack);
          const int64_t n = kernels.compact(tile + b * width, bias, cut, width, first, part.indices.data() + part.size,
                                            part.u.data() + part.size);
          counts[b] = static_cast<int32_t>(n);
          part.size += n;
        }
      } catch (...) {  // an exception must not leave a parallel region
        out_of_memory = true;
      }
    }
    if (out_of_memory) throw std::bad_alloc();
  }

  int64_t nnz() const {
    int64_t total = 0;
    for (const Part& part : parts_) total += part.size;
    return total;
  }

  // indptr [rows + 1], starting at 0; indices and u [nnz].
  void finish(int64_t* indptr, int32_t* indices, float* u, int threads) const {
    indptr[0] = 0;
    for (int64_t b = 0; b < rows_; ++b) {
      indptr[b + 1] = indptr[b];
      for (const auto& counts : counts_) indptr[b + 1] += counts[b];
    }
    std::vector<int64_t> cursor(indptr, indptr + rows_);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (size_t p = 0; p < parts_.size(); ++p) {
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
    }
  }

 private:
  struct Part {
    int64_t first = 0, last = 0, size = 0;
    std::vector<int32_t> indices;
    std::vector<float> u;
    void reserve(int64_t n) {
      if (static_cast<int64_t>(indices.size()) >= n) return;
      indices.resize(n + n / 2);
      u.resize(n + n / 2);
    }
  };
  int64_t rows_;
  std::vector<Part> parts_;
  std::vector<std::vector<int32_t>> counts_;  // per tile, per row
};

}  // namespace sae_fast
