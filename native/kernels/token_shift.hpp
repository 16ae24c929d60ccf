// Token shift with several interpolations on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

// b·t tokens in a row, cut into documents; T is float32 or bfloat16.
struct TokenShift {
  std::int64_t tokens, channels, mixes;
  const std::int64_t* starts;  // [rows + 1], document i is tokens starts[i] … starts[i + 1] − 1
  const void* x;               // T [tokens, channels]
  const void* previous;        // T [rows, channels]
  const float* mix;            // [mixes, channels]
};

struct TokenShiftGrads {
  const void* grad_out;   // T [mixes, tokens, channels]
  const void* grad_last;  // T [rows, channels]
  void* grad_x;           // T [tokens, channels]
  void* grad_previous;    // T [rows, channels], of documents that are not empty
};

// Index of the kernels: 0 float32, 1 bfloat16. Tokens begin … end − 1.
struct TokenShiftKernels {
  void (*forward[2])(const TokenShift&, void* out, std::int64_t begin, std::int64_t end);
  // `sums` [mixes + 1, channels] starts at zero and receives the gradient of `mix` in its first rows.
  void (*backward[2])(const TokenShift&, const TokenShiftGrads&, float* sums, std::int64_t begin, std::int64_t end);
};

ROOKERY_DECLARE_KERNELS(TokenShiftKernels, token_shift)

}  // namespace rookery
