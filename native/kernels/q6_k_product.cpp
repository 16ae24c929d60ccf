// Compiled without fused multiply-adds, so that every instruction set rounds alike.
#include "kernels/q6_k_product.hpp"

#include <algorithm>

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "kernels/bytes.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int panel = Packing::panel, line = Packing::line;
constexpr int parts = panel / lanes;            // vectors of sums of a panel
constexpr int together = 4;                     // tokens whose sums fit the registers
constexpr Packing how = rookery::packing(Format::q6_k);
constexpr int64_t group = how.group, runs = group / how.run, part_groups = part_inputs / how.group;
constexpr int run_quads = static_cast<int>(how.run) / 4, run_lines = 3;

// A panel's parts.
struct Panel {
  const float16* scales;          // [blocks, outputs]
  const std::int8_t* run_scales;  // [runs, outputs]
  const std::uint8_t* lines;      // [runs, 3, 64]: low halves of two times four inputs, twice; then four times two bits

  Panel(const Matrix& w, int64_t output) {
    const auto* at = static_cast<const std::uint8_t*>(w.data) + output / panel * how.panel_bytes(w.in);
    scales = reinterpret_cast<const float16*>(at);
    run_scales = reinterpret_cast<const std::int8_t*>(at) + w.in / how.block * panel * 2;
    lines = at + how.panel_scale_bytes(w.in);
  }
};

// The codes of a run, 0 to 63, in lines of four inputs; or, where the products take signed bytes, the numbers -32 to 31.
inline void unpack_run(const std::uint8_t* from, std::uint8_t* to) {
  typedef std::uint16_t vpairs __attribute__((vector_size(ROOKERY_VECTOR_BYTES)));
  for (int part = 0; part < line; part += vector_bytes) {
    const vbytes high = load_bytes(from + 2 * line + part);
    for (int q = 0; q < run_quads; ++q) {
      const vbytes both = load_bytes(from + q / 2 * line + part);
      const vbytes low = (q % 2 ? (vbytes)((vpairs)both >> 4) : both) & 15;
      const vbytes codes = low | ((vbytes)(q < 2 ? (vpairs)high << (4 - 2 * q) : (vpairs)high >> (2 * q - 4)) & 48);
      store_bytes(to + q * line + part, is_balanced ? codes : codes - 32);
    }
  }
}

// Adds a group of `tokens` tokens to their sums of a part [tokens, panel]. `codes` has the group's runs, `balance`
// [tokens, runs] -32 times the sums of their inputs.
template <int tokens>
inline void add_group(
    const Panel& from, const std::uint8_t* codes, const Integers& in, const std::int32_t* balance, int64_t balance_stride,
    int64_t t, int64_t g, float* sums) {
  vint totals[tokens * parts] = {};
  for (int64_t r = 0; r < runs; ++r) {
    vint dots[tokens * parts];
    for (int m = 0; m < tokens; ++m)
      for (int i = 0; i < parts; ++i)
        dots[m * parts + i] = (is_balanced ? balance[m * balance_stride + g * runs + r] : 0) - vint{};
#pragma GCC unroll 4
    for (int q = 0; q < run_quads; ++q)
#pragma GCC unroll 4
      for (int i = 0; i < parts; ++i) {
        const vbytes weights = load_bytes(codes + (r * run_quads + q) * line + i * vector_bytes);
#pragma GCC unroll 4
        for (int m = 0; m < tokens; ++m) {
          std::int32_t x;
          std::memcpy(&x, in.values + (t + m) * in.stride + g * group + r * how.run + 4 * q, sizeof x);
          dots[m * parts + i] = dot4(dots[m * parts + i], weights, x);
        }
      }
    for (int i = 0; i < parts; ++i) {
      typedef std::int8_t vnarrow __attribute__((vector_size(lanes)));
      vnarrow scales;
      std::memcpy(&scales, from.run_scales + (g * runs + r) * panel + i * lanes, sizeof scales);
      const vint scale = __builtin_convertvector(scales, vint);
      for (int m = 0; m < tokens; ++m) totals[m * parts + i] += dots[m * parts + i] * scale;
    }
  }
  for (int m = 0; m < tokens; ++m)
    for (int i = 0; i < parts; ++i) {
      const vfloat scale = load(from.scales + g * group / how.block * panel + i * lanes);
      const vfloat total = __builtin_convertvector(totals[m * parts + i], vfloat);
      float* to = sums + m * panel + i * lanes;
      store(to, load(to) + total * (scale * splat(in.scales[(t + m) * in.groups() + g])));
    }
}

// -32 times the sum of every run's inputs: [tokens, runs].
void fill_balance(const Integers& in, int64_t tokens, std::int32_t* balance) {
  for (int64_t i = 0; i < tokens * in.stride / how.run; ++i) {
    std::int32_t sum = 0;
    for (int64_t j = 0; j < how.run; ++j) sum += in.values[i * how.run + j];
    balance[i] = -32 * sum;
  }
}

}  // namespace

void q6_k_by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const Integers in = p.integers;
  const int64_t groups = in.groups(), size = p.tokens * panel, stride = in.stride / how.run;
  float* totals = scratch(static_cast<std::size_t>(2 * size + p.tokens * stride));
  float* sums = totals + size;
  auto* balance = reinterpret_cast<std::int32_t*>(sums + size);
  if (is_balanced) fill_balance(in, p.tokens, balance);
  for (int64_t o = begin / panel * panel; o < end; o += panel) {
    const Panel from(w, o);
    std::fill_n(totals, size, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      if (g % part_groups == 0) std::fill_n(sums, size, 0.0f);
      alignas(64) std::uint8_t codes[group * panel];
      for (int64_t r = 0; r < runs; ++r) {
        const std::uint8_t* at = from.lines + (g * runs + r) * run_lines * line;
        for (int i = 0; i < run_lines; ++i) __builtin_prefetch(at + 8192 + i * line, 0, 2);
        unpack_run(at, codes + r * run_quads * line);
      }
      int64_t t = 0;
      for (; t + together <= p.tokens; t += together)
        add_group<together>(from, codes, in, balance + t * stride, stride, t, g, sums + t * panel);
      for (; t < p.tokens; ++t) add_group<1>(from, codes, in, balance + t * stride, stride, t, g, sums + t * panel);
      if ((g + 1) % part_groups == 0 || g + 1 == groups)
        for (int64_t i = 0; i < size; i += lanes) store(totals + i, load(totals + i) + load(sums + i));
    }
    for (int64_t t = 0; t < p.tokens; ++t)
      for (int i = 0; i < panel; i += lanes)
        give(p.y + t * p.y_stride + o + i, load(totals + t * panel + i), p.add, begin - o - i, end - o - i);
  }
}

void q6_k_row(const Matrix& w, int64_t output, float* weights) {
  const Panel from(w, output);
  const int64_t lane = output % panel;
  for (int64_t i = 0; i < w.in; ++i) {
    const int64_t run = i / how.run, q = i % how.run / 4, place = 4 * lane + i % 4;
    const std::uint8_t* at = from.lines + run * run_lines * line + place;
    const int low = q % 2 ? at[q / 2 * line] >> 4 : at[q / 2 * line] & 15, high = at[2 * line] >> (2 * q) & 3;
    const float scale = load(from.scales + i / how.block * panel + lane / lanes * lanes)[lane % lanes];
    weights[i] = scale * static_cast<float>(from.run_scales[run * panel + lane]) * static_cast<float>((low | high << 4) - 32);
  }
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
