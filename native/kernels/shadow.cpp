#include "kernels/shadow.hpp"

#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int abreast = 16;             // sums of a row, whatever the width of the vectors
constexpr int vectors = abreast / lanes;

// Sixteen bits, one a lane, keep or drop the numbers of x that lie there.
void sums(const Shadow& shadow, const float* x, float* out, int64_t begin, int64_t end) {
  vint bit[vectors];
  for (int v = 0; v < vectors; ++v)
    for (int lane = 0; lane < lanes; ++lane) bit[v][lane] = 1 << (v * lanes + lane);
  const int64_t line = shadow.line();
  for (int64_t row = begin; row < end; ++row) {
    float result = 0;
    for (int64_t plane = shadow.planes - 1; plane >= 0; --plane) {
      const std::uint8_t* bits = shadow.bits + (plane * shadow.rows + row) * line;
      vfloat total[vectors] = {};
      for (int64_t i = 0; i < line; i += 2) {
        const std::int32_t word = bits[i] | (i + 1 < line ? bits[i + 1] << 8 : 0);
        const vint here = word - vint{};
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const vint kept = (here & bit[v]) != 0;
          total[v] += (vfloat)((vint)load(x + 8 * i + v * lanes) & kept);
        }
      }
      float lane_sums[abreast];
      for (int v = 0; v < vectors; ++v) store(lane_sums + v * lanes, total[v]);
      for (int half = abreast / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane_sums[i] += lane_sums[i + half];
      result = 2 * result + lane_sums[0];
    }
    out[row] = result;
  }
}

void column(const Matrix& w, int64_t input, int64_t begin, int64_t end, float* weights) {
  const Packing how = packing(w.format);
  constexpr int64_t line = Packing::line;
  const auto* group = static_cast<const std::uint8_t*>(w.data) + input / how.group * how.group_bytes(w.out);
  const auto* scales = reinterpret_cast<const float16*>(group);
  const std::uint8_t* row =
      group + how.column_scales(w.out) * 2 + input % how.group * how.lines(w.out) * line;
  // byte 16 l + 4 v + e of a line is output 16 v + 4 l + e
  for (int64_t o = begin; o < end; o += line) {
    float numbers[line], wide[line];
    for (int64_t l = 0; l < 4; ++l)
      for (int64_t v = 0; v < 4; ++v)
        for (int64_t e = 0; e < 4; ++e)
          numbers[16 * v + 4 * l + e] = static_cast<float>(row[o + 16 * l + 4 * v + e] - 128);
    for (int64_t i = 0; i < line; i += lanes) store(wide + i, load(numbers + i) * load(scales + o + i));
    for (int64_t i = 0; i < line && o + i < end; ++i) weights[o - begin + i] = wide[i];
  }
}

}  // namespace
}  // namespace ROOKERY_ISA

const ShadowKernels ROOKERY_ISA::shadow{sums, column};

}  // namespace rookery
