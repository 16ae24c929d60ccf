// Makes packed matrices, out of floats or of the blocks of GGUF files.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery {

// Both fill units begin … end − 1 of `to`: panels of a matrix by rows, groups of one by columns. The result does not
// depend on the instruction set.
struct PackingKernels {
  // `from` [out, in] is by rows and of a float format; `format` is int8 or int4.
  void (*pack)(
      const Matrix& from, Format format, Order order, std::int64_t begin, std::int64_t end, std::uint8_t* to);
  // `blocks` [out, in / 32] are those of a GGUF tensor of type Q8_0 or Q4_0.
  void (*repack)(
      const std::uint8_t* blocks, Format format, Order order, std::int64_t out, std::int64_t in, std::int64_t begin,
      std::int64_t end, std::uint8_t* to);
};

ROOKERY_DECLARE_KERNELS(PackingKernels, packing)

}  // namespace rookery
