// Weight matrices as they lie in memory; products with them are in kernels/product.hpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace rookery {

// How a number is stored; the order is that of the kernel tables. The last five are packed: see `Packing`.
enum class Format : std::uint8_t { float32, bfloat16, float16, int8, q8_0, int4, q4_0, q6_k };
constexpr int float_format_count = 3;
constexpr int format_count = 8;

// Which index runs fastest: in `rows` the inputs of an output lie side by side ([out, in], as linear layers are
// stored), in `columns` the outputs of an input ([in, out]: an input that is zero can be skipped).
enum class Order : std::uint8_t { rows, columns };
constexpr int order_count = 2;

constexpr bool is_packed(Format format) { return static_cast<int>(format) >= float_format_count; }

// Codes of the 4-bit formats -> numbers. `int4`: the 16 levels that leave the smallest squared error in groups of 32
// numbers of a normal distribution, each with the best of its scales of both signs (Lloyd's algorithm); `q4_0`: evenly
// spaced, as GGUF files have them.
constexpr std::array<std::int8_t, 16> int4_levels{-127, -101, -79, -62, -47, -34, -21, -9,
                                                  2,    14,   25,  36,  50,  65,  83,  107};
constexpr std::array<std::int8_t, 16> q4_0_levels{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

// Packed matrices. The inputs of every output are cut into groups; a weight is its group's float16 scale times a small
// whole number. Sizes are filled up with zeros to whole groups, panels and lines.
//
// By rows: panels of 16 outputs. A panel has its scales, [groups, 16], then its weights in lines of 64 bytes: 16 outputs
// times 4 neighbouring inputs, as instructions for dot products of bytes take them. A byte is the number + 128; at 4
// bits the low halves of a line's bytes have 4 inputs and the high halves the next 4.
//
// By columns: for each group the scales of all outputs, then one row for each of its inputs, in lines of 64 bytes, or
// at 4 bits of 128 outputs, the first 64 in the low halves. Byte 16 l + 4 v + e of a line is output 16 v + 4 l + e: four
// rows interleaved byte by byte, then pair by pair, give lines as those of panels.
//
// Q6_K, by rows only: a block of 256 inputs has a float16 scale, and each of its runs of 16 a whole number that the scale is
// multiplied with. Groups, as far as these inputs share one scale of theirs, are of 64. A panel has the scales, [blocks,
// 16], the runs' numbers, [runs, 16], then three lines for each run: codes' low halves in two, and in the third two more
// bits for each of its four times four inputs. A code is the number + 32.
struct Packing {
  int bits;
  std::int64_t group;  // inputs that share a scale

  static constexpr std::int64_t block = 256, run = 16;  // of Q6_K

  static constexpr std::int64_t panel = 16, line = 64;
  std::int64_t groups(std::int64_t in) const { return (in + group - 1) / group; }
  std::int64_t padded(std::int64_t in) const { return groups(in) * group; }
  std::int64_t panels(std::int64_t out) const { return (out + panel - 1) / panel; }
  std::int64_t panel_scale_bytes(std::int64_t in) const {
    const std::int64_t bytes = bits == 6 ? (in / block * 2 + in / run) * panel : groups(in) * panel * 2;
    return (bytes + line - 1) / line * line;
  }
  std::int64_t panel_bytes(std::int64_t in) const { return panel_scale_bytes(in) + padded(in) * panel * bits / 8; }
  std::int64_t outputs_of_line() const { return line * 8 / bits; }
  std::int64_t lines(std::int64_t out) const { return (out + outputs_of_line() - 1) / outputs_of_line(); }
  std::int64_t column_scales(std::int64_t out) const { return lines(out) * outputs_of_line(); }
  std::int64_t group_bytes(std::int64_t out) const { return column_scales(out) * 2 + group * lines(out) * line; }
  std::int64_t bytes(Order order, std::int64_t out, std::int64_t in) const {
    return order == Order::rows ? panels(out) * panel_bytes(in) : groups(in) * group_bytes(out);
  }
};

// Only for packed formats.
constexpr Packing packing(Format format) {
  if (format == Format::q6_k) return {6, 64};
  return {format == Format::int8 || format == Format::q8_0 ? 8 : 4, format == Format::int8 ? 64 : 32};
}

// Only for the others.
constexpr std::size_t bytes_of(Format format) { return format == Format::float32 ? 4 : 2; }

struct Matrix {
  const void* data = nullptr;
  Format format = Format::float32;
  Order order = Order::rows;
  std::int64_t out = 0, in = 0;
  std::int64_t stride = 0;  // numbers from one row or column to the next, where they do not follow each other; not packed

  std::int64_t pitch() const { return stride ? stride : order == Order::rows ? in : out; }
  std::size_t bytes() const {
    if (is_packed(format)) return static_cast<std::size_t>(packing(format).bytes(order, out, in));
    return static_cast<std::size_t>(out * in) * bytes_of(format);
  }
  // Bytes read for one output (by rows) or for one input (by columns), nearly.
  std::int64_t bytes_of_output() const { return static_cast<std::int64_t>(bytes()) / (out ? out : 1); }
};

}  // namespace rookery
