// The recurrence of RWKV-4, forward and backward, on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "kernels/sequences.hpp"

namespace rookery {

// Tokens that are worked on at once; a state is kept before every so many for the backward pass.
constexpr std::int64_t wkv4_chunk = 32;
// Channels of a task.
constexpr std::int64_t wkv4_channels = 128;
// The exponent before the first token: e to it is zero, and sums with it stay finite.
constexpr float wkv4_nothing = -1e38f;

// `rows` sequences: row i has the tokens starts[i] … starts[i + 1] − 1, of `channels` numbers each.
struct Wkv4Shape {
  std::int64_t rows, channels;
  const std::int64_t* starts;  // [rows + 1]
  const std::int64_t* chunks;  // [rows], place of each row's first checkpoint
};

struct Wkv4Inputs {
  const float *log_w, *u;  // [channels]
  HeadTensor k, v;         // [tokens, channels]
  const float* state;      // [rows, 3, channels]
};

struct Wkv4Results {
  HeadTensor y;
  float* state;        // [rows, 3, channels]
  float* checkpoints;  // the state before each chunk [chunks, 3, channels], for the backward pass, or null
};

struct Wkv4Grads {
  HeadTensor y;        // given
  const float* state;  // given, of the last state, or null; that of `top` is not looked at
  float *log_w, *u;    // [rows, channels]
  HeadTensor k, v;
  float* initial_state;  // that of `top` is 0
};

// Some tokens of one sequence in float32.
struct Wkv4Piece {
  std::int64_t tokens, channels;
  const float *log_w, *u;  // [channels]
  const float *k, *v;      // [tokens, channels]
  float* y;
};

// Filled in by native/kernels/wkv4.cpp, once per instruction set. A call does wkv4_channels channels, or what is left
// of them, of one row; `first` is the first of them.
struct Wkv4Kernels {
  // Channels begin … end − 1 of any number of tokens; `state` is [3, channels]. It is rounded to float32 after every
  // token, so that it does not matter how tokens are cut into calls.
  void (*advance)(const Wkv4Piece&, float* state, std::int64_t begin, std::int64_t end);
  void (*forward)(const Wkv4Shape&, const Wkv4Inputs&, const Wkv4Results&, std::int64_t row, std::int64_t first);
  void (*backward)(const Wkv4Shape&, const Wkv4Inputs&, const float* checkpoints, const Wkv4Grads&, std::int64_t row,
                   std::int64_t first);
};

ROOKERY_DECLARE_KERNELS(Wkv4Kernels, wkv4)

}  // namespace rookery
