// Reading memory and doing nothing else: what products with large matrices are measured against.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

struct ReadingKernels {
  // Loads `bytes` bytes, a multiple of 1024, and combines them so that no load can be left out.
  std::uint32_t (*read)(const void* memory, std::int64_t bytes);
};

ROOKERY_DECLARE_KERNELS(ReadingKernels, reading)

}  // namespace rookery
