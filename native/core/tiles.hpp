// Tiles, the matrix registers of Intel's AMX: eight of up to 16 rows of 64 bytes, with products of whole tiles. Kernels are
// written for the type `Tiles`, which is the processor's or, where ROOKERY_TILES says so, an imitation that any x86 runs.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/pairs.hpp"

namespace rookery {
namespace ROOKERY_ISA {

constexpr int tile_rows = 16, tile_bytes = 64, tile_count = 8;

// How many rows each tile has, and bytes a row, as the instruction reads it.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, unused[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};

  constexpr TileConfig& set(int first, int last, std::int64_t of_rows, std::int64_t of_bytes) {
    for (int t = first; t <= last; ++t) {
      rows[t] = static_cast<std::uint8_t>(of_rows);
      bytes[t] = static_cast<std::uint16_t>(of_bytes);
    }
    return *this;
  }
};
static_assert(sizeof(TileConfig) == 64);

// The processor's own. A thread has tiles from the constructor to the destructor; outside of kernels they would be kept at
// every switch of threads. Written as assembly because GCC's functions take literal numbers only and name too
// little of the memory they read: of the configuration 8 bytes, of a tile nothing.
class HardwareTiles {
 public:
  explicit HardwareTiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  ~HardwareTiles() { asm volatile("tilerelease"); }
  HardwareTiles(const HardwareTiles&) = delete;

  template <int t>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  // Rows are `stride` bytes apart.
  template <int t>
  static void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(t) : "memory");
  }
  template <int t>
  static void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(t) : "memory");
  }
  // c += a · b for signed bytes in a and unsigned ones in b: four neighbours in a row of a with four in a row of b.
  template <int c, int a, int b>
  static void multiply_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
  // c += a · b for pairs of bfloat16.
  template <int c, int a, int b>
  static void multiply_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};

// What the instructions do by Intel's manual ("Operation" of TDPBSUD and TDPBF16PS, volume 2), with its checks.
struct TileFile {
  TileConfig config{0};
  alignas(64) std::uint8_t data[tile_count][tile_rows][tile_bytes];

  void configure(const TileConfig& wanted) {
    for (int t = 0; t < tile_count; ++t) check(wanted.rows[t] <= tile_rows && wanted.bytes[t] <= tile_bytes);
    check(wanted.palette == 1);
    config = wanted;
    std::memset(data, 0, sizeof data);
  }
  void release() { config = TileConfig{0}; }
  void zero(int t) {
    check(config.palette == 1);
    std::memset(data[t], 0, sizeof data[t]);
  }
  void load(int t, const std::uint8_t* from, std::int64_t stride) {
    zero(t);
    for (int row = 0; row < config.rows[t]; ++row) std::memcpy(data[t][row], from + row * stride, config.bytes[t]);
  }
  void store(int t, std::uint8_t* to, std::int64_t stride) const {
    check(config.palette == 1);
    for (int row = 0; row < config.rows[t]; ++row) std::memcpy(to + row * stride, data[t][row], config.bytes[t]);
  }
  void multiply_bytes(int c, int a, int b) {
    check_shapes(c, a, b);
    for (int row = 0; row < config.rows[c]; ++row)
      for (int k = 0; k < config.bytes[a]; ++k)
        for (int column = 0; column < config.bytes[c] / 4; ++column)
          at<std::int32_t>(c, row, column) +=
              static_cast<std::int8_t>(data[a][row][k]) * data[b][k / 4][4 * column + k % 4];
  }
  // First and second numbers of pairs are added up apart, from zero, with fused multiply-adds; then both sums, then
  // what was there. Subnormal numbers count as zero.
  void multiply_pairs(int c, int a, int b) {
    check_shapes(c, a, b);
    const Flush flush(true);
    for (int row = 0; row < config.rows[c]; ++row) {
      float sums[2][tile_bytes / 4] = {};
      for (int k = 0; k < config.bytes[a] / 2; ++k)
        for (int column = 0; column < config.bytes[c] / 4; ++column) {
          float& sum = sums[k % 2][column];
          sum = std::fma(wide(a, row, k), wide(b, k / 2, 2 * column + k % 2), sum);
        }
      for (int column = 0; column < config.bytes[c] / 4; ++column)
        at<float>(c, row, column) += sums[0][column] + sums[1][column];
    }
  }

 private:
  template <class T>
  T& at(int t, int row, int column) {
    return reinterpret_cast<T*>(data[t][row])[column];
  }
  float wide(int t, int row, int column) {
    const std::uint32_t bits = std::uint32_t{at<std::uint16_t>(t, row, column)} << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }
  void check_shapes(int c, int a, int b) const {
    check(config.palette == 1 && c != a && c != b && a != b);
    check(config.rows[c] == config.rows[a] && config.bytes[c] == config.bytes[b] &&
          config.bytes[a] == 4 * config.rows[b] && config.bytes[c] % 4 == 0);
  }
  // The processor ends the program here.
  static void check(bool is_allowed) {
    if (!is_allowed) throw std::logic_error("tiles are used in another way than they are configured for");
  }
};

class ImitatedTiles {
 public:
  explicit ImitatedTiles(const TileConfig& config) { mine().configure(config); }
  ~ImitatedTiles() { mine().release(); }
  ImitatedTiles(const ImitatedTiles&) = delete;

  template <int t>
  static void zero() {
    mine().zero(t);
  }
  template <int t>
  static void load(const void* from, std::int64_t stride) {
    mine().load(t, static_cast<const std::uint8_t*>(from), stride);
  }
  template <int t>
  static void store(void* to, std::int64_t stride) {
    mine().store(t, static_cast<std::uint8_t*>(to), stride);
  }
  template <int c, int a, int b>
  static void multiply_bytes() {
    mine().multiply_bytes(c, a, b);
  }
  template <int c, int a, int b>
  static void multiply_pairs() {
    mine().multiply_pairs(c, a, b);
  }

 private:
  static TileFile& mine() {
    thread_local TileFile tiles;
    return tiles;
  }
};

using Tiles = ROOKERY_TILES;

// step(0), …, step(count − 1), the numbers known when it is compiled.
template <class Step, int... n>
[[gnu::always_inline]] inline void each(std::integer_sequence<int, n...>, Step&& step) {
  (step(std::integral_constant<int, n>{}), ...);
}
template <int count, class Step>
[[gnu::always_inline]] inline void each(Step&& step) {
  each(std::make_integer_sequence<int, count>{}, step);
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
