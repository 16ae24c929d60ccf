// What the bindings of the element-wise operators share: addresses from Python, blocks of rows, sums over blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/threads.hpp"

namespace rookery {

// A tensor's address as Python gives it (`tensor.data_ptr()`); 0 for a tensor without elements.
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs work(block, begin, end) over [0, total) in at most 64 blocks of `least` or more. The cut does not depend on
// `threads`, so neither do sums that are added up block by block.
template <class Work>
std::int64_t in_blocks(std::int64_t total, std::int64_t least, int threads, Work&& work) {
  const std::int64_t size = std::max(least, (total + 63) / 64), count = (total + size - 1) / size;
  parallel_for(static_cast<int>(count), threads, [&](int block) {
    const std::int64_t begin = block * size;
    work(block, begin, std::min(total, begin + size));
  });
  return count;
}

// Sums over tokens: each block adds into rows of its own, `add_up` adds the blocks in order.
class Sums {
 public:
  explicit Sums(std::int64_t width) : width_(width), rows_(64 * width) {}
  float* of(int block) { return rows_.data() + block * width_; }
  void add_up(float* total, std::int64_t width) const {
    std::fill_n(total, width, 0.0f);
    for (std::int64_t block = 0; block < 64; ++block)
      for (std::int64_t i = 0; i < width; ++i) total[i] += rows_[block * width_ + i];
  }

 private:
  std::int64_t width_;
  std::vector<float> rows_;
};

}  // namespace rookery
