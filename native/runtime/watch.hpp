// Where the time of a call goes.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace rookery {

// Parts of a step, in their order: embedding, norms and token shifts, the time mix's first matrices, its recurrence with
// what belongs to heads, its output matrix, the channel mix, the head.
enum class StepPart { embedding, mix, projections, recurrence, output, channel_mix, head };
constexpr std::size_t step_parts = 7;

// Nanoseconds of every part, over all calls while `on`.
struct Times {
  std::atomic<bool> on{false};
  std::array<std::atomic<std::int64_t>, step_parts> nanoseconds{};
};

// Runs along with one call.
class Watch {
 public:
  explicit Watch(Times& times) : times_(times.on.load(std::memory_order_relaxed) ? &times : nullptr) {
    if (times_) last_ = Clock::now();
  }

  // What has passed since the last mark belongs to `part`.
  void mark(StepPart part) {
    if (!times_) return;
    const auto now = Clock::now();
    const auto passed = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    times_->nanoseconds[static_cast<std::size_t>(part)].fetch_add(passed, std::memory_order_relaxed);
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Times* times_;
  Clock::time_point last_;
};

}  // namespace rookery
