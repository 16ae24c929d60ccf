// Compiled without fused multiply-adds, so that every instruction set rounds alike.
#include "kernels/integer_product.hpp"

#include <algorithm>
#include <cmath>
#include <optional>

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "kernels/bytes.hpp"
#include "kernels/q6_k_product.hpp"
#if defined(ROOKERY_TILES)
#include "kernels/tile_integers.hpp"
#endif

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int panel = Packing::panel, line = Packing::line;
constexpr int parts = panel / lanes;                   // vectors of sums of a panel
constexpr int tile_tokens = lanes > 8 ? 12 : 4;        // tokens whose sums fit the registers
constexpr int most_few_tokens = lanes > 8 ? 8 : 4;     // as `ProductKernels::few_tokens` at least

template <int bits_, int group_>
struct Packed {
  static constexpr int bits = bits_, group = group_;
  static constexpr int quads = group / 4;            // lines of four inputs each
  static constexpr int line_quads = 8 / bits;        // of them in a line
  // Bytes that are asked for before they are used: with 8 bits the hardware follows the panels by itself and needs help
  // from page to page alone; further requests are in its way.
  static constexpr int ahead = (bits == 8 ? 4 : 16) * 1024 + 64;
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

// What a group's sums begin with.
inline vint start(const std::int32_t* balance) { return to_ints(is_balanced ? *balance : 0); }

// Adds the tokens' dot products of a group's inputs to `sums` [tokens, parts].
template <class F, int tokens, bool asks>
[[gnu::always_inline]] inline void group_of_panel(
    const std::uint8_t* data, const std::int8_t* const* x, const Levels& levels, vint* sums) {
#pragma GCC unroll 16
  for (int q = 0; q < F::quads; q += F::line_quads) {
    const std::uint8_t* at = data + q / F::line_quads * line;
    if (asks) __builtin_prefetch(at + F::ahead, 0, 2);
#pragma GCC unroll 4
    for (int part = 0; part < parts; ++part) {
      const vbytes stored = load_bytes(at + part * vector_bytes);
#pragma GCC unroll 2
      for (int half = 0; half < F::line_quads; ++half) {
        vbytes weights = stored;
        if constexpr (F::bits == 4) weights = levels(half ? high_codes(stored) : stored);
        weights = weights_of(weights);
#pragma GCC unroll 12
        for (int m = 0; m < tokens; ++m) {
          vint& sum = sums[m * parts + part];
          sum = dot4(sum, weights, quad(x[m] + 4 * (q + half)));
        }
      }
    }
  }
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
  const Integers in = p.integers;  // a copy, which stores to results cannot change
  const int64_t groups = in.groups();
  const float* const x_scales = in.scales + t * groups;
  const std::int32_t* const balance = in.balance + t * groups;
  const std::int8_t* x[tokens];
  for (int m = 0; m < tokens; ++m) x[m] = in.values + (t + m) * in.stride;
  vfloat totals[tokens * parts] = {}, part_totals[tokens * parts];
  const auto add_group = [&](int64_t g) [[gnu::always_inline]] {
    vint sums[tokens * parts];
#pragma GCC unroll 12
    for (int m = 0; m < tokens; ++m)
      for (int i = 0; i < parts; ++i) sums[m * parts + i] = start(balance + m * groups + g);
    group_of_panel<F, tokens, asks>(from.data + g * (F::group * panel * F::bits / 8), x, levels, sums);
    vfloat scale[parts];
    for (int i = 0; i < parts; ++i) scale[i] = load(from.scales + g * from.scale_stride + i * lanes);
#pragma GCC unroll 12
    for (int m = 0; m < tokens; ++m) {
      const vfloat of_x = splat(x_scales[m * groups + g]);
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i)
        part_totals[m * parts + i] += to_floats(sums[m * parts + i]) * (scale[i] * of_x);
      x[m] += F::group;
    }
  };
  for (int64_t g = 0; g < groups;) {
    for (vfloat& total : part_totals) total = vfloat{};
    for (const int64_t stop = std::min(groups, g + F::part_groups); g < stop; ++g) add_group(g);
#pragma GCC unroll 12
    for (int i = 0; i < tokens * parts; ++i) totals[i] += part_totals[i];
  }
  for (int m = 0; m < tokens; ++m)
    for (int i = 0; i < parts; ++i)
      give(y + (t + m) * p.y_stride + i * lanes, totals[m * parts + i], p.add, first - i * lanes, last - i * lanes);
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
#if defined(ROOKERY_TILES)
  if constexpr (F::bits == 8)
    if (p.tokens >= tile_rows)
      return panel_by_tiles<F::group>(from.data, from.scales, from.scale_stride, p, y, first, last);
#endif
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
      store_bytes(numbers + part, levels(stored));
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
#if defined(ROOKERY_TILES)
  std::optional<Tiles> tiles_of_thread;
  if (p.tokens >= tile_rows) tiles_of_thread.emplace(integer_tiles<F::group>());
#endif
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

// The inputs in use and the tokens' numbers there, four by four; groups are filled up with zeros.
struct Quads {
  std::int32_t* rows;          // [4 × quads]
  std::int32_t* x;             // [tokens, most]
  int64_t most;
  std::int32_t* ends;          // quads up to the end of each group, from 1 on

  // Floats of memory for the inputs of so many groups.
  static int64_t floats(int64_t groups, int64_t group, int64_t tokens) {
    return groups * group * 2 + tokens * (groups * group / 4 + groups) + groups + 1;
  }

  template <class F>
  static Quads make(float* memory, const Matrix& w, const Product& p, int64_t first, int64_t last) {
    Quads quads{};
    quads.fill<F>(memory, w, p, first, last);
    return quads;
  }

  // Of groups `first` … `last` − 1.
  template <class F>
  void fill(float* memory, const Matrix& w, const Product& p, int64_t first, int64_t last) {
    const Integers& in = p.integers;
    most = (last - first) * (F::group / 4 + 1);
    rows = reinterpret_cast<std::int32_t*>(memory);
    x = rows + (last - first) * F::group * 2;
    ends = x + p.tokens * most;
    ends[0] = 0;
    int64_t used = 0;
    int64_t i = p.active ? std::lower_bound(p.active, p.active + p.active_count, first * F::group) - p.active
                         : first * F::group;
    for (int64_t g = first; g < last; ++g) {
      const int64_t begin = used, stop = std::min(w.in, (g + 1) * F::group);
      if (p.active)
        for (; i < p.active_count && p.active[i] < stop; ++i) rows[used++] = p.active[i];
      else
        for (; i < stop; ++i) rows[used++] = static_cast<std::int32_t>(i);
      const int64_t real = used;
      for (; used % 4; ++used) rows[used] = rows[used - 1];
      for (int64_t m = 0; m < p.tokens; ++m) {
        const std::int8_t* values = in.values + m * in.stride;
        auto* bytes = reinterpret_cast<std::int8_t*>(x + m * most);
        for (int64_t n = begin; n < used; ++n) bytes[n] = n < real ? values[rows[n]] : std::int8_t{0};
      }
      ends[g - first + 1] = static_cast<std::int32_t>(used / 4);
    }
  }
};

// Where rows and scales lie.
template <class F>
struct Columns {
  const std::uint8_t* data;
  int64_t group_bytes, scale_bytes, row_bytes, in;

  explicit Columns(const Matrix& w) : data(static_cast<const std::uint8_t*>(w.data)), in(w.in) {
    constexpr Packing packing{F::bits, F::group};
    group_bytes = packing.group_bytes(w.out);
    scale_bytes = packing.column_scales(w.out) * 2;
    row_bytes = packing.lines(w.out) * line;
  }
  const std::uint8_t* row(int64_t i) const {
    return data + i / F::group * group_bytes + scale_bytes + i % F::group * row_bytes;
  }
  const float16* scales(int64_t group) const { return scales_at(data + group * group_bytes); }
};

// Adds lines `first` … `last` − 1 of four rows times the tokens' numbers to `sums` [tokens, stride], which lie in the
// first-level cache; asks for four later rows.
template <class F, int fixed>
inline void add_quad(
    const std::uint8_t* const* rows, const std::uint8_t* const* later, int64_t first, int64_t last,
    const std::int32_t* x, int64_t x_stride, int64_t tokens, const Levels& levels, std::int32_t* sums, int64_t stride) {
  constexpr int vectors = 4 * F::line_quads;
  const int64_t count = fixed ? fixed : tokens;
  for (int64_t i = first; i < last; ++i, sums += line * F::line_quads) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) __builtin_prefetch(later[n] + i * line, 0, 2);
#pragma GCC unroll 4
    for (int piece = 0; piece < parts; ++piece) {
      vbytes stored[4], mixed[4], weights[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) stored[n] = load_bytes(rows[n] + i * line + piece * vector_bytes);
      interleave(stored, mixed);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        vbytes numbers = mixed[v % 4];
        if constexpr (F::bits == 4) numbers = levels(v < 4 ? numbers : high_codes(numbers));
        weights[v] = weights_of(numbers);
      }
      for (int64_t m = 0; m < count; ++m) {
        const std::int32_t four = x[m * x_stride];
        auto* to = reinterpret_cast<float*>(sums + m * stride + piece * lanes);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
          store(to + v * panel, (vfloat)dot4((vint)load(to + v * panel), weights[v], four));
      }
    }
  }
}

// Rows are read whole, one after the other: shorter pieces with gaps between them come at a third of the speed.
template <class F>
void few_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t width = line * F::line_quads;
  const Columns<F> columns(w);
  const Integers& in = p.integers;
  const Levels levels(levels_of(w));
  const int64_t first_line = begin / width, last_line = (end + width - 1) / width;
  const int64_t stride = (last_line - first_line) * width, groups = in.groups();
  const int64_t first_part = p.part_stride ? p.part_begin : 0;
  const int64_t last_part = p.part_stride ? p.part_end : (w.in + part_inputs - 1) / part_inputs;
  const int64_t first = first_part * F::part_groups, last = std::min(groups, last_part * F::part_groups);
  float* memory = scratch(
      static_cast<std::size_t>(3 * p.tokens * stride + Quads::floats(last - first, F::group, p.tokens)));
  float *totals = memory, *part_totals = totals + p.tokens * stride;
  auto* sums = reinterpret_cast<std::int32_t*>(part_totals + p.tokens * stride);
  const Quads quads = Quads::make<F>(part_totals + 2 * p.tokens * stride, w, p, first, last);
  std::fill_n(totals, p.tokens * stride, 0.0f);
  const int64_t all = quads.ends[last - first];
  const int64_t lead = std::max<int64_t>(2, 8 * 1024 / (4 * columns.row_bytes));  // quads that are asked for ahead
  const auto rows_of = [&](int64_t q, const std::uint8_t** rows) {
    for (int n = 0; n < 4; ++n) rows[n] = columns.row(quads.rows[4 * q + n]);
  };
  for (int64_t q = 0; q < std::min(lead, all); ++q) {
    const std::uint8_t* rows[4];
    rows_of(q, rows);
    for (const std::uint8_t* row : rows)
      for (int64_t i = first_line; i < last_line; ++i) __builtin_prefetch(row + i * line, 0, 2);
  }
  const auto give = [&](const float* from, float* y) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      const float* total = from + t * stride - first_line * width;
      float* to = y + t * p.y_stride;
      for (int64_t o = begin; o < end; ++o) to[o] = p.add ? to[o] + total[o] : total[o];
    }
  };
  for (int64_t g = first, q = 0; g < last;) {
    const int64_t part = g / F::part_groups;
    std::fill_n(part_totals, p.tokens * stride, 0.0f);
    for (const int64_t stop = std::min(last, (part + 1) * F::part_groups); g < stop; ++g) {
      for (int64_t t = 0; t < p.tokens; ++t)
        std::fill_n(sums + t * stride, stride, is_balanced ? in.balance[t * groups + g] : 0);
      for (; q < quads.ends[g - first + 1]; ++q) {
        const std::uint8_t *rows[4], *later[4];
        rows_of(q, rows);
        rows_of(std::min(q + lead, all - 1), later);
        const auto add = p.tokens == 1 ? add_quad<F, 1> : add_quad<F, 0>;
        add(rows, later, first_line, last_line, quads.x + q, quads.most, p.tokens, levels, sums, stride);
      }
      const float16* scales = columns.scales(g) + first_line * width;
      for (int64_t t = 0; t < p.tokens; ++t) {
        const vfloat of_x = splat(in.scales[t * groups + g]);
        float* to = part_totals + t * stride;
        const auto* from = reinterpret_cast<const float*>(sums + t * stride);
        for (int64_t o = 0; o < stride; o += lanes)
          store(to + o, load(to + o) + to_floats((vint)load(from + o)) * (load(scales + o) * of_x));
      }
    }
    if (p.part_stride)
      give(part_totals, p.y + part * p.part_stride);
    else
      for (int64_t o = 0; o < p.tokens * stride; o += lanes) store(totals + o, load(totals + o) + load(part_totals + o));
  }
  if (!p.part_stride) give(totals, p.y);
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
#if defined(ROOKERY_TILES)
  std::optional<Tiles> tiles_of_thread;
  if (p.tokens >= tile_rows) tiles_of_thread.emplace(integer_tiles<F::group>());
#endif
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
            if constexpr (F::bits == 4) weights = levels(v < 4 ? weights : high_codes(weights));
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
  if (w.format == Format::q6_k) return q6_k_row(w, output, weights);
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
