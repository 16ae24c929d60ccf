// Products with panels of packed matrices by tiles. A panel's lines are the rows that the second operand of a tile product
// has, and vectors of whole numbers those of the first: nothing is laid out anew. Results are those of `dot4`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/simd.hpp"
#include "core/tiles.hpp"
#include "kernels/product.hpp"

namespace rookery {
namespace ROOKERY_ISA {

static_assert(lanes == Packing::panel && lanes == tile_rows);

// Sums of up to four groups, two pairs of operands.
template <int group>
constexpr TileConfig integer_tiles() {
  return TileConfig{}.set(0, 3, tile_rows, tile_bytes).set(4, 5, tile_rows, group).set(6, 7, group / 4, tile_bytes);
}

// Adds a part's groups, from `g` on, of sixteen tokens and outputs to `totals` [tokens, outputs].
template <int group>
inline void add_part_by_tiles(
    const std::uint8_t* numbers, const float16* scales, std::int64_t scale_stride, const Integers& in,
    std::int64_t t, std::int64_t g, float* totals) {
  constexpr int part_groups = static_cast<int>(part_inputs) / group;
  const std::int64_t groups = in.groups();
  const auto count = static_cast<int>(std::min<std::int64_t>(part_groups, groups - g));
  alignas(64) std::int32_t sums[part_groups][tile_rows * lanes];
  each<part_groups>([&](auto n) {
    if (n >= count) return;
    constexpr int a = 4 + n % 2, b = 6 + n % 2;
    Tiles::zero<n>();
    Tiles::load<a>(in.values + t * in.stride + (g + n) * group, in.stride);
    Tiles::load<b>(numbers + (g + n) * group * Packing::panel, Packing::line);
    Tiles::multiply_bytes<n, a, b>();
  });
  vfloat scale[part_groups] = {};
  each<part_groups>([&](auto n) {
    if (n >= count) return;
    Tiles::store<n>(sums[n], tile_bytes);
    scale[n] = load(scales + (g + n) * scale_stride);
  });
#pragma GCC unroll 4
  for (int m = 0; m < tile_rows; ++m) {
    const std::int64_t at = (t + m) * groups + g;
    vfloat part{};
#pragma GCC unroll 4
    for (int n = 0; n < part_groups; ++n) {
      if (n >= count) break;
      const vint sum = (vint)load(reinterpret_cast<const float*>(sums[n] + m * lanes)) + in.balance[at + n];
      part += __builtin_convertvector(sum, vfloat) * (scale[n] * splat(in.scales[at + n]));
    }
    store(totals + m * lanes, load(totals + m * lanes) + part);
  }
}

// All tokens, at least sixteen, times a panel of bytes; y points at its first output.
template <int group>
void panel_by_tiles(
    const std::uint8_t* numbers, const float16* scales, std::int64_t scale_stride, const Product& p,
    float* y, std::int64_t first, std::int64_t last) {
  for (std::int64_t t = 0; t < p.tokens; t += tile_rows) {
    // the last tile begins early enough to be full, and what it has in common with the one before is computed twice
    const std::int64_t from = std::min(t, p.tokens - tile_rows);
    alignas(64) float totals[tile_rows * lanes] = {};
    for (std::int64_t g = 0; g < p.integers.groups(); g += part_inputs / group)
      add_part_by_tiles<group>(numbers, scales, scale_stride, p.integers, from, g, totals);
    for (std::int64_t m = t - from; m < tile_rows; ++m)
      give(y + (from + m) * p.y_stride, load(totals + m * lanes), p.add, first, last);
  }
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
