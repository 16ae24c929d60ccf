// Products with matrices stored by rows: lanes run over inputs, one sum of vectors an output, added up across lanes at the
// end. Packed matrices are multiplied in integer_product.cpp.
#include "kernels/product.hpp"

#include <algorithm>
#include <type_traits>

#include "core/math.hpp"
#include "core/pairs.hpp"
#include "core/scratch.hpp"
#include "core/simd.hpp"
#include "kernels/column_product.hpp"
#include "kernels/float_product.hpp"
#include "kernels/integer_product.hpp"
#include "kernels/q6_k_product.hpp"
#if defined(ROOKERY_TILES)
#include "kernels/tile_rows.hpp"
#endif

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int together = 4;                             // rows that are read at once
constexpr int tile_tokens = lanes > 8 ? lanes / 4 : 2;  // tokens whose sums fit the registers beside them
constexpr int64_t near = 384 * 1024;                    // bytes of inputs that stay in the second-level cache
constexpr int next = 4096;                              // bytes

// How rows are multiplied with inputs. Weights are widened to float32 …
template <class T>
struct Widened {
  using Weight = T;
  using Input = float;
  static constexpr int step = lanes;  // inputs of a vector
  static constexpr int tile = tile_tokens;

  static const float* inputs(const Product& p, int64_t t) { return p.x + t * p.x_stride; }
  static int64_t stride(const Product& p) { return p.x_stride; }
  template <class... P>
  static vfloat weight(const T* row, P... part) { return load(row, part...); }
  template <class... P>
  static vfloat input(const float* x, P... part) { return load(x, part...); }
  static vfloat add(vfloat sum, vfloat weight, vfloat x) { return sum + weight * x; }
};

#if defined(__AVX512BF16__)
// … or taken in pairs, the inputs being rounded as the weights are: twice as much in a cycle, and nothing to widen.
struct Pairs {
  using Weight = std::uint16_t;
  using Input = std::uint16_t;
  static constexpr int step = 2 * lanes;
  static constexpr int tile = 6;

  static const std::uint16_t* inputs(const Product& p, int64_t t) { return p.rounded.values + t * p.rounded.stride; }
  static int64_t stride(const Product& p) { return p.rounded.stride; }
  static vpairs weight(const std::uint16_t* row, Whole) { return load_pairs(row); }
  static vpairs weight(const std::uint16_t* row, Part part) {
    return load_pairs(row, static_cast<int64_t>(part.count));
  }
  template <class P>
  static vpairs input(const std::uint16_t* x, P) { return load_pairs(x); }  // zeros after the last
  static vfloat add(vfloat sum, vpairs weight, vpairs x) { return add_products(sum, weight, x); }
};
#endif

// `together` neighbouring rows from `o` on; the last one stands for those beyond `end`.
template <class T>
struct Rows {
  const T* row[together];
  const char* later;

  Rows(const Matrix& w, int64_t o, int64_t end) {
    for (int i = 0; i < together; ++i) row[i] = weights<T>(w) + std::min(o + i, end - 1) * w.pitch();
    // what the memory delivers in its latency, and at least these rows themselves
    const auto ahead = std::max<int64_t>(12 * 1024, together * w.in * static_cast<int64_t>(sizeof(T)));
    later = reinterpret_cast<const char*>(row[0]) + ahead;
  }

  // Asks for later rows while inputs `k` … are used: in the order of memory, and into the second-level cache, because
  // the first has too few slots for lines under way. The hardware alone does not follow rows as short as these.
  void ask(int64_t k) const {
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i)
      __builtin_prefetch(later + k * together * static_cast<int64_t>(sizeof(T)) + i * line, 0, 2);
  }
};

// As `Rows`, of the outputs at places `o` … of a list. What is asked for are the rows of later places, because what lies
// behind a row in memory may never be used.
template <class T>
struct ListedRows {
  const T *row[together], *later[together];

  ListedRows(const Matrix& w, const std::int32_t* list, int64_t o, int64_t end) {
    for (int i = 0; i < together; ++i) {
      row[i] = weights<T>(w) + list[std::min(o + i, end - 1)] * w.pitch();
      later[i] = weights<T>(w) + list[std::min(o + 2 * together + i, end - 1)] * w.pitch();
    }
  }

  void ask(int64_t k) const {
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) __builtin_prefetch(later[i] + k, 0, 2);
  }
};

// total[m * together + i] = lane-wise sums of row i times token m, one row of x after the other `x_stride` apart.
template <class Kind, int tokens, class R>
[[gnu::always_inline]] inline void dots(
    const R& rows, const typename Kind::Input* x, int64_t x_stride, int64_t in, vfloat* totals) {
  constexpr int64_t step = line / sizeof(typename Kind::Weight);
  vfloat total[tokens * together] = {};
  const auto add = [&](int64_t k, auto part) {
    decltype(Kind::weight(rows.row[0], part)) weight[together];
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) weight[i] = Kind::weight(rows.row[i] + k, part);
#pragma GCC unroll 6
    for (int m = 0; m < tokens; ++m) {
      const auto xk = Kind::input(x + m * x_stride + k, part);
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) total[m * together + i] = Kind::add(total[m * together + i], weight[i], xk);
    }
  };
  int64_t k = 0;
  for (; k + step <= in; k += step) {
    rows.ask(k);
#pragma GCC unroll 8
    for (int64_t m = 0; m < step; m += Kind::step) add(k + m, Whole{});
  }
  for (; k + Kind::step <= in; k += Kind::step) add(k, Whole{});
  if (k < in) add(k, Part{static_cast<std::size_t>(in - k)});
#pragma GCC unroll 24
  for (int i = 0; i < tokens * together; ++i) totals[i] = total[i];
}

// One row after the other, as the hardware reads ahead best. The additions are those of `dots`.
template <class Kind>
void one_token(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const auto* x = Kind::inputs(p, 0);
  for (int64_t o = begin; o < end; o += lanes) {
    vfloat totals[lanes];
    for (int i = 0; i < lanes; ++i) {
      const auto* row = weights<typename Kind::Weight>(w) + std::min(o + i, end - 1) * w.pitch();
      vfloat total{};
      const auto add = [&](int64_t k, auto part) {
        __builtin_prefetch(reinterpret_cast<const char*>(row + k) + next, 0, 2);
        total = Kind::add(total, Kind::weight(row + k, part), Kind::input(x + k, part));
      };
      int64_t k = 0;
      for (; k + Kind::step <= w.in; k += Kind::step) add(k, Whole{});
      if (k < w.in) add(k, Part{static_cast<std::size_t>(w.in - k)});
      totals[i] = total;
    }
    const vfloat result = sums(totals);
    if (o + lanes <= end)
      put(p.y + o, result, p.add, Whole{});
    else
      put(p.y + o, result, p.add, Part{static_cast<std::size_t>(end - o)});
  }
}

// As `sums`, of fewer vectors, a power of two: lanes / count neighbouring lanes of the result have the sum over an x.
template <int count, int step = lanes / 2>
[[gnu::always_inline]] inline vfloat sums_of(vfloat* x) {
  constexpr int left = count > 1 ? count / 2 : 1;
#pragma GCC unroll 8
  for (int m = 0; m < left; ++m) {
    vfloat& other = x[count > 1 ? m + left : m];
    x[m] = keep_low<step>(x[m], other, lane_numbers) + keep_high<step>(x[m], other, lane_numbers);
  }
  if constexpr (step > 1)
    return sums_of<left, step / 2>(x);
  else
    return x[0];
}

// Adds up across lanes and writes `outputs` outputs of `tokens` tokens. Destroys `totals`.
template <int tokens>
[[gnu::always_inline]] inline void finish(vfloat* totals, const Product& p, int64_t t, int64_t o, int64_t outputs) {
  constexpr int at_once = lanes / together;  // tokens whose sums fill a vector
  if constexpr (tokens > at_once) {
    finish<at_once>(totals, p, t, o, outputs);
    finish<tokens - at_once>(totals + at_once * together, p, t + at_once, o, outputs);
  } else {
    constexpr int number = (tokens > at_once / 2 ? at_once : tokens) * together, apart = lanes / number;
    vfloat some[number] = {};
#pragma GCC unroll 16
    for (int i = 0; i < tokens * together; ++i) some[i] = totals[i];
    const vfloat all = sums_of<number>(some);
    float results[lanes];
    store(results, all);
    const auto give = [&](auto count) {
#pragma GCC unroll 4
      for (int m = 0; m < tokens; ++m) {
        float* y = p.y + (t + m) * p.y_stride + o;
        const float* from = results + m * together * apart;
        for (int i = 0; i < together; ++i)
          if (i < count) y[i] = p.add ? y[i] + from[i * apart] : from[i * apart];
      }
    };
    if (outputs == together)
      give(std::integral_constant<int, together>{});
    else
      give(static_cast<int>(outputs));
  }
}

// step(t, tokens) for tiles of tokens from `t` to `to`, the number of their tokens known when it is compiled.
template <int most, class Step>
inline void tiles(int64_t t, int64_t to, Step&& step) {
  for (; t + most <= to; t += most) step(t, std::integral_constant<int, most>{});
  if constexpr (most > 1)
    if (t < to) tiles<most - 1>(t, to, step);
}

// The outputs at places `begin` … of p.outputs; their additions are those of all the others.
template <class Kind>
void listed(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += together) {
    const ListedRows<typename Kind::Weight> rows(w, p.outputs, o, end);
    tiles<Kind::tile>(0, p.tokens, [&](int64_t t, auto tokens) {
      vfloat totals[tokens * together];
      dots<Kind, tokens>(rows, Kind::inputs(p, t), Kind::stride(p), w.in, totals);
      float sums_of[tokens * together];
      Product compact = p;  // side by side first, then to their places
      compact.y = sums_of;
      compact.y_stride = together;
      compact.add = false;
      finish<tokens>(totals, compact, 0, 0, together);
      for (int m = 0; m < tokens; ++m)
        for (int64_t i = 0; i < std::min<int64_t>(together, end - o); ++i)
          p.y[(t + m) * p.y_stride + p.outputs[o + i]] = sums_of[m * together + i];
    });
  }
}

// Tokens in blocks whose inputs stay near.
template <class Kind, class Block>
inline void blocks(const Matrix& w, const Product& p, Block&& block) {
  const auto bytes = std::max<int64_t>(1, w.in * static_cast<int64_t>(sizeof(typename Kind::Input)));
  const int64_t size = std::max<int64_t>(2, near / bytes / Kind::tile) * Kind::tile;
  for (int64_t t = 0; t < p.tokens; t += size) block(t, std::min(p.tokens, t + size));
}

// Straight from the rows: for what needs no widening, or where it does not pay to keep what was widened.
template <class Kind>
void straight(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  blocks<Kind>(w, p, [&](int64_t from, int64_t to) {
    for (int64_t o = begin; o < end; o += together) {
      const Rows<typename Kind::Weight> rows(w, o, end);
      tiles<Kind::tile>(from, to, [&](int64_t t, auto tokens) {
        vfloat totals[tokens * together];
        dots<Kind, tokens>(rows, Kind::inputs(p, t), Kind::stride(p), w.in, totals);
        finish<tokens>(totals, p, t, o, std::min<int64_t>(together, end - o));
      });
    }
  });
}

// Widens `together` rows into `panel` [inputs / lanes, together, lanes], zeros after the last input.
template <class T>
void widen_rows(const Matrix& w, int64_t o, int64_t end, float* panel) {
  const Rows<T> rows(w, o, end);
  sweep(w.in, [&](int64_t k, auto part) {
    if (k % (line / static_cast<int>(sizeof(T))) == 0) rows.ask(k);
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) store(panel + (k * together + i * lanes), load(rows.row[i] + k, part));
  });
}

// `together` outputs of `tokens` tokens. The additions are those of `dots`.
template <int tokens>
inline void tile_of_panel(const float* panel, const Product& p, int64_t in, int64_t t, int64_t o, int64_t outputs) {
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
  finish<tokens>(total, p, t, o, outputs);
}

template <class T>
void widened_first(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  float* panel = scratch(static_cast<std::size_t>((w.in + lanes) * together));
  blocks<Widened<T>>(w, p, [&](int64_t from, int64_t to) {
    for (int64_t o = begin; o < end; o += together) {
      widen_rows<T>(w, o, end, panel);
      tiles<tile_tokens>(from, to, [&](int64_t t, auto tokens) {
        tile_of_panel<tokens>(panel, p, w.in, t, o, std::min<int64_t>(together, end - o));
      });
    }
  });
}

template <class T>
void by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
#if defined(ROOKERY_TILES)
  if constexpr (std::is_same_v<T, std::uint16_t>)
    if (p.rounded.values) return rows_by_tiles(w, p, begin, end);
#elif defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, std::uint16_t>)
    if (p.rounded.values) return (p.outputs ? listed<Pairs> : p.tokens == 1 ? one_token<Pairs> : straight<Pairs>)(w, p, begin, end);
#endif
  const auto run = p.outputs                ? listed<Widened<T>>
                   : p.tokens == 1          ? one_token<Widened<T>>
                   : p.tokens <= few_tokens ? straight<Widened<T>>
                                            : widened_first<T>;
  run(w, p, begin, end);
}

#if defined(__AVX512BF16__)
void round(
    const float* x, int64_t x_stride, int64_t first, int64_t last, int64_t begin, int64_t end, const Rounded& rounded) {
  for (int64_t t = begin; t < end; ++t) {
    std::uint16_t* to = rounded.values + t * rounded.stride;
    sweep(last - first, [&](int64_t j, auto part) {
      store(to + first + j, load(x + t * x_stride + first + j, part), part);
    });
    // whole lines are read of what is left of the last one
    std::fill(to + last, to + std::min(rounded.stride, (last + 31) / 32 * 32), std::uint16_t{0});
  }
}
#else
constexpr decltype(ProductKernels::round) round = nullptr;
#endif

}  // namespace
}  // namespace ROOKERY_ISA

const ProductKernels ROOKERY_ISA::product{
    {{by_rows<float>, by_rows<std::uint16_t>, by_rows<float16>, ROOKERY_ISA::int8_by_rows,
      ROOKERY_ISA::q8_0_by_rows, ROOKERY_ISA::int4_by_rows, ROOKERY_ISA::int4_by_rows, ROOKERY_ISA::q6_k_by_rows},
     {ROOKERY_ISA::float32_by_columns, ROOKERY_ISA::bfloat16_by_columns, ROOKERY_ISA::float16_by_columns,
      ROOKERY_ISA::int8_by_columns, ROOKERY_ISA::q8_0_by_columns, ROOKERY_ISA::int4_by_columns,
      ROOKERY_ISA::int4_by_columns, nullptr}},
    ROOKERY_ISA::few_tokens,
    ROOKERY_ISA::quantise,
    ROOKERY_ISA::round,
    ROOKERY_ISA::row};

}  // namespace rookery
