// Products with packed matrices: dot products of bytes, one float32 operation for every group of inputs.
#pragma once

#include <cstdint>

#include "kernels/product.hpp"

namespace rookery::ROOKERY_ISA {

// `int4` reads the levels of the matrix's own format.
#define ROOKERY_INTEGER_PRODUCTS(NAME)                                                       \
  void NAME##_by_rows(const Matrix&, const Product&, std::int64_t begin, std::int64_t end); \
  void NAME##_by_columns(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);
ROOKERY_INTEGER_PRODUCTS(int8)
ROOKERY_INTEGER_PRODUCTS(q8_0)
ROOKERY_INTEGER_PRODUCTS(int4)
#undef ROOKERY_INTEGER_PRODUCTS

void quantise(
    const float* x, std::int64_t x_stride, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end,
    const Integers&);
void row(const Matrix&, std::int64_t output, float* weights);

}  // namespace rookery::ROOKERY_ISA
