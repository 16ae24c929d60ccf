// One step of linear attention with Taylor features (BASED) on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

// Numbers of the features of `key` channels: 1, the channels, and every product of two of them.
constexpr std::int64_t taylor_features(std::int64_t key) { return 1 + key + key * (key + 1) / 2; }

// One token of some heads, one after the other; q, k [heads, key] and v, y [heads, value] are float32 or bfloat16.
struct TaylorStep {
  std::int64_t key, value;
  const void *q, *k, *v;
  void* y;
  const float* state;  // [heads, value + 1, features]
  float* after;        // the same, after the token
};

// Index of the kernels: 0 float32, 1 bfloat16. Heads begin … end − 1.
struct TaylorAttentionKernels {
  void (*step[2])(const TaylorStep&, std::int64_t begin, std::int64_t end);
};

ROOKERY_DECLARE_KERNELS(TaylorAttentionKernels, taylor_attention)

}  // namespace rookery
