// The recurrence of RWKV-7, forward and backward, on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

// Tokens whose inputs are converted at once; a state is kept before every so many for the backward pass.
constexpr std::int64_t wkv7_chunk = 32;

// A tensor of tokens × heads × channels, float32 or bfloat16; no data: zeros.
struct Wkv7Tensor {
  void* data = nullptr;
  bool bfloat16 = false;
};

// `rows` sequences: row i has the tokens starts[i] … starts[i + 1] − 1. `key` and `value` are multiples of 16.
struct Wkv7Shape {
  std::int64_t rows, heads, key, value;
  const std::int64_t* starts;  // [rows + 1]
  const std::int64_t* chunks;  // [rows], place of each row's first checkpoint
};

struct Wkv7Inputs {
  Wkv7Tensor r, log_w, k, v, a, b;
  const float* state;  // [rows, heads, value, key]
};

struct Wkv7Results {
  Wkv7Tensor y;
  float* state;  // [rows, heads, value, key]
  // for the backward pass, or null: S before each chunk [chunks, heads, value, key] …
  float* checkpoints;
  float* removed;  // … and S_{t−1} a_t [tokens, heads, value]
};

struct Wkv7Grads {
  Wkv7Tensor y;        // given
  const float* state;  // given, of the last state, or null
  Wkv7Tensor r, log_w, k, v, a, b;
  float* initial_state;
};

// Some tokens of one head in float32, [tokens, key] and [tokens, value]; `w` is the decay itself. `a` has one row more,
// of zeros. The result is y.
struct Wkv7Chunk {
  std::int64_t tokens, key, value;
  float *r{}, *w{}, *k{}, *a{}, *b{}, *v{}, *y{};
};

// Filled in by native/kernels/wkv7.cpp, once per instruction set. A call does one head of one row.
struct Wkv7Kernels {
  // Any number of tokens; `state` is [key, value].
  void (*advance)(const Wkv7Chunk&, float* state);
  void (*forward)(const Wkv7Shape&, const Wkv7Inputs&, const Wkv7Results&, std::int64_t row, std::int64_t head);
  void (*backward)(const Wkv7Shape&, const Wkv7Inputs&, const Wkv7Results&, const Wkv7Grads&, std::int64_t row,
                   std::int64_t head);
};

ROOKERY_DECLARE_KERNELS(Wkv7Kernels, wkv7)

}  // namespace rookery
