// Makes packed matrices, out of floats or of the blocks of GGUF files.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery {

// Bytes of a block of a GGUF tensor.
constexpr std::int64_t block_bytes(Format format) { return format == Format::q6_k ? 210 : format == Format::q8_0 ? 34 : 18; }

// Both fill units begin … end − 1 of `to`: panels of a matrix by rows, groups of one by columns. The result does not
// depend on the instruction set.
struct PackingKernels {
  // `from` [out, in] is by rows and of a float format; `format` is int8 or int4.
  void (*pack)(
      const Matrix& from, Format format, Order order, std::int64_t begin, std::int64_t end, std::uint8_t* to);
  // `blocks` are those of a GGUF tensor of type Q8_0 or Q4_0, [out, in / 32], or, by rows only, Q6_K, [out, in / 256].
  void (*repack)(
      const std::uint8_t* blocks, Format format, Order order, std::int64_t out, std::int64_t in, std::int64_t begin,
      std::int64_t end, std::uint8_t* to);
};

ROOKERY_DECLARE_KERNELS(PackingKernels, packing)

}  // namespace rookery
