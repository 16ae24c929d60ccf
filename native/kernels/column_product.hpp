// Products with matrices of floats stored by columns.
#pragma once

#include <cstdint>

#include "kernels/product.hpp"

namespace rookery::ROOKERY_ISA {

// How many tokens do not pay for widening the weights first.
constexpr int few_tokens = ROOKERY_VECTOR_BYTES > 32 ? 8 : 4;

void float32_by_columns(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);
void bfloat16_by_columns(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);
void float16_by_columns(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);

}  // namespace rookery::ROOKERY_ISA
