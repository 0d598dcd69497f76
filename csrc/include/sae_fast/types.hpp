// Views that every kernel takes: raw pointers and sizes, no torch.  Shapes as in sae_fast/code.py.
#pragma once
#include <cstdint>

namespace sae_fast {

struct Csr {  // entries of a SparseCode, row by row
  const int64_t* indptr;   // [rows + 1]
  const int32_t* indices;  // [nnz]
  int64_t rows;
};

struct Csc {  // the same entries, feature by feature
  const int64_t* colptr;  // [features + 1]
  const int32_t* rows;    // [nnz]
  const int64_t* perm;    // [nnz]
  int64_t features;
};

struct Source {         // one term of a weight gradient: sum over entries of values[entry] * A[row]
  const float* values;  // [nnz], in CSR order
  const float* A;       // [rows, d]
};

struct Sources {
  const Source* of;
  int n;
};

struct Bounds {  // of n groups of features: group g is at[g] .. at[g + 1]
  const int64_t* at;
  int64_t n;
};

struct Shadow {  // of a weight [n, d]: sae_fast/code.py; both null where none is kept
  uint16_t* rows;  // [n, d] bfloat16
  double* norms;   // [n, 2]
};

struct Adam {  // constants of one step
  double beta1, beta2;
  float step_size;           // the learning rate / (1 - beta1^step)
  float inv_sqrt_correction; // 1 / sqrt(1 - beta2^step)
  float eps;
  int64_t step;              // counts from 1
  bool project;              // remove the gradient's component along the row
  bool renormalise;          // bring the row back to unit norm after
};

struct Screen {  // what both operands of the screening product share: csrc/cpu/screen.cpp
  enum Term { x_residual, low_residual, accumulation, w_residual, w_outliers, bias, least, n_terms };
  static constexpr int kPieces = 3, kMargins = 4;  // columns after the outliers': of the bias; of the bound's factors
  int64_t d, K;
  const int64_t* outliers;  // [m] columns that enter as high and low parts
  int64_t m;
  double gamma;
  const double* terms;  // [n_terms] factors of the terms of the bound, 1 but in tests; null: no bound
  uint16_t open;        // bfloat16 in the place of a row or feature out of range: 1, or NaN where the test is not of a sign
};

struct Memory {  // take(owner, bytes): scratch that lasts as long as the call, not initialised
  void* owner;
  void* (*take)(void* owner, int64_t bytes);
};

struct Layer {  // what a tile of features is decided by; W, bias and cut (or null) start at feature 0
  const float *x, *W;  // [rows, d], [F, d]
  int64_t d;
  const float *bias, *cut;
};

constexpr int64_t kSlack = 16;  // entries past the last that compact writes: it stores whole vectors
constexpr int64_t kRun = 2048;  // entries of a feature that are summed in one go: gradient_row.hpp

enum class Activation : int;  // activation.hpp

}  // namespace sae_fast
