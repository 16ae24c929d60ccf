// Every weight is widened to float32, so all formats of one order share their arithmetic.
#include "kernels/product.hpp"

#include <algorithm>

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int together = 4;                              // rows that are read at once
constexpr int tile_tokens = lanes > 8 ? lanes / 4 : 2;   // tokens whose sums fit the registers beside them
constexpr int64_t near = 96 * 1024;                      // floats of x that stay in the second-level cache
constexpr int line = 64;

template <class T>
const T* weights(const Matrix& w) {
  return static_cast<const T*>(w.data);
}

// ---- rows: lanes run over inputs, one sum of vectors an output, added up across lanes at the end

// sums[i] = lane-wise sums of row i times x, for `together` rows. Asks for the rows after them before they are needed:
// a row is too short for the hardware to follow it by itself.
template <class T>
inline void dots(const T* const* row, const float* x, int64_t in, int64_t ahead, vfloat* sums) {
  constexpr int64_t step = line / sizeof(T);
  vfloat total[together] = {};
  int64_t k = 0;
  for (; k + step <= in; k += step) {
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) __builtin_prefetch(row[i] + ahead + k, 0, 3);
#pragma GCC unroll 8
    for (int64_t m = 0; m < step; m += lanes) {
      const vfloat xk = load(x + k + m);
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) total[i] += load(row[i] + k + m) * xk;
    }
  }
  sweep(in - k, [&](int64_t j, auto part) {
    const vfloat xk = load(x + k + j, part);
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) total[i] += load(row[i] + k + j, part) * xk;
  });
  for (int i = 0; i < together; ++i) sums[i] = total[i];
}

template <class... P>
inline void put(float* y, vfloat value, bool add, P... part) {
  store(y, add ? load(y, part...) + value : value, part...);
}

template <class T>
void one_token_by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const T* first = weights<T>(w);
  for (int64_t o = begin; o < end; o += lanes) {
    vfloat totals[lanes];
    for (int g = 0; g < lanes; g += together) {
      const T* row[together];
      for (int i = 0; i < together; ++i) row[i] = first + std::min(o + g + i, end - 1) * w.in;
      dots(row, p.x, w.in, together * w.in, totals + g);
    }
    const vfloat result = sums(totals);
    if (o + lanes <= end)
      put(p.y + o, result, p.add, Whole{});
    else
      put(p.y + o, result, p.add, Part{static_cast<std::size_t>(end - o)});
  }
}

// Widens `together` rows into `panel` [inputs / lanes, together, lanes], zeros after the last input.
template <class T>
void widen_rows(const Matrix& w, int64_t o, int64_t end, float* panel) {
  const T* row[together];
  for (int i = 0; i < together; ++i) row[i] = weights<T>(w) + std::min(o + i, end - 1) * w.in;
  sweep(w.in, [&](int64_t k, auto part) {
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) {
      if (k % (line / static_cast<int>(sizeof(T))) == 0) __builtin_prefetch(row[i] + k + together * w.in, 0, 3);
      store(panel + (k * together + i * lanes), load(row[i] + k, part));
    }
  });
}

// `together` outputs of `tokens` tokens. The additions are those of `dots`.
template <int tokens>
inline void tile_by_rows(const float* panel, const Product& p, int64_t in, int64_t t, int64_t o, int64_t outputs) {
  vfloat total[tokens * together] = {};
  const float* x = p.x + t * p.x_stride;
  sweep(in, [&](int64_t k, auto part) {
    vfloat weight[together];
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) weight[i] = load(panel + k * together + i * lanes);
#pragma GCC unroll 4
    for (int m = 0; m < tokens; ++m) {
      const vfloat xk = load(x + m * p.x_stride + k, part);
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) total[m * together + i] += weight[i] * xk;
    }
  });
  float results[(tokens * together + lanes - 1) / lanes * lanes];
  for (int n = 0; n < tokens * together; n += lanes) {
    vfloat some[lanes] = {};
    for (int i = 0; i < lanes && n + i < tokens * together; ++i) some[i] = total[n + i];
    store(results + n, sums(some));
  }
  for (int m = 0; m < tokens; ++m)
    for (int64_t i = 0; i < outputs; ++i) {
      float* y = p.y + (t + m) * p.y_stride + o + i;
      *y = p.add ? *y + results[m * together + i] : results[m * together + i];
    }
}

template <int tokens = tile_tokens>
inline void last_tile_by_rows(
    const float* panel, const Product& p, int64_t in, int64_t t, int64_t o, int64_t outputs, int64_t left) {
  if (left == tokens)
    tile_by_rows<tokens>(panel, p, in, t, o, outputs);
  else if constexpr (tokens > 1)
    last_tile_by_rows<tokens - 1>(panel, p, in, t, o, outputs, left);
}

template <class T>
void many_tokens_by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  float* panel = scratch(static_cast<std::size_t>((w.in + lanes) * together));
  const int64_t block = std::max<int64_t>(2, near / std::max<int64_t>(1, w.in) / tile_tokens) * tile_tokens;
  for (int64_t from = 0; from < p.tokens; from += block) {
    const int64_t to = std::min(p.tokens, from + block);
    for (int64_t o = begin; o < end; o += together) {
      const int64_t outputs = std::min<int64_t>(together, end - o);
      widen_rows<T>(w, o, end, panel);
      int64_t t = from;
      for (; t + tile_tokens <= to; t += tile_tokens) tile_by_rows<tile_tokens>(panel, p, w.in, t, o, outputs);
      if (t < to) last_tile_by_rows(panel, p, w.in, t, o, outputs, to - t);
    }
  }
}

template <class T>
void by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  (p.tokens == 1 ? one_token_by_rows<T> : many_tokens_by_rows<T>)(w, p, begin, end);
}

// ---- columns: lanes run over outputs, which every input is added to in turn

constexpr int abreast = 8;       // inputs whose columns are read at once
constexpr int64_t block_in = 64; // inputs whose columns are widened at once
constexpr int strip = lanes > 8 ? 4 : 2;  // vectors of outputs held in registers
constexpr int strip_tokens = lanes > 8 ? 6 : 4;

struct Inputs {
  const std::int32_t* active;
  int64_t count;
  int64_t operator[](int64_t i) const { return active ? active[i] : i; }
};

inline Inputs inputs(const Matrix& w, const Product& p) { return {p.active, p.active ? p.active_count : w.in}; }

// sums += columns i … i + n − 1 of the list, one after the other.
template <class T, int n>
inline void add_columns(
    const Matrix& w, const Product& p, const Inputs& list, int64_t i, int64_t begin, int64_t count, float* sums) {
  const T *column[n], *later[n];
  float x[n];
#pragma GCC unroll 8
  for (int m = 0; m < n; ++m) {
    column[m] = weights<T>(w) + list[i + m] * w.out + begin;
    later[m] = weights<T>(w) + list[std::min(i + m + abreast, list.count - 1)] * w.out + begin;
    x[m] = p.x[list[i + m]];
  }
  sweep(count, [&](int64_t j, auto part) {
    vfloat total = load(sums + j);
#pragma GCC unroll 8
    for (int m = 0; m < n; ++m) {
      if (j % (line / static_cast<int>(sizeof(T))) == 0) __builtin_prefetch(later[m] + j, 0, 3);
      total += load(column[m] + j, part) * x[m];
    }
    store(sums + j, total);
  });
}

template <class T>
void one_token_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const Inputs list = inputs(w, p);
  const int64_t count = end - begin;
  float* sums = scratch(static_cast<std::size_t>(count + lanes));
  std::fill_n(sums, count + lanes, 0.0f);
  int64_t i = 0;
  for (; i + abreast <= list.count; i += abreast) add_columns<T, abreast>(w, p, list, i, begin, count, sums);
  for (; i < list.count; ++i) add_columns<T, 1>(w, p, list, i, begin, count, sums);
  sweep(count, [&](int64_t j, auto part) { put(p.y + begin + j, load(sums + j, part), p.add, part); });
}

// One strip of outputs of `tokens` tokens: adds the inputs whose columns are in `panel` [inputs, strip · lanes].
template <int tokens>
inline void tile_by_columns(
    const float* panel, const Product& p, const Inputs& list, int64_t i, int64_t count, int64_t t, float* sums) {
  constexpr int64_t width = strip * lanes;
  vfloat total[tokens * strip];
  for (int n = 0; n < tokens * strip; ++n) total[n] = load(sums + t * width + n * lanes);
  const float* x = p.x + t * p.x_stride;
  for (int64_t k = 0; k < count; ++k, panel += width) {
    const int64_t input = list[i + k];
    vfloat weight[strip];
#pragma GCC unroll 4
    for (int n = 0; n < strip; ++n) weight[n] = load(panel + n * lanes);
#pragma GCC unroll 6
    for (int m = 0; m < tokens; ++m) {
      const vfloat xk = splat(x[m * p.x_stride + input]);
#pragma GCC unroll 4
      for (int n = 0; n < strip; ++n) total[m * strip + n] += weight[n] * xk;
    }
  }
  for (int n = 0; n < tokens * strip; ++n) store(sums + t * width + n * lanes, total[n]);
}

template <int tokens = strip_tokens>
inline void last_tile_by_columns(
    const float* panel, const Product& p, const Inputs& list, int64_t i, int64_t count, int64_t t, float* sums) {
  if (p.tokens - t == tokens)
    tile_by_columns<tokens>(panel, p, list, i, count, t, sums);
  else if constexpr (tokens > 1)
    last_tile_by_columns<tokens - 1>(panel, p, list, i, count, t, sums);
}

template <class T>
void many_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t width = strip * lanes;
  const Inputs list = inputs(w, p);
  float* panel = scratch(static_cast<std::size_t>((block_in + p.tokens) * width));
  float* sums = panel + block_in * width;
  for (int64_t o = begin; o < end; o += width) {
    const int64_t outputs = std::min(width, end - o);
    std::fill_n(sums, p.tokens * width, 0.0f);
    for (int64_t i = 0; i < list.count; i += block_in) {
      const int64_t count = std::min(block_in, list.count - i);
      for (int64_t k = 0; k < count; ++k) {
        const T* column = weights<T>(w) + list[i + k] * w.out + o;
        float* wide = panel + k * width;
        sweep(outputs, [&](int64_t j, auto part) { store(wide + j, load(column + j, part)); });
      }
      int64_t t = 0;
      for (; t + strip_tokens <= p.tokens; t += strip_tokens)
        tile_by_columns<strip_tokens>(panel, p, list, i, count, t, sums);
      if (t < p.tokens) last_tile_by_columns(panel, p, list, i, count, t, sums);
    }
    for (int64_t t = 0; t < p.tokens; ++t)
      sweep(outputs, [&](int64_t j, auto part) {
        put(p.y + t * p.y_stride + o + j, load(sums + t * width + j, part), p.add, part);
      });
  }
}

template <class T>
void by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  (p.tokens == 1 ? one_token_by_columns<T> : many_tokens_by_columns<T>)(w, p, begin, end);
}

}  // namespace
}  // namespace ROOKERY_ISA

const ProductKernels ROOKERY_ISA::product{
    {{by_rows<float>, by_rows<std::uint16_t>, by_rows<float16>},
     {by_columns<float>, by_columns<std::uint16_t>, by_columns<float16>}}};

}  // namespace rookery
