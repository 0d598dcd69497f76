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
};

struct Source {         // one term of a weight gradient: sum over entries of values[entry] * A[row]
  const float* values;  // [nnz], in CSR order
  const float* A;       // [rows, d]
};

struct Adam {  // constants of one step; beta1 = 0
  double beta2;
  float step_size;           // the learning rate: with beta1 = 0 there is no first bias correction
  float inv_sqrt_correction; // 1 / sqrt(1 - beta2^step)
  float eps;
  int64_t step;              // counts from 1
  bool project;              // remove the gradient's component along the row
  bool renormalise;          // bring the row back to unit norm after
};

enum class Activation : int { gated = 0, relu = 1, jumprelu = 2 };

}  // namespace sae_fast
