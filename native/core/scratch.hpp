// Working memory of the kernels.
#pragma once

#include <cstddef>

namespace rookery {

// At least `count` floats, aligned to 64 bytes, of unknown content. They belong to the calling thread until its next
// call, so a task asks once and divides what it gets.
float* scratch(std::size_t count);

}  // namespace rookery
