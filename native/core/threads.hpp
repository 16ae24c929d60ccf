// One pool of threads for the whole process.
#pragma once

#include <functional>

namespace rookery {

// Cores that this process may use: affinity and the container's CPU quota, at least 1.
int available_cores();

// Runs task(0), …, task(count − 1), each once, on at most `threads` threads (the caller is one of them; 0 means all
// cores that the process may use), and returns when all are done. Tasks must not throw. Tasks that follow each other
// usually run on one thread, one after the other. A call from within a task, or while another thread of the program is
// inside a call, runs its tasks on the calling thread.
void parallel_for(int count, int threads, const std::function<void(int)>& task);

}  // namespace rookery
