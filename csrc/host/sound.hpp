// Whether the kernels may follow the offsets and indices of a code: one pass, before every op.
#pragma once
#include <cstdint>

namespace sae_fast {

inline bool ascending_to(const int64_t* starts, int64_t n, int64_t nnz) {
  bool ok = starts[0] == 0 && starts[n] == nnz;
  for (int64_t i = 0; i < n; ++i) ok &= starts[i] <= starts[i + 1];
  return ok;
}

template <class T>
inline bool all_within(const T* values, int64_t n, int64_t size) {
  bool ok = true;
  for (int64_t j = 0; j < n; ++j) ok &= values[j] >= 0 && values[j] < size;
  return ok;
}

// Whether the kernels may follow these offsets and indices; the features of a row have to ascend.
inline bool sound_csr(const int64_t* starts, int64_t rows, const int32_t* i, int64_t nnz, int64_t features) {
  if (!ascending_to(starts, rows, nnz) || !all_within(i, nnz, features)) return false;
  bool ok = true;
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t j = starts[b] + 1; j < starts[b + 1]; ++j) ok &= i[j - 1] < i[j];
  return ok;
}

inline bool sound_csc(const int64_t* colptr, int64_t features, const int32_t* rows, int64_t nnz, const int64_t* perm,
                      int64_t batch) {
  return ascending_to(colptr, features, nnz) && all_within(rows, nnz, batch) && all_within(perm, nnz, nnz);
}

}  // namespace sae_fast
