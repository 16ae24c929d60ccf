// Compiled without fused multiply-adds, so that every instruction set finds the same codes.
#include "kernels/packing.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int64_t panel = Packing::panel, line = Packing::line;
constexpr int64_t most = 64;  // inputs of a group

// float16 bits, rounded to nearest, ties to even; the largest finite number for those beyond it.
std::uint16_t to_half(float x) {
  if (x < 0) return static_cast<std::uint16_t>(to_half(-x) | 0x8000);
  if (!(x < 65504.0f)) return x != x ? 0x7e00 : 0x7bff;
  if (x < 6.103515625e-5f) return static_cast<std::uint16_t>(std::lrint(x * 16777216.0f));  // below 2^-14: steps of 2^-24
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<std::uint16_t>((bits >> 13) - (112 << 10));
}

float from_half(std::uint16_t half) {
  float16 halves[lanes] = {{half}};
  return load(halves)[0];
}

// One output's part of a group: a scale and `count` codes, as they are stored.
struct Coded {
  std::uint16_t scale;
  std::uint8_t codes[most];
};

float largest(const float* w, int64_t count) {
  float size = 0;
  for (int64_t i = 0; i < count; ++i) size = std::fabs(w[i]) > size ? std::fabs(w[i]) : size;
  return size;
}

void code_int8(const float* w, int64_t count, Coded& to) {
  to.scale = to_half(largest(w, count) / 127.0f);
  const float scale = from_half(to.scale), inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float level = std::clamp(w[i] * inverse, -127.0f, 127.0f);
    to.codes[i] = static_cast<std::uint8_t>(static_cast<int>(level + 12582912.0f - 12582912.0f) + 128);
  }
}

// Adds step(k) for every border between levels that lies below `x`, level k being the next one above it.
template <class Step>
inline auto beyond(vfloat x, decltype(std::declval<Step>()(0)) total, Step&& step) {
#pragma GCC unroll 15
  for (std::size_t k = 1; k < int4_levels.size(); ++k) {
    const auto border = static_cast<float>(int4_levels[k] + int4_levels[k - 1]) * 0.5f;
    total += x > splat(border) ? step(static_cast<int>(k)) : decltype(total){};
  }
  return total;
}

inline vfloat nearest_level(vfloat x) {
  return beyond(x, splat(static_cast<float>(int4_levels[0])), [](int k) {
    const auto at = static_cast<std::size_t>(k);
    return splat(static_cast<float>(int4_levels[at] - int4_levels[at - 1]));
  });
}

// Of several scales of both signs the one with the smallest sum of squared errors: for given codes the best scale is
// Σ w c / Σ c², and the error is then Σ w² − (Σ w c)² / Σ c².
void code_int4(const float* w, int64_t count, Coded& to) {
  constexpr int candidates = 9, wide = 16;  // sums in 16 lanes on every instruction set
  const float size = largest(w, count);
  float best = 0, best_gain = -1;
  for (int n = 0; n < 2 * candidates && size > 0; ++n) {
    const float inverse = (n % 2 ? -1.0f : 1.0f) * (102.0f + 7.0f * static_cast<float>(n / 2)) / size;
    vfloat products[wide / lanes] = {}, squares[wide / lanes] = {};
    for (int64_t i = 0; i < count; i += lanes) {
      const vfloat weight = load(w + i), level = nearest_level(weight * inverse);
      products[i / lanes % (wide / lanes)] += weight * level;
      squares[i / lanes % (wide / lanes)] += level * level;
    }
    float wc = 0, cc = 0;
    for (int i = 0; i < wide; ++i) {
      wc += products[i / lanes][i % lanes];
      cc += squares[i / lanes][i % lanes];
    }
    if (const float gain = wc * wc / cc; gain > best_gain) {
      best_gain = gain;
      best = wc / cc;
    }
  }
  to.scale = to_half(best);
  const float scale = from_half(to.scale), inverse = scale != 0 ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < count; i += lanes) {
    const vint codes = beyond(load(w + i) * inverse, vint{}, [](int) { return vint{} + 1; });
    for (int lane = 0; lane < lanes; ++lane) to.codes[i + lane] = static_cast<std::uint8_t>(codes[lane]);
  }
}

// Where a block of `panel` outputs and one group goes.
struct Target {
  Packing how;
  Order order;
  int64_t out, in;
  std::uint8_t* data;

  void put(int64_t output, int64_t group, const Coded& from) const {
    std::uint8_t* scale;
    if (order == Order::rows) {
      std::uint8_t* at = data + output / panel * how.panel_bytes(in);
      scale = at + (group * panel + output % panel) * 2;
      std::uint8_t* numbers = at + how.panel_scale_bytes(in) + group * how.group * panel * how.bits / 8;
      for (int64_t i = 0; i < how.group; ++i) {
        const int64_t quad = i / 4, place = 4 * (output % panel) + i % 4;
        if (how.bits == 8)
          numbers[quad * line + place] = from.codes[i];
        else
          numbers[quad / 2 * line + place] |= static_cast<std::uint8_t>(from.codes[i] << (quad % 2 * 4));
      }
    } else {
      std::uint8_t* at = data + group * how.group_bytes(out);
      scale = at + output * 2;
      const int64_t width = how.outputs_of_line(), n = output % width, m = n % line;
      at += how.column_scales(out) * 2 + output / width * line + m % 16 / 4 * 16 + m / 16 * 4 + m % 4;
      for (int64_t i = 0; i < how.group; ++i, at += how.lines(out) * line)
        *at = how.bits == 8 ? from.codes[i] : static_cast<std::uint8_t>(*at | from.codes[i] << (n / line * 4));
    }
    std::memcpy(scale, &from.scale, sizeof from.scale);
  }

  // Calls make(output, group, coded) for everything in units begin … end − 1.
  template <class Make>
  void fill(int64_t begin, int64_t end, Make&& make) const {
    const int64_t unit = order == Order::rows ? how.panel_bytes(in) : how.group_bytes(out);
    std::memset(data + begin * unit, 0, static_cast<std::size_t>((end - begin) * unit));
    const int64_t first = order == Order::rows ? begin * panel : 0;
    const int64_t last = order == Order::rows ? std::min(out, end * panel) : out;
    const int64_t first_group = order == Order::rows ? 0 : begin, last_group = order == Order::rows ? how.groups(in) : end;
    for (int64_t o = first; o < last; ++o)
      for (int64_t g = first_group; g < last_group; ++g) {
        Coded coded{};
        make(o, g, coded);
        put(o, g, coded);
      }
  }
};

void pack(const Matrix& from, Format format, Order order, int64_t begin, int64_t end, std::uint8_t* to) {
  const Target target{rookery::packing(format), order, from.out, from.in, to};
  const int64_t group = target.how.group;
  target.fill(begin, end, [&](int64_t o, int64_t g, Coded& coded) {
    float w[most] = {};
    const int64_t at = o * from.in + g * group, count = std::min(group, from.in - g * group);
    sweep(count, [&](int64_t j, auto part) {
      const void* data = from.data;
      store(w + j, from.format == Format::float32    ? load(static_cast<const float*>(data) + at + j, part)
                   : from.format == Format::bfloat16 ? load(static_cast<const std::uint16_t*>(data) + at + j, part)
                                                     : load(static_cast<const float16*>(data) + at + j, part), part);
    });
    format == Format::int8 ? code_int8(w, group, coded) : code_int4(w, group, coded);
  });
}

// A block has the low halves of codes, 128 bytes, two more bits of each, 64, a number for each run and the scale. Of each
// half of a block, 128 inputs, input 32 i + j has its low half in byte 32 (i % 2) + j, below or above, and its two bits in
// byte j at 2 i.
void repack_q6_k(const std::uint8_t* blocks, int64_t out, int64_t in, int64_t begin, int64_t end, std::uint8_t* to) {
  const Packing how = rookery::packing(Format::q6_k);
  const int64_t size = block_bytes(Format::q6_k);
  std::memset(to + begin * how.panel_bytes(in), 0, static_cast<std::size_t>((end - begin) * how.panel_bytes(in)));
  for (int64_t o = begin * panel; o < std::min(out, end * panel); ++o) {
    std::uint8_t* at = to + o / panel * how.panel_bytes(in);
    const int64_t lane = o % panel;
    for (int64_t b = 0; b < in / how.block; ++b) {
      const std::uint8_t *from = blocks + (o * (in / how.block) + b) * size, *scales = from + 192;
      std::memcpy(at + (b * panel + lane) * 2, from + 208, 2);
      for (int64_t i = 0; i < how.block; ++i) {
        const int64_t half = i / 128, part = i % 128 / 32, j = i % 32;
        const int low = from[64 * half + 32 * (part % 2) + j] >> (part / 2 * 4) & 15;
        const int high = from[128 + 32 * half + j] >> (2 * part) & 3;
        const int64_t run = (b * how.block + i) / how.run, q = i % how.run / 4, place = 4 * lane + i % 4;
        std::uint8_t* lines = at + how.panel_scale_bytes(in) + run * 3 * line + place;
        lines[q / 2 * line] |= static_cast<std::uint8_t>(low << (q % 2 * 4));
        lines[2 * line] |= static_cast<std::uint8_t>(high << (2 * q));
        if (i % how.run == 0) at[in / how.block * panel * 2 + run * panel + lane] = scales[i / how.run];
      }
    }
  }
}

void repack(
    const std::uint8_t* blocks, Format format, Order order, int64_t out, int64_t in, int64_t begin, int64_t end,
    std::uint8_t* to) {
  if (format == Format::q6_k) return repack_q6_k(blocks, out, in, begin, end, to);
  const Target target{rookery::packing(format), order, out, in, to};
  const int64_t size = block_bytes(format);
  target.fill(begin, end, [&](int64_t o, int64_t g, Coded& coded) {
    const std::uint8_t* block = blocks + (o * (in / 32) + g) * size;
    std::memcpy(&coded.scale, block, 2);
    for (int i = 0; i < 32; ++i)
      coded.codes[i] = format == Format::q8_0 ? static_cast<std::uint8_t>(block[2 + i] ^ 128)
                       : i < 16               ? static_cast<std::uint8_t>(block[2 + i] & 15)
                                              : static_cast<std::uint8_t>(block[2 + i - 16] >> 4);
  });
}

}  // namespace
}  // namespace ROOKERY_ISA

const PackingKernels ROOKERY_ISA::packing{ROOKERY_ISA::pack, ROOKERY_ISA::repack};

}  // namespace rookery
