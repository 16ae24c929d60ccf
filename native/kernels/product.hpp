// Products of weight matrices with one or many float32 vectors.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery {

// Matrices stored by columns add their inputs up in parts of so many, and the parts' sums one after the other.
constexpr std::int64_t part_inputs = 128;

// y[t] = W x[t], or y[t] + W x[t], for every token t.
struct Product {
  const float* x;
  std::int64_t x_stride;  // floats from token to token
  float* y;
  std::int64_t y_stride;
  std::int64_t tokens;
  bool add = false;

  // Only for matrices stored by columns and at most `few_tokens` tokens.
  // The inputs to use, in ascending order; the others must be zero for every token. Null: all.
  const std::int32_t* active = nullptr;
  std::int64_t active_count = 0;
  // Parts whose sums are wanted: those of part i go to y + i · part_stride. 0: all together.
  std::int64_t part_stride = 0;
  std::int64_t part_begin = 0, part_end = 0;
};

// run[order][format] computes outputs begin … end − 1. The additions of one output are done in one order whatever the
// number of tokens and the range, so a result depends on neither; skipping zeros changes nothing either.
struct ProductKernels {
  void (*run[order_count][format_count])(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);
  std::int64_t few_tokens;
};

ROOKERY_DECLARE_KERNELS(ProductKernels, product)

}  // namespace rookery
