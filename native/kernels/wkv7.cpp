#include "kernels/wkv7.hpp"

#include "core/simd.hpp"

namespace rookery {

const Wkv7Kernels ROOKERY_ISA::wkv7{sizeof(ROOKERY_ISA::vfloat)};

}  // namespace rookery
