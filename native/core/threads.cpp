#include "core/threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <thread>

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

// Waits for `value` to differ from `old`: some microseconds awake, as it usually changes soon, then asleep, because a
// thread that spins stalls everybody where there are more threads than free cores.
void wait_for_change(const std::atomic<unsigned>& value, unsigned old) {
  for (int i = 0; i < 1000; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

// Tasks of one call are cut into a range for each thread, which takes from its own range first (neighbouring tasks read
// neighbouring memory) and then from the others'. The caller waits for tasks, never for threads: one that gets no core
// takes nothing and holds up nobody.
//
// The workers live as long as the process: joining them at exit would wait for code that is already being unloaded.
class Pool {
 public:
  static constexpr int most_threads = 256;

  void run(int count, int threads, const std::function<void(int)>& task) {
    while (workers_ < threads - 1) start_worker();
    // what a thread may take is one word with the number of the call, so that a late one cannot take from a later call
    const int together = (count + most_takes - 1) / most_takes, takes = (count + together - 1) / together;
    task_ = &task;
    count_ = count;
    together_ = together;
    threads_.store(threads, std::memory_order_relaxed);
    left_.store(static_cast<unsigned>(takes), std::memory_order_relaxed);
    const unsigned call = call_.load(std::memory_order_relaxed) + 1;
    for (std::int64_t i = 0; i < threads; ++i)
      ranges_[i].word.store(
          pack(call, static_cast<unsigned>(takes * i / threads), static_cast<unsigned>(takes * (i + 1) / threads)),
          std::memory_order_release);
    call_.store(call, std::memory_order_release);
    call_.notify_all();
    help(0, call);
    for (unsigned left; (left = left_.load(std::memory_order_acquire)) != 0;) wait_for_change(left_, left);
  }

  static thread_local bool inside;

 private:
  static constexpr int most_takes = 65535;

  struct alignas(64) Range {
    std::atomic<std::uint64_t> word{0};  // call, next take, end
  };

  static std::uint64_t pack(unsigned call, unsigned next, unsigned end) {
    return static_cast<std::uint64_t>(call) << 32 | next << 16 | end;
  }

  void start_worker() {
    const unsigned seen = call_.load(std::memory_order_relaxed);
    const int number = ++workers_;
    std::thread([this, number, seen] { serve(number, seen); }).detach();
  }

  [[noreturn]] void serve(int number, unsigned seen) {
    inside = true;
    for (;;) {
      wait_for_change(call_, seen);
      seen = call_.load(std::memory_order_acquire);
      if (number < threads_.load(std::memory_order_relaxed)) help(number, seen);
    }
  }

  void help(int number, unsigned call) {
    const int threads = threads_.load(std::memory_order_relaxed);
    for (int i = 0; i < threads; ++i) take_all(ranges_[(number + i) % threads].word, call);
  }

  void take_all(std::atomic<std::uint64_t>& range, unsigned call) {
    std::uint64_t word = range.load(std::memory_order_acquire);
    for (;;) {
      const unsigned next = word >> 16 & 0xffff, end = word & 0xffff;
      if (word >> 32 != call || next == end) return;
      if (!range.compare_exchange_weak(word, pack(call, next + 1, end), std::memory_order_acq_rel)) continue;
      // the call cannot end before this take does: from here on its settings stay what they are
      const int first = static_cast<int>(next) * together_;
      for (int i = first; i < std::min(count_, first + together_); ++i) (*task_)(i);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) left_.notify_one();
      word = range.load(std::memory_order_acquire);
    }
  }

  const std::function<void(int)>* task_ = nullptr;
  int count_ = 0, together_ = 1, workers_ = 0;
  std::atomic<int> threads_{1};
  std::atomic<unsigned> call_{0}, left_{0};
  std::array<Range, most_threads> ranges_;
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

void parallel_for(int count, int threads, const std::function<void(int)>& task) {
  if (threads <= 0) threads = available_cores();
  threads = std::min({threads, count, Pool::most_threads});
  static std::mutex mutex;
  static Pool* pool = [] {
    // a forked child has none of the threads: it starts with a pool of its own
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    return new Pool;
  }();
  std::unique_lock lock(mutex, std::defer_lock);
  if (threads <= 1 || Pool::inside || !lock.try_lock()) {
    for (int i = 0; i < count; ++i) task(i);
    return;
  }
  Pool::inside = true;
  pool->run(count, threads, task);
  Pool::inside = false;
}

}  // namespace rookery
