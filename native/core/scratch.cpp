#include "core/scratch.hpp"

#include <cstdlib>
#include <memory>
#include <new>

namespace rookery {

float* scratch(std::size_t count) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  // kept from call to call: fresh memory of this size would cost a page fault every 4 KB
  thread_local std::unique_ptr<float, Free> memory;
  thread_local std::size_t size = 0;
  if (count > size) {
    memory.reset();
    size = 0;
    const std::size_t bytes = (count * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    size = count;
  }
  return memory.get();
}

}  // namespace rookery
