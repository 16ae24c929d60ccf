// What RWKV-Lite reads in place of a channel mix's large matrices: a shadow of a few bits, single packed columns.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery {

// A copy of a matrix [rows, in] in few bits: `planes` planes of bits [rows, line], the lowest first, input i of a row
// in bit i % 8 of byte i / 8.
struct Shadow {
  const std::uint8_t* bits = nullptr;
  std::int64_t planes = 0, rows = 0, in = 0;

  std::int64_t line() const { return (in + 7) / 8; }
};

struct ShadowKernels {
  // sums[r] = the row's codes times x [in, filled up with zeros to a multiple of 16], for rows begin … end − 1. The
  // additions are done in one order on every instruction set.
  void (*sums)(const Shadow&, const float* x, float* sums, std::int64_t begin, std::int64_t end);
  // Numbers `begin` … `end` − 1 of one input's column of an int8 matrix stored by columns, as float32.
  void (*column)(const Matrix&, std::int64_t input, std::int64_t begin, std::int64_t end, float* weights);
};

ROOKERY_DECLARE_KERNELS(ShadowKernels, shadow)

}  // namespace rookery
