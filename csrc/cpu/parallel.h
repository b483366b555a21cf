// parallel_for: fn(i) for i in [0, n), claimed one by one by up to `threads` threads. The one place
// that starts a team.
//
// The team is always `threads` wide or absent: libgomp lets the surplus threads of its pool exit
// when a smaller team is asked for, and torch's next region would start them again. A forked child
// runs serially: its copy of the pool has no threads, and a region would wait for them forever.
// PYOFFLINE_STD_THREADS swaps the pool for std::thread, because ThreadSanitizer cannot see
// libgomp's barriers. fn must not throw, and its work must not depend on the thread.
#pragma once

#include <cstdint>

#ifdef PYOFFLINE_STD_THREADS
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace pyoffline {

// True in a process forked after this library was loaded.
bool in_forked_child();

template <class Fn>
void parallel_for(int threads, int64_t n, const Fn& fn) {
  if (threads <= 1 || n <= 1 || in_forked_child()) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
#ifdef PYOFFLINE_STD_THREADS
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next++; i < n; i = next++) fn(i);
  };
  std::vector<std::thread> team;
  for (int t = 1; t < threads; ++t) team.emplace_back(work);
  work();
  for (std::thread& thread : team) thread.join();
#else
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) fn(i);
#endif
}

}  // namespace pyoffline
