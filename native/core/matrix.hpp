// Weight matrices as they lie in memory; products with them are in kernels/product.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rookery {

// How a number is stored; the order is that of the kernel tables.
enum class Format : std::uint8_t { float32, bfloat16, float16 };
constexpr int format_count = 3;

constexpr std::size_t bytes_of(Format format) { return format == Format::float32 ? 4 : 2; }

// Which index runs fastest: in `rows` the inputs of an output lie side by side ([out, in], as linear layers are
// stored), in `columns` the outputs of an input ([in, out]: an input that is zero can be skipped).
enum class Order : std::uint8_t { rows, columns };
constexpr int order_count = 2;

struct Matrix {
  const void* data = nullptr;
  Format format = Format::float32;
  Order order = Order::rows;
  std::int64_t out = 0, in = 0;

  std::size_t bytes() const { return static_cast<std::size_t>(out * in) * bytes_of(format); }
};

}  // namespace rookery
