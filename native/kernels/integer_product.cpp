// Compiled without fused multiply-adds, so that every instruction set rounds alike.
#include "kernels/integer_product.hpp"

#include <algorithm>
#include <cmath>

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "kernels/bytes.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int panel = Packing::panel, line = Packing::line;
constexpr int parts = panel / lanes;                   // vectors of sums of a panel
constexpr int tile_tokens = lanes > 8 ? 12 : 4;        // tokens whose sums fit the registers
constexpr int row_tokens = lanes > 8 ? 4 : 2;          // the same where four rows are interleaved first …
constexpr int code_row_tokens = lanes > 8 ? 2 : 1;     // … and have two codes a byte
constexpr int most_few_tokens = lanes > 8 ? 8 : 4;     // as `ProductKernels::few_tokens` at least
constexpr int64_t ahead = 8 * 1024;                    // bytes that the memory delivers in its latency

template <int bits_, int group_>
struct Packed {
  static constexpr int bits = bits_, group = group_;
  static constexpr int quads = group / 4;            // lines of four inputs each
  static constexpr int line_quads = 8 / bits;        // of them in a line
  static constexpr int part_groups = static_cast<int>(part_inputs) / group;
};

inline vint to_ints(std::int32_t x) { return x - vint{}; }
inline vfloat to_floats(vint x) { return __builtin_convertvector(x, vfloat); }

inline std::int32_t quad(const std::int8_t* p) {
  std::int32_t x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline const float16* scales_at(const std::uint8_t* p) { return reinterpret_cast<const float16*>(p); }

// What a group's sums begin with for one token.
inline vint start(const Integers& x, int64_t token, int64_t group) {
  return to_ints(is_balanced ? x.balance[token * x.groups() + group] : 0);
}

// Adds the tokens' dot products of a group's inputs to `sums` [tokens, parts]; sums of single tokens in several chains,
// because the next instruction would wait for the last one.
template <class F, int tokens, bool asks>
inline void group_of_panel(const std::uint8_t* data, const std::int8_t* const* x, const Levels& levels, vint* sums) {
  constexpr int chains = tokens * parts >= 4 ? 1 : 4 / (tokens * parts);
  vint chain[chains * tokens * parts] = {};
#pragma GCC unroll 16
  for (int q = 0; q < F::quads; q += F::line_quads) {
    const std::uint8_t* at = data + q / F::line_quads * line;
    if (asks) __builtin_prefetch(at + ahead, 0, 2);
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      const vbytes stored = load_bytes(at + part * vector_bytes);
#pragma GCC unroll 2
      for (int half = 0; half < F::line_quads; ++half) {
        vbytes weights = stored;
        if constexpr (F::bits == 4) weights = levels(half ? high_codes(stored) : low_codes(stored));
        weights = weights_of(weights);
#pragma GCC unroll 12
        for (int m = 0; m < tokens; ++m) {
          vint& sum = chain[((q + half) % chains * tokens + m) * parts + part];
          sum = dot4(sum, weights, quad(x[m] + 4 * (q + half)));
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < tokens * parts; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < chains; ++n) sums[i] += chain[n * tokens * parts + i];
}

// A panel's weights and scales; `data` is unpacked where `F` says 8 bits.
struct Panel {
  const std::uint8_t* data;
  const float16* scales;
  int64_t scale_stride;  // from group to group
};

// `tokens` tokens times one panel, written to outputs `first` … `last` − 1 of it.
template <class F, int tokens, bool asks>
void tile(
    const Panel& from, const Levels& levels, const Product& p, int64_t t, float* y, int64_t first, int64_t last) {
  const Integers& in = p.integers;
  const int64_t groups = in.groups();
  const std::int8_t* x[tokens];
  for (int m = 0; m < tokens; ++m) x[m] = in.values + (t + m) * in.stride;
  vfloat totals[tokens * parts] = {};
  for (int64_t g = 0; g < groups;) {
    const int64_t stop = std::min(groups, g + F::part_groups);
    vfloat part_totals[tokens * parts] = {};
    for (; g < stop; ++g) {
      vint sums[tokens * parts];
#pragma GCC unroll 12
      for (int m = 0; m < tokens; ++m)
        for (int i = 0; i < parts; ++i) sums[m * parts + i] = start(in, t + m, g);
      group_of_panel<F, tokens, asks>(from.data + g * (F::group * panel * F::bits / 8), x, levels, sums);
      vfloat scale[parts];
      for (int i = 0; i < parts; ++i) scale[i] = load(from.scales + g * from.scale_stride + i * lanes);
#pragma GCC unroll 12
      for (int m = 0; m < tokens; ++m) {
        const vfloat of_x = splat(in.scales[(t + m) * groups + g]);
#pragma GCC unroll 4
        for (int i = 0; i < parts; ++i)
          part_totals[m * parts + i] += to_floats(sums[m * parts + i]) * (scale[i] * of_x);
        x[m] += F::group;
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < tokens * parts; ++i) totals[i] += part_totals[i];
  }
  for (int m = 0; m < tokens; ++m)
    for (int i = 0; i < parts; ++i) {
      float* to = y + (t + m) * p.y_stride + i * lanes;
      if (i * lanes >= first && (i + 1) * lanes <= last) {
        store(to, p.add ? load(to) + totals[m * parts + i] : totals[m * parts + i]);
      } else {
        const vfloat total = totals[m * parts + i];
        for (int64_t l = std::max<int64_t>(first - i * lanes, 0); l < std::min<int64_t>(lanes, last - i * lanes); ++l)
          to[l] = p.add ? to[l] + total[l] : total[l];
      }
    }
}

template <class F, bool asks, int tokens = tile_tokens>
inline void last_tile(
    const Panel& from, const Levels& levels, const Product& p, int64_t t, float* y, int64_t first, int64_t last) {
  if (p.tokens - t == tokens)
    tile<F, tokens, asks>(from, levels, p, t, y, first, last);
  else if constexpr (tokens > 1)
    last_tile<F, asks, tokens - 1>(from, levels, p, t, y, first, last);
}

// All tokens from `t` on; y points at the panel's first output.
template <class F>
void tiles(const Panel& from, const Levels& levels, const Product& p, float* y, int64_t first, int64_t last) {
  int64_t t = 0;
  if (p.tokens < tile_tokens) return last_tile<F, true>(from, levels, p, t, y, first, last);
  tile<F, tile_tokens, true>(from, levels, p, t, y, first, last);
  for (t += tile_tokens; t + tile_tokens <= p.tokens; t += tile_tokens)
    tile<F, tile_tokens, false>(from, levels, p, t, y, first, last);
  if (t < p.tokens) last_tile<F, false>(from, levels, p, t, y, first, last);
}

const std::array<std::int8_t, 16>& levels_of(const Matrix& w) {
  return w.format == Format::q4_0 ? q4_0_levels : int4_levels;
}

// A panel of codes as a panel of numbers.
void unpack_panel(const std::uint8_t* codes, int64_t lines, const Levels& levels, std::uint8_t* numbers) {
  for (int64_t i = 0; i < lines; ++i, codes += line, numbers += 2 * line)
    for (int part = 0; part < line; part += vector_bytes) {
      const vbytes stored = load_bytes(codes + part);
      store_bytes(numbers + part, levels(low_codes(stored)));
      store_bytes(numbers + line + part, levels(high_codes(stored)));
    }
}

template <class F>
void by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const Packing packing{F::bits, F::group};
  const int64_t bytes = packing.panel_bytes(w.in), scale_bytes = packing.panel_scale_bytes(w.in);
  const Levels levels(levels_of(w));
  const bool unpacks = F::bits == 4 && p.tokens > tile_tokens;
  auto* numbers = unpacks ? reinterpret_cast<std::uint8_t*>(scratch(static_cast<std::size_t>(packing.padded(w.in) * 4)))
                          : nullptr;
  for (int64_t o = begin / panel * panel; o < end; o += panel) {
    const auto* at = static_cast<const std::uint8_t*>(w.data) + o / panel * bytes;
    Panel from{at + scale_bytes, scales_at(at), panel};
    const int64_t first = std::max<int64_t>(begin - o, 0), last = std::min<int64_t>(end - o, panel);
    if (unpacks) {
      unpack_panel(from.data, packing.padded(w.in) / 8, levels, numbers);
      from.data = numbers;
      tiles<Packed<8, F::group>>(from, levels, p, p.y + o, first, last);
    } else {
      tiles<F>(from, levels, p, p.y + o, first, last);
    }
  }
}

// ---- columns

// The rows of a part of the inputs and the tokens' numbers there, four by four; groups are filled up with zeros.
struct Quads {
  std::int32_t rows[part_inputs];
  std::int32_t x[most_few_tokens][part_inputs / 4];
  int end[5];  // quads up to the end of each group, from 1 on

  // Takes inputs of the part from place `i` of the list on; gives the place behind them.
  template <class F>
  int64_t fill(const Matrix& w, const Product& p, int64_t part, int64_t t, int tokens, int64_t i) {
    const Integers& in = p.integers;
    int used = 0;
    end[0] = 0;
    for (int g = 0; g < F::part_groups; ++g) {
      const int64_t stop = std::min(w.in, part * part_inputs + (g + 1) * F::group);
      if (p.active)
        for (; i < p.active_count && p.active[i] < stop; ++i) rows[used++] = p.active[i];
      else
        for (; i < stop; ++i) rows[used++] = static_cast<std::int32_t>(i);
      const int real = used;
      for (; used % 4; ++used) rows[used] = rows[used - 1];
      for (int m = 0; m < tokens; ++m) {
        const std::int8_t* values = in.values + (t + m) * in.stride;
        auto* bytes = reinterpret_cast<std::int8_t*>(x[m]);
        for (int n = 4 * end[g]; n < used; ++n) bytes[n] = n < real ? values[rows[n]] : std::int8_t{0};
      }
      end[g + 1] = used / 4;
    }
    return i;
  }
};

// One line of outputs, a part of the inputs: `totals` [tokens, outputs of a line].
template <class F, int tokens>
inline void line_of_part(
    const std::uint8_t* data, int64_t group_bytes, int64_t scale_bytes, int64_t row_bytes, int64_t which, int64_t part,
    const Quads& quads, const Levels& levels, const Integers& in, int64_t t, int m0, float* totals, int64_t stride) {
  constexpr int outputs = 4 * F::line_quads;  // vectors of a line's outputs, for each of `parts` pieces of it
  const int64_t groups = in.groups(), first = part * F::part_groups;
  for (int piece = 0; piece < parts; ++piece) {
    vfloat part_totals[tokens * outputs] = {};
    for (int g = 0; g < F::part_groups && first + g < groups; ++g) {
      const std::uint8_t* group = data + (first + g) * group_bytes;
      const std::uint8_t* rows = group + scale_bytes + which * line + piece * vector_bytes;
      const int64_t base = (first + g) * F::group;
      vint sums[tokens * outputs];
#pragma GCC unroll 4
      for (int m = 0; m < tokens; ++m)
        for (int v = 0; v < outputs; ++v) sums[m * outputs + v] = start(in, t + m, first + g);
      for (int q = quads.end[g]; q < quads.end[g + 1]; ++q) {
        vbytes stored[4], mixed[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) stored[n] = load_bytes(rows + (quads.rows[4 * q + n] - base) * row_bytes);
        interleave(stored, mixed);
#pragma GCC unroll 8
        for (int v = 0; v < outputs; ++v) {
          vbytes weights = mixed[v % 4];
          if constexpr (F::bits == 4) weights = levels(v < 4 ? low_codes(weights) : high_codes(weights));
          weights = weights_of(weights);
#pragma GCC unroll 4
          for (int m = 0; m < tokens; ++m)
            sums[m * outputs + v] = dot4(sums[m * outputs + v], weights, quads.x[m0 + m][q]);
        }
      }
      const float16* scales = scales_at(group) + which * line * F::line_quads + piece * lanes;
#pragma GCC unroll 8
      for (int v = 0; v < outputs; ++v) {
        const vfloat scale = load(scales + v * panel);
#pragma GCC unroll 4
        for (int m = 0; m < tokens; ++m)
          part_totals[m * outputs + v] +=
              to_floats(sums[m * outputs + v]) * (scale * splat(in.scales[(t + m) * groups + first + g]));
      }
    }
    for (int m = 0; m < tokens; ++m)
      for (int v = 0; v < outputs; ++v) {
        float* to = totals + m * stride + v * panel + piece * lanes;
        store(to, load(to) + part_totals[m * outputs + v]);
      }
  }
}

template <class F, int tokens>
inline void some_tokens_of_part(
    const std::uint8_t* data, int64_t group_bytes, int64_t scale_bytes, int64_t row_bytes, int64_t which, int64_t part,
    const Quads& quads, const Levels& levels, const Integers& in, int64_t t, int m, int count, float* totals,
    int64_t stride) {
  if (count >= tokens)
    line_of_part<F, tokens>(
        data, group_bytes, scale_bytes, row_bytes, which, part, quads, levels, in, t, m, totals, stride);
  else if constexpr (tokens > 1)
    some_tokens_of_part<F, tokens - 1>(
        data, group_bytes, scale_bytes, row_bytes, which, part, quads, levels, in, t, m, count, totals, stride);
}

// Asks for the rows of a part in the order of memory.
template <class F>
void ask(const std::uint8_t* data, const Packing& packing, const Matrix& w, int64_t part, const Quads& quads) {
  const int64_t row_bytes = packing.lines(w.out) * line, scale_bytes = packing.column_scales(w.out) * 2;
  for (int g = 0; g < F::part_groups && part * F::part_groups + g < packing.groups(w.in); ++g) {
    const int64_t group = part * F::part_groups + g;
    const std::uint8_t* at = data + group * packing.group_bytes(w.out);
    for (int64_t b = 0; b < scale_bytes; b += line) __builtin_prefetch(at + b, 0, 2);
    for (int n = 4 * quads.end[g]; n < 4 * quads.end[g + 1]; ++n) {
      const std::uint8_t* row = at + scale_bytes + (quads.rows[n] - group * F::group) * row_bytes;
      for (int64_t b = 0; b < row_bytes; b += line) __builtin_prefetch(row + b, 0, 2);
    }
  }
}

template <class F>
void few_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  constexpr int at_once = F::bits == 8 ? row_tokens : code_row_tokens;
  const Packing packing{F::bits, F::group};
  const int64_t row_bytes = packing.lines(w.out) * line, scale_bytes = packing.column_scales(w.out) * 2;
  const int64_t width = packing.outputs_of_line(), first_line = begin / width, last_line = (end + width - 1) / width;
  const int64_t stride = (last_line - first_line) * width;
  const auto* data = static_cast<const std::uint8_t*>(w.data);
  const Levels levels(levels_of(w));
  float* totals = scratch(static_cast<std::size_t>(p.tokens * stride));
  std::fill_n(totals, p.tokens * stride, 0.0f);
  const int64_t first = p.part_stride ? p.part_begin : 0;
  const int64_t last = p.part_stride ? p.part_end : (w.in + part_inputs - 1) / part_inputs;
  int64_t place = p.active ? std::lower_bound(p.active, p.active + p.active_count, first * part_inputs) - p.active
                           : first * part_inputs;
  const auto give = [&](float* y) {
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int64_t o = begin; o < end; ++o) {
        const float total = totals[t * stride + o - first_line * width];
        float* to = y + t * p.y_stride + o;
        *to = p.add ? *to + total : total;
      }
  };
  Quads quads;
  for (int64_t part = first; part < last; ++part) {
    place = quads.fill<F>(w, p, part, 0, static_cast<int>(p.tokens), place);
    ask<F>(data, packing, w, part, quads);
    for (int64_t i = first_line; i < last_line; ++i)
      for (int m = 0; m < p.tokens; m += at_once)
        some_tokens_of_part<F, at_once>(
            data, packing.group_bytes(w.out), scale_bytes, row_bytes, i, part, quads, levels, p.integers, m, m,
            static_cast<int>(p.tokens) - m, totals + m * stride + (i - first_line) * width, stride);
    if (p.part_stride) {
      give(p.y + part * p.part_stride);
      std::fill_n(totals, p.tokens * stride, 0.0f);
    }
  }
  if (!p.part_stride) give(p.y);
}

// Lines of the columns are turned into panels of numbers.
template <class F>
void many_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const Packing packing{F::bits, F::group};
  const int64_t row_bytes = packing.lines(w.out) * line, scale_count = packing.column_scales(w.out);
  const int64_t width = packing.outputs_of_line(), groups = packing.groups(w.in);
  const int64_t panel_bytes = groups * F::group * panel;
  const auto* data = static_cast<const std::uint8_t*>(w.data);
  const Levels levels(levels_of(w));
  auto* numbers = reinterpret_cast<std::uint8_t*>(scratch(static_cast<std::size_t>(panel_bytes * width / panel / 4)));
  for (int64_t i = begin / width; i * width < end; ++i) {
    for (int64_t g = 0; g < groups; ++g) {
      const std::uint8_t* rows = data + g * packing.group_bytes(w.out) + scale_count * 2 + i * line;
      for (int q = 0; q < F::quads; ++q)
        for (int piece = 0; piece < parts; ++piece) {
          vbytes stored[4], mixed[4];
          for (int n = 0; n < 4; ++n) stored[n] = load_bytes(rows + (4 * q + n) * row_bytes + piece * vector_bytes);
          interleave(stored, mixed);
          for (int v = 0; v < 4 * F::line_quads; ++v) {
            vbytes weights = mixed[v % 4];
            if constexpr (F::bits == 4) weights = levels(v < 4 ? low_codes(weights) : high_codes(weights));
            store_bytes(numbers + v * panel_bytes + (g * F::quads + q) * line + piece * vector_bytes, weights);
          }
        }
    }
    for (int v = 0; v < 4 * F::line_quads; ++v) {
      const int64_t o = i * width + v * panel;
      const int64_t first = std::max<int64_t>(begin - o, 0), last = std::min<int64_t>(end - o, panel);
      if (first >= last) continue;
      const Panel from{numbers + v * panel_bytes, scales_at(data) + o, packing.group_bytes(w.out) / 2};
      tiles<Packed<8, F::group>>(from, levels, p, p.y + o, first, last);
    }
  }
}

template <class F>
void by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  if (p.tokens <= most_few_tokens)
    few_tokens_by_columns<F>(w, p, begin, end);
  else
    many_tokens_by_columns<F>(w, p, begin, end);
}

// Numbers of one group; gives their scale and sum. What is not finite makes the scale so.
struct Scaled {
  float scale;
  std::int32_t sum;
};

inline Scaled scaled(const float* x, int64_t count, int64_t group, std::int8_t* values) {
  vint largest{};
  sweep(count, [&](int64_t j, auto part) {
    const vint size = (vint)load(x + j, part) & 0x7fffffff;  // ordered as the numbers are, NaN above all
    largest = size > largest ? size : largest;
  });
  std::int32_t bits = 0;
  for (int lane = 0; lane < lanes; ++lane) bits = std::max<std::int32_t>(bits, largest[lane]);
  float size;
  std::memcpy(&size, &bits, sizeof size);
  const float inverse = size > 1e-30f && size <= 3.4028235e38f ? 127.0f / size : 0.0f;
  typedef std::int8_t vnarrow __attribute__((vector_size(lanes)));
  vint sums{};
  sweep(count, [&](int64_t j, auto part) {
    // adding 1.5 · 2^23 leaves the nearest integer, ties to even, in the low bits
    const vfloat number = load(x + j, part);
    vint whole = (vint)(number * inverse + 12582912.0f) - 0x4b400000;
    whole = inverse != 0 ? whole : vint{};
    sums += whole;
    const vnarrow narrow = __builtin_convertvector(whole, vnarrow);
    if constexpr (std::is_same_v<decltype(part), Whole>)
      std::memcpy(values + j, &narrow, sizeof narrow);
    else
      std::memcpy(values + j, &narrow, part.count);
  });
  std::fill(values + count, values + group, std::int8_t{0});
  std::int32_t total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += sums[lane];
  return {size > 1e-30f ? size / 127.0f : size != size ? size : 0.0f, total};
}

}  // namespace

void quantise(
    const float* x, int64_t x_stride, int64_t first, int64_t last, int64_t begin, int64_t end, const Integers& out) {
  const int64_t groups = out.groups();
  for (int64_t t = begin; t < end; ++t)
    for (int64_t i = first; i < last; i += out.group) {
      const int64_t g = i / out.group;
      const Scaled result =
          scaled(x + t * x_stride + i, std::min(out.group, last - i), out.group, out.values + t * out.stride + i);
      out.scales[t * groups + g] = result.scale;
      out.balance[t * groups + g] = -128 * result.sum;
    }
}

void row(const Matrix& w, int64_t output, float* weights) {
  const Packing how = packing(w.format);
  const auto* at = static_cast<const std::uint8_t*>(w.data) + output / panel * how.panel_bytes(w.in);
  const std::uint8_t* data = at + how.panel_scale_bytes(w.in);
  const auto& levels = levels_of(w);
  const int64_t lane = output % panel;
  for (int64_t g = 0; g < how.groups(w.in); ++g) {
    const float scale = load(scales_at(at) + g * panel + lane / lanes * lanes)[lane % lanes];
    for (int64_t i = g * how.group; i < std::min(w.in, (g + 1) * how.group); ++i) {
      const int64_t q = i / 4;
      if (how.bits == 8) {
        weights[i] = scale * static_cast<float>(data[q * line + 4 * lane + i % 4] - 128);
      } else {
        const std::uint8_t both = data[q / 2 * line + 4 * lane + i % 4];
        weights[i] = scale * static_cast<float>(levels[q % 2 ? both >> 4 : both & 15]);
      }
    }
  }
}

#define ROOKERY_INTEGER_PRODUCTS(NAME, BITS, GROUP)                                               \
  void NAME##_by_rows(const Matrix& w, const Product& p, std::int64_t begin, std::int64_t end) {    \
    by_rows<Packed<BITS, GROUP>>(w, p, begin, end);                                                 \
  }                                                                                                 \
  void NAME##_by_columns(const Matrix& w, const Product& p, std::int64_t begin, std::int64_t end) { \
    by_columns<Packed<BITS, GROUP>>(w, p, begin, end);                                              \
  }
ROOKERY_INTEGER_PRODUCTS(int8, 8, 64)
ROOKERY_INTEGER_PRODUCTS(q8_0, 8, 32)
ROOKERY_INTEGER_PRODUCTS(int4, 4, 32)

}  // namespace ROOKERY_ISA
}  // namespace rookery
