// Products of bfloat16 matrices stored by rows, by tiles: 32 inputs at a time, for any number of tokens, so that sums are
// added up in one order. One of the two operands has to be laid out in pairs: with few tokens that is their vectors, and
// weights are read where they lie; with many it is the weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "core/tiles.hpp"
#include "kernels/product.hpp"

namespace rookery {
namespace ROOKERY_ISA {

constexpr std::int64_t block_inputs = 32;  // of a tile product
constexpr int tile_numbers = tile_rows * static_cast<int>(block_inputs);

// Tiles 0 to 3 are sums, 4 and 5 first operands, 6 and 7 second ones.
inline TileConfig pair_tiles(std::int64_t rows, std::int64_t columns) {
  return TileConfig{}.set(0, 3, rows, 4 * columns).set(4, 5, rows, tile_bytes).set(6, 7, tile_rows, 4 * columns);
}

// Sixteen rows of bfloat16, those of the outputs at places o … , the last one standing for those beyond `end`.
class WeightRows {
 public:
  WeightRows(const Matrix& w, const Product& p, std::int64_t o, std::int64_t end) : in_(w.in), pitch_(w.pitch()) {
    is_straight_ = !p.outputs && o + tile_rows <= end;
    for (int i = 0; i < tile_rows; ++i) {
      const std::int64_t place = std::min(o + i, end - 1);
      rows_[i] = static_cast<const std::uint16_t*>(w.data) + (p.outputs ? p.outputs[place] : place) * pitch_;
    }
  }

  // Block k of the inputs as a tile, zeros after the last.
  template <int t>
  void load(std::int64_t k) const {
    const std::int64_t count = std::min(block_inputs, in_ - k * block_inputs);
    if (is_straight_ && count == block_inputs) {
      Tiles::load<t>(rows_[0] + k * block_inputs, pitch_ * 2);
      return;
    }
    alignas(64) std::uint16_t copy[tile_numbers];
    gather(k, copy);
    Tiles::load<t>(copy, tile_bytes);
  }

  // Block k of the inputs in pairs: [pairs, outputs, 2].
  void turn(std::int64_t k, std::uint16_t* to) const {
    alignas(64) std::uint16_t copy[tile_numbers];
    gather(k, copy);
    turn_pairs(copy, to);
  }

  // [16, 32] -> [16 pairs, 16, 2].
  static void turn_pairs(const std::uint16_t* from, std::uint16_t* to) {
    vfloat rows[tile_rows];
    for (int i = 0; i < tile_rows; ++i) rows[i] = rookery::ROOKERY_ISA::load(reinterpret_cast<const float*>(from) + i * lanes);
    transpose(rows);
    for (int i = 0; i < tile_rows; ++i) store(reinterpret_cast<float*>(to) + i * lanes, rows[i]);
  }

  // Asks for later rows in the order of memory, as many lines as block k has.
  void ask(std::int64_t k, std::int64_t ahead) const {
    const char* later = reinterpret_cast<const char*>(rows_[0]) + ahead + k * tile_rows * tile_bytes;
#pragma GCC unroll 16
    for (int i = 0; i < tile_rows; ++i) __builtin_prefetch(later + i * tile_bytes, 0, 2);
  }

 private:
  void gather(std::int64_t k, std::uint16_t* to) const {
    const auto count = static_cast<std::size_t>(std::min(block_inputs, in_ - k * block_inputs));
    for (int i = 0; i < tile_rows; ++i, to += block_inputs) {
      if (count < block_inputs) std::memset(to, 0, tile_bytes);
      std::memcpy(to, rows_[i] + k * block_inputs, count * 2);
    }
  }

  const std::uint16_t* rows_[tile_rows];
  std::int64_t in_, pitch_;
  bool is_straight_;
};

// Block k of up to sixteen tokens in pairs, zeros for those that are missing.
inline void turn_tokens(const Rounded& x, std::int64_t tokens, std::int64_t k, std::uint16_t* to) {
  alignas(64) std::uint16_t rows[tile_numbers] = {};
  for (std::int64_t t = 0; t < tokens; ++t)
    std::memcpy(rows + t * block_inputs, x.values + t * x.stride + k * block_inputs, tile_bytes);
  WeightRows::turn_pairs(rows, to);
}

// Sixteen outputs of token t, those at places o … but not beyond `end`.
inline void put_outputs(const Product& p, std::int64_t t, std::int64_t o, std::int64_t end, vfloat sums) {
  float* y = p.y + t * p.y_stride;
  if (!p.outputs) return give(y + o, sums, p.add, 0, end - o);
  for (std::int64_t i = 0; i < std::min<std::int64_t>(lanes, end - o); ++i) y[p.outputs[o + i]] = sums[i];
}

// Up to sixteen tokens: `panels` times sixteen outputs from place o on. x has blocks of pairs [blocks, 16, width, 2].
template <int panels>
void few_by_tiles(
    const Matrix& w, const Product& p, const std::uint16_t* x, std::int64_t width, std::int64_t o,
    std::int64_t end) {
  const WeightRows rows[2] = {{w, p, o, end}, {w, p, std::min(o + tile_rows, end - 1), end}};
  const std::int64_t ahead = std::max<std::int64_t>(12 * 1024, panels * tile_rows * w.in * 2);
  Tiles::zero<0>();
  Tiles::zero<1>();
  for (std::int64_t k = 0; k * block_inputs < w.in; ++k) {
    Tiles::load<6>(x + k * block_inputs * width, 4 * width);
    each<panels>([&](auto n) {
      if (!p.outputs) rows[n].ask(k, ahead);
      rows[n].template load<4 + n>(k);
      Tiles::multiply_pairs<n, 4 + n, 6>();
    });
  }
  each<panels>([&](auto n) {
    vfloat sums[tile_rows];
    Tiles::store<n>(sums, 4 * width);
    if (width > 1) transpose(sums);
    for (std::int64_t t = 0; t < p.tokens; ++t) put_outputs(p, t, o + n * lanes, end, sums[t]);
  });
}

// Adds `blocks` blocks of inputs, from block `first` on, of tokens from[0] … and from[1] … times panels of pairs, and
// calls step(tile of tokens, panel, sums [tokens, outputs]).
template <int of_tokens, int panels, class Step>
inline void many_by_tiles(
    const Rounded& x, const std::int64_t* from, std::int64_t first, std::int64_t blocks,
    const std::uint16_t* weights, std::int64_t panel_stride, Step&& step) {
  each<of_tokens * panels>([&](auto n) { Tiles::zero<n>(); });
  for (std::int64_t k = 0; k < blocks; ++k) {
    each<of_tokens>([&](auto m) {
      Tiles::load<4 + m>(x.values + from[m] * x.stride + (first + k) * block_inputs, x.stride * 2);
    });
    each<panels>([&](auto n) { Tiles::load<6 + n>(weights + n * panel_stride + k * tile_numbers, tile_bytes); });
    each<of_tokens>([&](auto m) {
      each<panels>([&](auto n) { Tiles::multiply_pairs<m * panels + n, 4 + m, 6 + n>(); });
    });
  }
  each<of_tokens>([&](auto m) {
    each<panels>([&](auto n) {
      vfloat sums[tile_rows];
      Tiles::store<m * panels + n>(sums, tile_bytes);
      step(m, n, sums);
    });
  });
}

// many_by_tiles for all tokens, two tiles of them at a time; step(first token, panel, sums, tokens to leave out). The last
// tile begins early enough to be full, and what it has in common with the one before is computed twice.
template <int panels, class Step>
inline void all_tokens_by_tiles(
    const Product& p, std::int64_t rows, std::int64_t first, std::int64_t blocks,
    const std::uint16_t* weights, std::int64_t panel_stride, Step&& step) {
  for (std::int64_t t = 0; t < p.tokens;) {
    const std::int64_t from[2] = {std::min(t, p.tokens - rows), std::min(t + rows, p.tokens - rows)};
    const auto use = [&](int m, int n, const vfloat* sums) { step(from[m], n, sums, t + m * rows - from[m]); };
    if (t + rows < p.tokens)
      many_by_tiles<2, panels>(p.rounded, from, first, blocks, weights, panel_stride, use);
    else
      many_by_tiles<1, panels>(p.rounded, from, first, blocks, weights, panel_stride, use);
    t += 2 * rows;
  }
}

inline void rows_by_tiles(const Matrix& w, const Product& p, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  const std::int64_t blocks = (w.in + block_inputs - 1) / block_inputs, panel = blocks * tile_numbers;
  auto* memory = reinterpret_cast<std::uint16_t*>(scratch(static_cast<std::size_t>(panel)));  // two panels
  if (p.tokens <= tile_rows) {
    const std::int64_t width = p.tokens == 1 ? 1 : tile_rows;
    if (width > 1)
      for (std::int64_t k = 0; k < blocks; ++k) turn_tokens(p.rounded, p.tokens, k, memory + k * tile_numbers);
    const Tiles tiles(pair_tiles(tile_rows, width));
    for (std::int64_t o = begin; o < end; o += 2 * tile_rows)
      (o + tile_rows < end ? few_by_tiles<2> : few_by_tiles<1>)(
          w, p, width > 1 ? memory : p.rounded.values, width, o, end);
    return;
  }
  const Tiles tiles(pair_tiles(tile_rows, tile_rows));
  for (std::int64_t o = begin; o < end; o += 2 * tile_rows) {
    for (int n = 0; o + n * tile_rows < std::min(end, o + 2 * tile_rows); ++n) {
      const WeightRows rows(w, p, o + n * tile_rows, end);
      for (std::int64_t k = 0; k < blocks; ++k) rows.turn(k, memory + n * panel + k * tile_numbers);
    }
    const auto step = [&](std::int64_t t, int n, const vfloat* sums, std::int64_t done) {
      for (std::int64_t m = done; m < tile_rows; ++m) put_outputs(p, t + m, o + n * lanes, end, sums[m]);
    };
    if (o + tile_rows < end)
      all_tokens_by_tiles<2>(p, tile_rows, 0, blocks, memory, panel, step);
    else
      all_tokens_by_tiles<1>(p, tile_rows, 0, blocks, memory, panel, step);
  }
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
