// Memory for what lies between a model's tokens and its logits.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace rookery {

// Hands out pieces of one block, each aligned to a cache line.
class Workspace {
 public:
  // Runs `lay`, which takes every piece, twice: to measure, then, the block being large enough, for good.
  template <class Lay>
  void fit(Lay&& lay) {
    next_ = 0;
    lay();
    if (next_ > size_) {
      block_.reset();
      size_ = 0;
      block_.reset(static_cast<float*>(std::aligned_alloc(64, static_cast<std::size_t>(next_) * sizeof(float))));
      if (!block_) throw std::bad_alloc();
      size_ = next_;
    }
    next_ = 0;
    lay();
  }

  float* take(std::int64_t floats) {
    float* piece = block_ ? block_.get() + (next_ < size_ ? next_ : 0) : nullptr;
    next_ += (floats + 15) / 16 * 16;
    return piece;
  }

 private:
  struct Free {
    void operator()(float* block) const { std::free(block); }
  };
  std::unique_ptr<float, Free> block_;
  std::int64_t size_ = 0, next_ = 0;
};

// Workspaces that are not in use; kept because fresh memory costs a page fault every 4 KB.
class Workspaces {
 public:
  std::unique_ptr<Workspace> take() {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) return std::make_unique<Workspace>();
    auto last = std::move(idle_.back());
    idle_.pop_back();
    return last;
  }

  void give(std::unique_ptr<Workspace> workspace) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(workspace));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace rookery
