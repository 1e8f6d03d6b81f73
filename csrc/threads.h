// Parallel loops on the threads that torch computes with.
#pragma once

#include <cstdint>
#include <functional>

namespace cdfast {

// Calls body(task, worker) for every task once, in any order, from at most n_threads threads;
// worker < n_threads names the thread, for scratch memory. The body must not throw.
void parallel_for(int64_t n_tasks, int n_threads, const std::function<void(int64_t, int)>& body);

}  // namespace cdfast
