// RWKV-7's recurrence output to the input of its output projection, on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

// T is float32 or bfloat16; all [tokens, heads · head_dim], parameters [heads · head_dim].
struct Wkv7Output {
  std::int64_t heads, head_dim;
  float eps;
  const void *y, *r, *k, *v, *gate;  // T
  const float *r_k, *weight, *bias;
};

struct Wkv7OutputGrads {
  const void* out;                                      // T
  void *grad_y, *grad_r, *grad_k, *grad_v, *grad_gate;  // T
};

// Index of the kernels: 0 float32, 1 bfloat16. Tokens begin … end − 1.
struct Wkv7OutputKernels {
  void (*forward[2])(const Wkv7Output&, void* out, std::int64_t begin, std::int64_t end);
  // `sums` [3, channels] starts at zero and receives the gradients of r_k, weight and bias.
  void (*backward[2])(const Wkv7Output&, const Wkv7OutputGrads&, float* sums, std::int64_t begin, std::int64_t end);
};

ROOKERY_DECLARE_KERNELS(Wkv7OutputKernels, wkv7_output)

}  // namespace rookery
