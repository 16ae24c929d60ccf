#include "core/threads.hpp"

#include <atomic>
#include <thread>

#include "tests/check.hpp"

namespace rookery::tests {
namespace {

// How often each task of a call ran; written without atomics, as kernels write their results.
std::vector<int> runs(int count, int threads) {
  std::vector<int> times(static_cast<std::size_t>(count));
  parallel_for(count, threads, [&](int i) { ++times[static_cast<std::size_t>(i)]; });
  return times;
}

TEST(every_task_runs_once_and_is_done_at_the_end) {
  for (const int threads : {1, 2, 3, 8})
    for (const int count : {0, 1, 2, 7, 100, 70000})
      expect(runs(count, threads) == std::vector<int>(static_cast<std::size_t>(count), 1), threads, count);
}

TEST(calls_from_several_threads_and_from_within_tasks_do_not_disturb_each_other) {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<int> inner{0};
        parallel_for(5, 3, [&](int) { parallel_for(4, 2, [&](int) { ++inner; }); });
        wrong += inner != 20 || runs(9, 3) != std::vector<int>(9, 1);
      }
    });
  for (std::thread& caller : callers) caller.join();
  expect(wrong == 0, wrong.load(), "calls went wrong");
}

}  // namespace
}  // namespace rookery::tests
