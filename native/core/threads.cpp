#include "core/threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rookery {
namespace {

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits for `value` to differ from `old`: a few microseconds awake, because the next kernel usually follows at once, then
// asleep, because a spinning thread stalls everybody when there are more threads than free cores.
void wait_for_change(const std::atomic<unsigned>& value, unsigned old) {
  for (int i = 0; i < 4000; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

// The workers live as long as the process: joining them at exit would wait for code that is already being unloaded.
class Pool {
 public:
  void run(int count, int threads, const std::function<void(int)>& task) {
    while (static_cast<int>(workers_) < threads - 1) start_worker();
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    seats_.store(threads - 1, std::memory_order_relaxed);
    busy_.store(static_cast<unsigned>(workers_), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    work();
    for (unsigned left; (left = busy_.load(std::memory_order_acquire)) != 0;) wait_for_change(busy_, left);
  }

 private:
  void start_worker() {
    const unsigned seen = round_.load(std::memory_order_relaxed);
    std::thread([this, seen] { serve(seen); }).detach();
    ++workers_;
  }

  [[noreturn]] void serve(unsigned seen) {
    inside = true;
    for (;;) {
      wait_for_change(round_, seen);
      seen = round_.load(std::memory_order_acquire);
      if (seats_.fetch_sub(1, std::memory_order_relaxed) > 0) work();
      if (busy_.fetch_sub(1, std::memory_order_release) == 1) busy_.notify_one();
    }
  }

  void work() {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(i);
  }

  const std::function<void(int)>* task_ = nullptr;
  int count_ = 0;
  std::size_t workers_ = 0;
  std::atomic<int> next_{0}, seats_{0};
  std::atomic<unsigned> round_{0}, busy_{0};

 public:
  static thread_local bool inside;
};

thread_local bool Pool::inside = false;

}  // namespace

int available_cores() {
  static const int cores = [] {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    // cgroup v2: "max 100000" or "150000 100000" (microseconds of CPU time a period)
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
      double quota = 0, period = 0;
      if (std::fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0)
        n = std::min(n, static_cast<int>(quota / period + 0.999));
      std::fclose(file);
    }
    return std::max(1, n);
  }();
  return cores;
}

namespace {

// Runs tasks 0 … count − 1 on `threads` threads and returns true, or false where only the calling thread may run them.
bool shared_out(int count, int threads, const std::function<void(int)>& task) {
  static std::mutex mutex;
  static Pool* pool = [] {
    // a forked child has none of the threads: it starts with a pool of its own
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
  }();
  std::unique_lock lock(mutex, std::defer_lock);
  if (threads <= 1 || Pool::inside || !lock.try_lock()) return false;
  Pool::inside = true;
  pool->run(count, threads, task);
  Pool::inside = false;
  return true;
}

}  // namespace

void parallel_for(int count, int threads, const std::function<void(int)>& task) {
  if (threads <= 0) threads = available_cores();
  if (shared_out(count, std::min(threads, count), task)) return;
  for (int i = 0; i < count; ++i) task(i);
}

void Team::barrier() {
  if (size_ == 1) return;
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase);
  }
}

void in_team(int threads, const std::function<void(Team&, int)>& work) {
  if (threads <= 0) threads = available_cores();
  Team team(threads);
  // a member that waits at a barrier holds its thread, so every member has a thread of its own
  if (shared_out(threads, threads, [&](int member) { work(team, member); })) return;
  Team alone(1);
  work(alone, 0);
}

}  // namespace rookery
