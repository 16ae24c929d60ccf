// The attention of Vision-RWKV, forward and backward, on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "kernels/sequences.hpp"

namespace rookery {

// Channels of a task.
constexpr std::int64_t bi_wkv_channels = 64;

// `tokens` rows of `channels` numbers, for each of a batch.
struct BiWkvShape {
  std::int64_t tokens, channels;
};

struct BiWkvInputs {
  const float *omega, *mu;  // [channels]
  HeadTensor k, v;          // [batch, tokens, channels]
};

struct BiWkvGrads {
  HeadTensor y;       // given
  float *omega, *mu;  // [batch, channels]
  HeadTensor k, v;
};

// Filled in by native/kernels/bi_wkv.cpp, once per instruction set. A call does bi_wkv_channels channels, or what is
// left of them, of one row of the batch; `first` is the first of them.
struct BiWkvKernels {
  void (*forward)(const BiWkvShape&, const BiWkvInputs&, const HeadTensor& y, std::int64_t row, std::int64_t first);
  void (*backward)(const BiWkvShape&, const BiWkvInputs&, const BiWkvGrads&, std::int64_t row, std::int64_t first);
};

ROOKERY_DECLARE_KERNELS(BiWkvKernels, bi_wkv)

}  // namespace rookery
