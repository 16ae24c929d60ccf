// The recurrence of RWKV-7, forward and backward, on the CPU.
#pragma once

#include "core/isa.hpp"

namespace rookery {

// Filled in by native/kernels/wkv7.cpp, once per instruction set.
struct Wkv7Kernels {
  int vector_bytes;
};

ROOKERY_DECLARE_KERNELS(Wkv7Kernels, wkv7)

}  // namespace rookery
