// The entries of a code in the order in which their rows of W are best read: example by example, and where most examples have
// entries all over W, run by run of the features whose rows stay in cache.
#pragma once
#include "sae_fast/parallel.hpp"
#include "sae_fast/types.hpp"

namespace sae_fast {
namespace SAE_FAST_ISA {

constexpr int64_t kCached = 3 << 17;  // floats of W that stay in cache
constexpr int64_t kWorth = 4;         // entries of an example in a run that make up for visiting it once more

// Features in a run of W [features, d]: all of them where runs do not pay.
static inline int64_t run_of_features(const Csr& code, int64_t features, int64_t d) {
  const int64_t run = d < kCached ? kCached / d : 1, runs = (features + run - 1) / run;
  return runs > 1 && code.indptr[code.rows] - code.indptr[0] > kWorth * runs * code.rows ? run : features;
}

// The first of the entries begin .. end, whose indices ascend, that is not of a feature below `feature`.
static inline int64_t first_from(const int32_t* indices, int64_t begin, int64_t end, int64_t feature) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (indices[middle] < feature) begin = middle + 1;
    else end = middle;
  }
  return begin;
}

// body(b, begin, end, starts) with the entries of each example b in each run of the features first .. last; the first run of
// them starts, also where there are no features.  Entries that are summed four at a time stay together: runs change no bit.
template <class Body>
static inline void for_entries(const Csr& code, int64_t first, int64_t last, int64_t run, int threads, const Body& body) {
  int64_t from = first;
  do {
    parallel_for(code.rows, 8, threads, [&](int64_t b, int) {
      const int64_t begin = first_from(code.indices, code.indptr[b], code.indptr[b + 1], first),
                    end = first_from(code.indices, begin, code.indptr[b + 1], last);
      const auto border = [&](int64_t at) {
        return at < last ? begin + (first_from(code.indices, begin, end, at) - begin) / 4 * 4 : end;
      };
      body(b, border(from), border(from + run), from == first);
    });
    from += run;
  } while (from < last);
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
