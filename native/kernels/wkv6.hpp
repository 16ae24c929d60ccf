// The recurrence of RWKV-5 and RWKV-6, forward and backward, on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "kernels/sequences.hpp"

namespace rookery {

// Tokens that are worked on at once; a state is kept before every so many for the backward pass.
constexpr std::int64_t wkv6_chunk = 16;

struct Wkv6Inputs {
  HeadTensor r, log_w, k, v;
  bool constant_decay;  // log_w is [heads, key], the same for all tokens
  const float* u;       // [heads, key]
  const float* state;   // [rows, heads, value, key]
};

struct Wkv6Results {
  HeadTensor y;
  float* state;        // [rows, heads, value, key]
  float* checkpoints;  // S before each chunk [chunks, heads, value, key], for the backward pass, or null
};

struct Wkv6Grads {
  HeadTensor y;        // given
  const float* state;  // given, of the last state, or null
  HeadTensor r, log_w, k, v;
  float* constant_log_w;  // [rows, heads, key], instead of log_w where the decay is constant
  float* u;               // [rows, heads, key]
  float* initial_state;
};

// Some tokens of one head in float32, `stride` floats from token to token; `w` is the decay itself.
struct Wkv6Piece {
  std::int64_t tokens, key, value, stride;
  const float *r, *k, *v;
  const float* w;
  std::int64_t w_stride;  // 0: all tokens have the same
  const float* u;         // [key]
  float* y;
};

// Filled in by native/kernels/wkv6.cpp, once per instruction set. A call does one head of one row.
struct Wkv6Kernels {
  // Any number of tokens; `state` is [key, value], which here may be any numbers.
  void (*advance)(const Wkv6Piece&, float* state);
  void (*forward)(const HeadShape&, const Wkv6Inputs&, const Wkv6Results&, std::int64_t row, std::int64_t head);
  void (*backward)(const HeadShape&, const Wkv6Inputs&, const float* checkpoints, const Wkv6Grads&, std::int64_t row,
                   std::int64_t head);
};

ROOKERY_DECLARE_KERNELS(Wkv6Kernels, wkv6)

}  // namespace rookery
