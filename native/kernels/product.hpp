// Products of weight matrices with one or many float32 vectors.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery {

// Matrices stored by columns add their inputs up in parts of so many, and the parts' sums one after the other.
constexpr std::int64_t part_inputs = 128;

// Vectors as packed matrices are multiplied with: one byte a number, scaled by group. The scale is the group's largest
// size / 127, so that the numbers are whole from -127 to 127.
struct Integers {
  std::int64_t group = 0;
  std::int64_t stride = 0;          // bytes from token to token, numbers filled up with zeros to whole groups
  std::int8_t* values = nullptr;    // [tokens, stride]
  float* scales = nullptr;          // [tokens, groups]
  std::int32_t* balance = nullptr;  // [tokens, groups]: -128 times the sum of a group's numbers

  Integers() = default;
  // Of `tokens` vectors of `in` numbers, in memory of `floats(…)` floats.
  Integers(float* memory, std::int64_t tokens, std::int64_t in, std::int64_t group_size)
      : group(group_size), stride((in + group_size - 1) / group_size * group_size) {
    values = reinterpret_cast<std::int8_t*>(memory);
    scales = memory + (tokens * stride + 63) / 64 * 16;
    balance = reinterpret_cast<std::int32_t*>(scales + tokens * groups());
  }
  static std::int64_t floats(std::int64_t tokens, std::int64_t in, std::int64_t group_size) {
    const std::int64_t of_groups = (in + group_size - 1) / group_size;
    return (tokens * of_groups * group_size + 63) / 64 * 16 + 2 * tokens * of_groups;
  }
  std::int64_t groups() const { return stride / group; }
};

// Vectors rounded to bfloat16, for instructions that multiply pairs of such numbers.
struct Rounded {
  std::uint16_t* values = nullptr;  // [tokens, stride]
  std::int64_t stride = 0;          // numbers from token to token, filled up with zeros to whole lines

  Rounded() = default;
  // Of `tokens` vectors of `in` numbers, in memory of `floats(…)` floats.
  Rounded(float* memory, std::int64_t in)
      : values(reinterpret_cast<std::uint16_t*>(memory)), stride((in + 31) / 32 * 32) {}
  static std::int64_t floats(std::int64_t tokens, std::int64_t in) { return tokens * ((in + 31) / 32 * 16); }
};

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
  // Only for matrices of floats stored by rows: `begin` … `end` − 1 are places in this ascending list of outputs.
  const std::int32_t* outputs = nullptr;
  // What is used in place of x where W is packed; groups are those of W.
  Integers integers{};
  // What is used in place of x where W is bfloat16 and the kernels can `round`; without it inputs are not rounded.
  Rounded rounded{};
};

// run[order][format] computes outputs begin … end − 1. The additions of one output are done in one order whatever the
// number of tokens and the range, so a result depends on neither; skipping zeros changes nothing either. Packed matrices
// give the same result on every instruction set and in both orders, too: sums of whole numbers within a group are exact,
// and the groups are added up part by part.
struct ProductKernels {
  void (*run[order_count][format_count])(const Matrix&, const Product&, std::int64_t begin, std::int64_t end);
  std::int64_t few_tokens;
  // Inputs `first` … `last` − 1 of tokens `begin` … `end` − 1 of x [tokens, x_stride]; `first` begins a group.
  void (*quantise)(
      const float* x, std::int64_t x_stride, std::int64_t first, std::int64_t last, std::int64_t begin,
      std::int64_t end, const Integers&);
  // The same, rounded to bfloat16. Null where no instruction multiplies such numbers.
  void (*round)(
      const float* x, std::int64_t x_stride, std::int64_t first, std::int64_t last, std::int64_t begin,
      std::int64_t end, const Rounded&);
  // The weights of one output of a matrix stored by rows, as float32.
  void (*row)(const Matrix&, std::int64_t output, float* weights);
};

#if defined(__x86_64__)
namespace portable { extern const ProductKernels product; }
namespace avx2 { extern const ProductKernels product; }
namespace avx512 { extern const ProductKernels product; }
namespace amx { extern const ProductKernels product; }
namespace amx_imitated { extern const ProductKernels product; }
const ProductKernels& product_kernels(Isa isa);  // in core/amx.cpp
#else
ROOKERY_DECLARE_KERNELS(ProductKernels, product)
#endif

}  // namespace rookery
