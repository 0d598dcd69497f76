// The one place that knows about threads.  With SAE_FAST_STD_THREADS they are std::thread's instead of OpenMP's, for the
// thread sanitizer, which takes libgomp's barriers for races; a compiler without OpenMP gives one thread.
#pragma once
#include <cstdint>
#ifdef SAE_FAST_STD_THREADS
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

#ifndef SAE_FAST_ISA
#define SAE_FAST_ISA host
#endif

namespace sae_fast {
namespace SAE_FAST_ISA {

// body(i, worker) for every i in 0 .. n - 1, worker in 0 .. threads - 1.  Workers claim `grain` indices at a time, so which
// worker serves an index is chance: what is written for it must not depend on that.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  int64_t next = 0;
  const auto work = [&](int worker) {
    for (;;) {
      const int64_t first = __atomic_fetch_add(&next, grain, __ATOMIC_RELAXED);
      const int64_t last = first + grain < n ? first + grain : n;
      if (first >= last) return;
      for (int64_t i = first; i < last; ++i) body(i, worker);
    }
  };
  if (threads <= 1 || n <= grain) return work(0);
#ifdef SAE_FAST_STD_THREADS
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(work, t);
  work(0);
  for (auto& worker : workers) worker.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
#else
  work(0);
#endif
}

}  // namespace SAE_FAST_ISA
}  // namespace sae_fast
