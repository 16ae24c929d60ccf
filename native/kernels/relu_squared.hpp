// max(x, 0)² and its gradient on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

// Pointers are float32 or bfloat16; index of the kernels: 0 float32, 1 bfloat16. Elements begin … end − 1.
struct ReluSquaredKernels {
  void (*forward[2])(const void* x, void* y, std::int64_t begin, std::int64_t end);
  void (*backward[2])(const void* x, const void* grad_y, void* grad_x, std::int64_t begin, std::int64_t end);
};

ROOKERY_DECLARE_KERNELS(ReluSquaredKernels, relu_squared)

}  // namespace rookery
