// RWKV-7's projections to the inputs of its recurrence, on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

// T is float32 or bfloat16; all [tokens, heads · head_dim], parameters [heads · head_dim].
struct Wkv7InputsArguments {
  std::int64_t heads, head_dim;
  const void *k, *decay_logit, *rate_logit;  // T
  const float *k_k, *k_a;
};

struct Wkv7InputsResults {
  float* log_w;
  void *k, *a, *b;  // T
};

struct Wkv7InputsGrads {
  const float* log_w;  // of the results
  const void *k, *a, *b;
  void *grad_k, *grad_decay_logit, *grad_rate_logit;  // T, of the inputs
};

// Index of the kernels: 0 float32, 1 bfloat16. Tokens begin … end − 1.
struct Wkv7InputsKernels {
  void (*forward[2])(const Wkv7InputsArguments&, const Wkv7InputsResults&, std::int64_t begin, std::int64_t end);
  // `sums` [2, channels] starts at zero and receives the gradients of k_k and k_a.
  void (*backward[2])(const Wkv7InputsArguments&, const Wkv7InputsGrads&, float* sums, std::int64_t begin, std::int64_t end);
};

ROOKERY_DECLARE_KERNELS(Wkv7InputsKernels, wkv7_inputs)

}  // namespace rookery
