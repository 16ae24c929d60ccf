// Vectors in the form that a matrix is multiplied with, where that is not float32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/product.hpp"

namespace rookery {

// Whether a matrix is multiplied with integers or rounded numbers.
inline bool is_prepared(const ProductKernels& kernels, const Matrix& w) {
  return is_packed(w.format) || (w.format == Format::bfloat16 && kernels.round);
}

// Floats that they need at most, whatever the matrix's format.
inline std::int64_t prepared_floats(std::int64_t tokens, std::int64_t in) {
  std::int64_t most = Rounded::floats(tokens, in);
  for (int format = float_format_count; format < format_count; ++format)
    most = std::max(most, Integers::floats(tokens, in, packing(static_cast<Format>(format)).group));
  return (most + 15) / 16 * 16;
}

// Gives a product memory for them, if it needs any.
inline void prepare(const ProductKernels& kernels, const Matrix& w, Product& product, float* memory) {
  if (!is_prepared(kernels, w)) return;
  if (is_packed(w.format))
    product.integers = Integers(memory, product.tokens, w.in, packing(w.format).group);
  else
    product.rounded = Rounded(memory, w.in);
}

// Makes inputs `first` … `last` − 1 of tokens `begin` … `end` − 1; `first` begins a group.
inline void fill(
    const ProductKernels& kernels, const Product& p, std::int64_t first, std::int64_t last, std::int64_t begin,
    std::int64_t end) {
  if (p.integers.values)
    kernels.quantise(p.x, p.x_stride, first, last, begin, end, p.integers);
  else if (p.rounded.values)
    kernels.round(p.x, p.x_stride, first, last, begin, end, p.rounded);
}

}  // namespace rookery
