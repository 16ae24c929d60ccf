// One pool of threads for the whole process.
#pragma once

#include <atomic>
#include <functional>

namespace rookery {

// Cores that this process may use: affinity and the container's CPU quota, at least 1.
int available_cores();

// Runs task(0), …, task(count − 1), each once, on at most `threads` threads (the caller is one of them; 0 means all
// cores that the process may use), and returns when all are done. Tasks must not throw. A call from within a task, or
// while another thread of the program is inside a call, runs its tasks on the calling thread.
void parallel_for(int count, int threads, const std::function<void(int)>& task);

// Threads that run one piece of work together.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }
  // Returns when every member has come here as often as this one; what they wrote before is visible then.
  void barrier();

 private:
  int size_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
};

// Runs work(team, 0), …, work(team, size − 1) at the same time and returns when all are done. The team has `threads`
// members (0: one for every core that the process may use), but only one where `parallel_for` would not start others.
void in_team(int threads, const std::function<void(Team&, int)>& work);

}  // namespace rookery
