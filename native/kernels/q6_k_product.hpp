// Products with matrices of the type Q6_K of GGUF files, stored by rows; see `Packing`.
#pragma once

#include <cstdint>

#include "kernels/product.hpp"

namespace rookery::ROOKERY_ISA {

void q6_k_by_rows(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);
void q6_k_row(const Matrix&, std::int64_t output, float* weights);

}  // namespace rookery::ROOKERY_ISA
