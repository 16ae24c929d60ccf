// Products of bfloat16 matrices stored by columns, with the additions of tile products: 32 inputs at a time. Many tokens
// use tiles, the weights laid out in pairs; few tokens, which skip inputs that are zero, use vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/tile_rows.hpp"

namespace rookery {
namespace ROOKERY_ISA {

// Columns of a block of inputs, those of even inputs before those of odd ones, and what each is multiplied with.
struct ColumnsOfBlock {
  const std::uint16_t* column[block_inputs];
  float x[block_inputs][tile_rows];  // of each token
  int even = 0, all = 0;
};

// Adds them, `count` outputs long, to the sums [tokens, stride] as `TileFile::multiply_pairs` does. Calls ask() for every
// line that is read.
template <int tokens, class Ask>
inline void add_block(const ColumnsOfBlock& block, std::int64_t count, float* sums, std::int64_t stride, Ask&& ask) {
  sweep(count, [&](std::int64_t j, auto part) {
    vfloat totals[2][tokens] = {};
    const auto add = [&](int n, vfloat* total) [[gnu::always_inline]] {
      if (j % (tile_bytes / 2) == 0) ask();
      const auto weight = (__m512)load(block.column[n] + j, part);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
        total[t] = (vfloat)_mm512_fmadd_ps(weight, _mm512_set1_ps(block.x[n][t]), (__m512)total[t]);
    };
    for (int n = 0; n < block.even; ++n) add(n, totals[0]);
    for (int n = block.even; n < block.all; ++n) add(n, totals[1]);
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t)
      store(sums + t * stride + j, load(sums + t * stride + j) + (totals[0][t] + totals[1][t]));
  });
}

// The same for a number of tokens that is not known when this is compiled.
template <int most, class Ask>
inline void add_block(
    std::int64_t tokens, const ColumnsOfBlock& block, std::int64_t count, float* sums, std::int64_t stride, Ask&& ask) {
  if (tokens == most)
    add_block<most>(block, count, sums, stride, ask);
  else if constexpr (most > 1)
    add_block<most - 1>(tokens, block, count, sums, stride, ask);
}

// Parts of inputs: the columns of each in pairs for all outputs, then their products.
inline void columns_by_tiles(const Matrix& w, const Product& p, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t width = 2 * tile_rows, part_blocks = part_inputs / block_inputs;
  constexpr std::int64_t panel = part_blocks * tile_numbers;
  const Flush flush(true);
  const std::int64_t strips = (end - begin + width - 1) / width, rows = std::min<std::int64_t>(tile_rows, p.tokens);
  const std::int64_t size = strips * p.tokens * width;
  float* totals = scratch(static_cast<std::size_t>(panel + size));
  auto* weights = reinterpret_cast<std::uint16_t*>(totals + size);
  std::fill_n(totals, size, 0.0f);
  const Tiles tiles(pair_tiles(rows, tile_rows));
  const auto* data = static_cast<const std::uint16_t*>(w.data);
  for (std::int64_t i = 0; i < w.in; i += part_inputs) {
    const std::int64_t count = std::min(part_inputs, w.in - i), next = i + count;
    const std::int64_t next_count = std::min(part_inputs, w.in - next);
    for (std::int64_t s = 0; s < strips; ++s) {
      // a strip of columns is too narrow to be read from memory by itself
      for (std::int64_t k = next_count * s / strips; k < next_count * (s + 1) / strips; ++k)
        for (std::int64_t j = begin; j < end; j += tile_bytes / 2)
          __builtin_prefetch(data + (next + k) * w.pitch() + j, 0, 2);
      const std::int64_t o = begin + s * width, outputs = std::min(width, end - o);
      for (std::int64_t k = 0; k < (count + block_inputs - 1) / block_inputs * block_inputs; k += 2) {
        const auto column = [&](std::int64_t m) {
          if (m >= count) return vpairs{};
          const std::uint16_t* at = data + (i + m) * w.pitch() + o;
          return outputs == width ? load_pairs(at) : load_pairs(at, outputs);
        };
        std::uint16_t both[2 * width];
        store_interleaved(both, column(k), column(k + 1));
        for (int n = 0; n < 2; ++n) std::memcpy(weights + n * panel + k * tile_rows, both + n * width, width * 2);
      }
      float* strip = totals + s * p.tokens * width;
      all_tokens_by_tiles<2>(
          p, rows, i / block_inputs, (count + block_inputs - 1) / block_inputs, weights, panel,
          [&](std::int64_t t, int n, const vfloat* sums, std::int64_t done) {
            for (std::int64_t m = done; m < rows; ++m) {
              float* total = strip + (t + m) * width + n * lanes;
              store(total, load(total) + sums[m]);
            }
          });
    }
  }
  for (std::int64_t s = 0; s < strips; ++s)
    for (std::int64_t t = 0; t < p.tokens; ++t)
      for (int n = 0; n < 2; ++n) {
        const std::int64_t o = begin + s * width + n * lanes;
        give(p.y + t * p.y_stride + o, load(totals + (s * p.tokens + t) * width + n * lanes), p.add, 0, end - o);
      }
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
