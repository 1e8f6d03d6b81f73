#include "threads.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace cdfast {
namespace {

struct Loop {
  const std::function<void(int64_t, int)>* body;
  int64_t n_tasks;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_worker{0};

  void work() {
    const int worker = next_worker.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= n_tasks) return;
      (*body)(task, worker);
    }
  }
};

void work_on(void* loop) { static_cast<Loop*>(loop)->work(); }

using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The OpenMP runtime that torch has loaded, by the entry point that GCC and LLVM share. Its workers
// spin for milliseconds after each of torch's own loops: threads of ours would fight them for the
// cores, and linking a second runtime would make a second set of spinning threads.
ParallelRegion torch_threads() {
#ifdef _WIN32
  return nullptr;
#else
  static const ParallelRegion found =
      reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

}  // namespace

void parallel_for(int64_t n_tasks, int n_threads, const std::function<void(int64_t, int)>& body) {
  const int workers = static_cast<int>(std::min<int64_t>(n_tasks, n_threads));
  if (workers <= 1) {
    for (int64_t task = 0; task < n_tasks; ++task) body(task, 0);
    return;
  }
  Loop loop;
  loop.body = &body;
  loop.n_tasks = n_tasks;
  if (const ParallelRegion region = torch_threads()) {
    region(work_on, &loop, static_cast<unsigned>(workers), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < workers; ++i) others.emplace_back(work_on, &loop);
  loop.work();
  for (std::thread& other : others) other.join();
}

}  // namespace cdfast
