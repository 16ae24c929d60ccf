// How a recurrence with a matrix for every head reads and writes a few tokens of one head, in float32.
#pragma once

#include <cstdint>

#include "core/math.hpp"
#include "core/simd.hpp"
#include "kernels/sequences.hpp"

namespace rookery {

namespace ROOKERY_ISA {

// Hands out pieces of the thread's scratch memory, with gaps: pieces whose sizes are powers of two would otherwise
// compete for the same few places of the cache.
struct Pieces {
  static constexpr std::int64_t gap = 80;
  float* next;
  float* take(std::int64_t count) {
    float* piece = next;
    next += count + gap;
    return piece;
  }
};

// A row of floats for every token of a chunk; with stride 0 all tokens share one.
template <class T>
struct Rows {
  T* first = nullptr;
  std::int64_t stride = 0;
  T* operator[](std::int64_t t) const { return first + t * stride; }
};
using Given = Rows<const float>;
using Made = Rows<float>;

inline void fill(float* x, std::int64_t count, float value) {
  for (std::int64_t j = 0; j < count; j += lanes) store(x + j, splat(value));
}

// e^x of a decay's logarithm, which is anything down to −∞; 0 where float32 has no more than a few digits of it.
inline vfloat decay(vfloat log_w) {
  const vfloat w = exp(log_w);
  return log_w < splat(-87.0f) ? vfloat{} : w;
}

// One head of a tensor [tokens, heads, channels].
struct HeadRows {
  HeadTensor tensor;
  std::int64_t heads, head, channels;
  std::int64_t offset(std::int64_t token) const { return (token * heads + head) * channels; }

  // Tokens from `first` on as float32: where they lie, or else converted into `room` [count, channels].
  Given read(std::int64_t first, std::int64_t count, float* room) const {
    if (!tensor.data) {
      fill(room, channels, 0);
      return {room, 0};
    }
    if (!tensor.bfloat16) return {static_cast<const float*>(tensor.data) + offset(first), heads * channels};
    for (std::int64_t t = 0; t < count; ++t) {
      const auto* from = static_cast<const std::uint16_t*>(tensor.data) + offset(first + t);
      for (std::int64_t j = 0; j < channels; j += lanes) store(room + t * channels + j, load(from + j));
    }
    return {room, channels};
  }

  // Where to put tokens from `first` on: in the tensor, or in `room` for `write` to convert.
  Made place(std::int64_t first, float* room) const {
    if (tensor.bfloat16) return {room, channels};
    return {static_cast<float*>(tensor.data) + offset(first), heads * channels};
  }

  void write(std::int64_t first, std::int64_t count, Made made) const {
    if (!tensor.bfloat16) return;
    for (std::int64_t t = 0; t < count; ++t) {
      auto* to = static_cast<std::uint16_t*>(tensor.data) + offset(first + t);
      for (std::int64_t j = 0; j < channels; j += lanes) store(to + j, load(made[t] + j));
    }
  }
};

// A matrix [rows, columns] into [columns, rows]; both are multiples of 16.
inline void copy_transposed(const float* in, std::int64_t rows, std::int64_t columns, float* out) {
  for (std::int64_t i = 0; i < rows; i += lanes)
    for (std::int64_t j = 0; j < columns; j += lanes) {
      vfloat x[lanes];
      for (int m = 0; m < lanes; ++m) x[m] = load(in + (i + m) * columns + j);
      transpose(x);
      for (int m = 0; m < lanes; ++m) store(out + (j + m) * rows + i, x[m]);
    }
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
