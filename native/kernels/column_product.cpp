// Lanes run over outputs, which every input is added to in turn.
#include "kernels/column_product.hpp"

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "core/math.hpp"
#include "core/pairs.hpp"
#include "core/scratch.hpp"
#include "core/simd.hpp"
#include "kernels/float_product.hpp"
#if defined(ROOKERY_TILES)
#include "kernels/tile_columns.hpp"
#endif

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int64_t near_sums = 4096;                // floats of sums that stay in the first-level cache

constexpr int abreast = 8;                         // inputs whose columns are read at once
constexpr int64_t block_in = 512;                  // inputs whose columns are brought into a panel at once
constexpr int strip = lanes > 8 ? 4 : 2;           // vectors of outputs held in registers …
constexpr int strip_tokens = lanes > 8 ? 6 : 4;    // … for so many tokens
constexpr int narrow_vectors = lanes > 8 ? 4 : 8;  // vectors of outputs of a matrix whose sums stay in registers

// Input i of token t, as it is multiplied.
inline float input(const Product& p, int64_t t, int64_t i) {
  if (!p.rounded.values) return p.x[t * p.x_stride + i];
  const std::uint32_t bits = std::uint32_t{p.rounded.values[t * p.rounded.stride + i]} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The inputs of a product, in ascending order.
struct Inputs {
  const std::int32_t* active;
  int64_t count;

  Inputs(const Matrix& w, const Product& p) : active(p.active), count(p.active ? p.active_count : w.in) {}
  int64_t operator[](int64_t i) const { return active ? active[i] : i; }
  // Where the inputs of a part end, looked for from place `i` on.
  int64_t end_of_part(int64_t part, int64_t i) const {
    const int64_t end = (part + 1) * part_inputs;
    if (!active) return std::min(end, count);
    while (i < count && active[i] < end) ++i;
    return i;
  }
};

// Asks for pieces of columns one after the other, in the order of memory, some columns before they are used.
template <class T>
class Ahead {
 public:
  static constexpr int64_t step = line / static_cast<int64_t>(sizeof(T));

  Ahead(const Matrix& w, const Inputs& list, int64_t begin, int64_t count)
      : first_(weights<T>(w) + begin), out_(w.pitch()), list_(list), count_(count) {
    if (list.count == 0) return;
    column_ = list[0] * out_;
    const int64_t columns = std::max<int64_t>(16, 96 * step / std::max(step, count));
    if (!list.active) {
      // all columns: the hardware finds the first ones; those of the matrix that follows in memory are asked for, too
      next_ = columns;
      column_ = columns * out_;
    } else {
      for (int64_t i = 0; i < std::min(columns, list.count); ++i)
        for (int64_t j = 0; j < count; j += step) one();
    }
  }

  [[gnu::always_inline]] void one() {
    __builtin_prefetch(first_ + column_ + place_, 0, 2);
    place_ += step;
    if (place_ >= count_) {
      place_ = 0;
      next_ = list_.active ? std::min(next_ + 1, list_.count - 1) : next_ + 1;
      column_ = list_[next_] * out_;
    }
  }

 private:
  const T* first_;
  int64_t out_;
  const Inputs& list_;
  int64_t count_, place_ = 0, next_ = 0, column_ = 0;
};

// Adds columns i … i + n − 1 of the list, one after the other, to the sums [tokens, stride] of outputs begin … .
template <class T, int n>
inline void add_columns(
    const Matrix& w, const Product& p, const Inputs& list, int64_t i, int64_t begin, int64_t count, float* sums,
    int64_t stride, Ahead<T>& ahead) {
  const T* column[n];
  for (int m = 0; m < n; ++m) column[m] = weights<T>(w) + list[i + m] * w.pitch() + begin;
  float x[few_tokens * n];
  for (int64_t t = 0; t < p.tokens; ++t)
    for (int m = 0; m < n; ++m) x[t * n + m] = input(p, t, list[i + m]);
  sweep(count, [&](int64_t j, auto part) {
    vfloat weight[n];
#pragma GCC unroll 8
    for (int m = 0; m < n; ++m) {
      if (j % Ahead<T>::step == 0) ahead.one();
      weight[m] = load(column[m] + j, part);
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      vfloat total = load(sums + t * stride + j);
#pragma GCC unroll 8
      for (int m = 0; m < n; ++m) total += weight[m] * x[t * n + m];
      store(sums + t * stride + j, total);
    }
  });
}

// All columns of a part, places i … stop − 1 of the list.
template <class T>
inline void add_part(
    const Matrix& w, const Product& p, const Inputs& list, int64_t i, int64_t stop, int64_t begin, int64_t count,
    float* sums, int64_t stride, Ahead<T>& ahead) {
#if defined(ROOKERY_TILES)
  if constexpr (std::is_same_v<T, std::uint16_t>)
    if (p.rounded.values) {
      while (i < stop) {
        const int64_t from = i, end = list[i] / block_inputs * block_inputs + block_inputs;
        while (i < stop && list[i] < end) ++i;
        ColumnsOfBlock block;
        for (const int odd : {0, 1}) {
          for (int64_t n = from; n < i; ++n) {
            if (list[n] % 2 != odd) continue;
            block.column[block.all] = weights<T>(w) + list[n] * w.pitch() + begin;
            for (int64_t t = 0; t < p.tokens; ++t) block.x[block.all][t] = input(p, t, list[n]);
            ++block.all;
          }
          if (!odd) block.even = block.all;
        }
        add_block<few_tokens>(p.tokens, block, count, sums, stride, [&] { ahead.one(); });
      }
      return;
    }
#endif
  for (; i + abreast <= stop; i += abreast) add_columns<T, abreast>(w, p, list, i, begin, count, sums, stride, ahead);
  for (; i < stop; ++i) add_columns<T, 1>(w, p, list, i, begin, count, sums, stride, ahead);
}

// Few tokens: long pieces of columns are read one after the other, and the sums lie in the first-level cache.
template <class T>
void few_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const Inputs list(w, p);
  const Flush flush(p.rounded.values);
  const int64_t stride = near_sums / p.tokens / lanes * lanes;
  const int64_t first = p.part_stride ? p.part_begin : 0;
  const int64_t last = p.part_stride ? p.part_end : (w.in + part_inputs - 1) / part_inputs;
  float* totals = scratch(2 * near_sums);
  float* sums = totals + near_sums;
  for (; begin < end; begin += stride) {
    const int64_t count = std::min(stride, end - begin);
    const auto all = [&](auto&& step) {
      for (int64_t t = 0; t < p.tokens; ++t)
        sweep(count, [&](int64_t j, auto part) { step(t * stride + j, t * p.y_stride + begin + j, part); });
    };
    all([&](int64_t at, int64_t, auto) { store(totals + at, vfloat{}); });
    Ahead<T> ahead(w, list, begin, count);
    for (int64_t part = first, i = list.active ? 0 : first * part_inputs; part < last; ++part) {
      all([&](int64_t at, int64_t, auto) { store(sums + at, vfloat{}); });
      const int64_t stop = list.end_of_part(part, i);
      add_part<T>(w, p, list, i, stop, begin, count, sums, stride, ahead);
      i = stop;
      if (p.part_stride)
        all([&](int64_t at, int64_t to, auto some) {
          put(p.y + part * p.part_stride + to, load(sums + at), p.add, some);
        });
      else
        all([&](int64_t at, int64_t, auto) { store(totals + at, load(totals + at) + load(sums + at)); });
    }
    if (!p.part_stride)
      all([&](int64_t at, int64_t to, auto some) { put(p.y + to, load(totals + at), p.add, some); });
  }
}

// A matrix of few outputs, whose sums stay in registers: `vectors` vectors of outputs of `tokens` tokens.
template <class T, int vectors, int tokens>
inline void narrow_tile(const Matrix& w, const Product& p, int64_t t, int64_t begin) {
  const float* x = p.x + t * p.x_stride;
  vfloat totals[tokens * vectors] = {};
  for (int64_t k = 0; k < w.in;) {
    const int64_t stop = std::min(w.in, k + part_inputs);
    vfloat sums[tokens * vectors] = {};
    for (; k < stop; ++k) {
      const T* column = weights<T>(w) + k * w.pitch() + begin;
      vfloat weight[vectors];
#pragma GCC unroll 8
      for (int n = 0; n < vectors; ++n) {
        // often one of several matrices that follow each other
        if (n * lanes % (line / static_cast<int>(sizeof(T))) == 0)
          __builtin_prefetch(reinterpret_cast<const char*>(column + n * lanes) + 12 * 1024, 0, 2);
        weight[n] = load(column + n * lanes);
      }
#pragma GCC unroll 4
      for (int m = 0; m < tokens; ++m) {
        const vfloat xk = splat(x[m * p.x_stride + k]);
#pragma GCC unroll 8
        for (int n = 0; n < vectors; ++n) sums[m * vectors + n] += weight[n] * xk;
      }
    }
    for (int n = 0; n < tokens * vectors; ++n) totals[n] += sums[n];
  }
  for (int m = 0; m < tokens; ++m)
    for (int n = 0; n < vectors; ++n)
      put(p.y + (t + m) * p.y_stride + begin + n * lanes, totals[m * vectors + n], p.add, Whole{});
}

template <class T, int vectors>
void narrow(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  if constexpr (vectors > 1)
    if (end - begin < vectors * lanes) return narrow<T, vectors - 1>(w, p, begin, end);
  constexpr int together_tokens = lanes > 8 ? 2 : 1;
  int64_t t = 0;
  for (; t + together_tokens <= p.tokens; t += together_tokens)
    narrow_tile<T, vectors, together_tokens>(w, p, t, begin);
  if (t < p.tokens) narrow_tile<T, vectors, 1>(w, p, t, begin);
}

// How a strip of columns is multiplied: widened to float32 …
template <class T>
struct Widened {
  using Number = float;
  static constexpr int step = 1;  // columns that are added at a time

  // Columns i … i + count − 1, outputs o … o + outputs − 1 into `panel` [count / step, vectors, lanes, step].
  static void fill(const Matrix& w, int64_t i, int64_t count, int64_t o, int64_t outputs, int vectors, float* panel) {
    for (int64_t k = 0; k < count; ++k) {
      const T* column = weights<T>(w) + (i + k) * w.pitch() + o;
      sweep(outputs, [&](int64_t j, auto part) { store(panel + k * vectors * lanes + j, load(column + j, part)); });
    }
  }
  // Inputs i … i + count − 1 of a token, as they are multiplied; in `room` where they do not lie in that form.
  static const float* inputs(const Product& p, int64_t t, int64_t i, int64_t, float*) {
    return p.x + t * p.x_stride + i;
  }
  static int64_t stride(const Product& p) { return p.x_stride; }
  static vfloat weight(const float* panel) { return load(panel); }
  static vfloat input(const float* x) { return splat(*x); }
  static vfloat add(vfloat sum, vfloat weight, vfloat x) { return sum + weight * x; }
};

#if defined(__AVX512BF16__)
// … or two columns at a time, the later one first, because instructions add the second of a pair first.
struct Pairs {
  using Number = std::uint16_t;
  static constexpr int step = 2;

  static void fill(
      const Matrix& w, int64_t i, int64_t count, int64_t o, int64_t outputs, int vectors, std::uint16_t* panel) {
    for (int64_t k = 0; k < count; k += 2)
      for (int64_t j = 0; j < outputs; j += 2 * lanes) {
        const std::uint16_t* column = weights<std::uint16_t>(w) + (i + k) * w.pitch() + o + j;
        const int64_t some = std::min<int64_t>(2 * lanes, outputs - j);
        const auto columns = [&](int64_t m) {
          if (k + m >= count) return vpairs{};
          return some == 2 * lanes ? load_pairs(column + m * w.pitch()) : load_pairs(column + m * w.pitch(), some);
        };
        store_interleaved(panel + k * vectors * lanes + 2 * j, columns(1), columns(0));
      }
  }
  static const std::uint16_t* inputs(const Product& p, int64_t t, int64_t i, int64_t count, std::uint16_t* room) {
    for (int64_t k = 0; k < count; k += 2 * lanes)
      store_pairs(room + k, turned(load_pairs(p.rounded.values + t * p.rounded.stride + i + k)));
    return room;
  }
  static int64_t stride(const Product&) { return block_in; }
  static vpairs weight(const std::uint16_t* panel) { return load_pairs(panel); }
  static vpairs input(const std::uint16_t* x) { return splat_pair(x); }
  static vfloat add(vfloat sum, vpairs weight, vpairs x) { return add_products(sum, weight, x); }
};
#endif

// Adds a part of the inputs, `steps` steps, to the sums [tokens, vectors, lanes] of a tile. Inputs of tokens are `stride`
// numbers apart.
template <class Kind, int vectors, int tokens>
void add_part(
    const typename Kind::Number* panel, const typename Kind::Number* x, int64_t stride, int64_t steps, float* sums) {
  constexpr int width = lanes * Kind::step;
  vfloat total[tokens * vectors] = {};
  for (int64_t k = 0; k < steps; ++k, panel += vectors * width, x += Kind::step) {
    decltype(Kind::weight(panel)) weight[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) weight[n] = Kind::weight(panel + n * width);
#pragma GCC unroll 6
    for (int m = 0; m < tokens; ++m) {
      const auto xk = Kind::input(x + m * stride);
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) total[m * vectors + n] = Kind::add(total[m * vectors + n], weight[n], xk);
    }
  }
#pragma GCC unroll 24
  for (int n = 0; n < tokens * vectors; ++n) store(sums + n * lanes, load(sums + n * lanes) + total[n]);
}

template <class Kind, int... n>
constexpr std::array<decltype(&add_part<Kind, 1, 1>), sizeof...(n)> all_tiles(std::integer_sequence<int, n...>) {
  return {add_part<Kind, n / strip_tokens + 1, n % strip_tokens + 1>...};
}

// The parts of a block of inputs, which `panel` has, are added to `totals` [tokens, vectors, lanes]. Calls ask() before
// every tile.
template <class Kind, class Ask>
void add_block(
    const Product& p, int64_t i, int64_t count, int vectors, const typename Kind::Number* panel,
    typename Kind::Number* room, float* totals, Ask&& ask) {
  static constexpr auto tiles = all_tiles<Kind>(std::make_integer_sequence<int, strip * strip_tokens>{});
  for (int64_t t = 0; t < p.tokens; t += strip_tokens) {
    const int64_t tokens = std::min<int64_t>(strip_tokens, p.tokens - t);
    const auto* x = Kind::inputs(p, t, i, count, room);
    for (int64_t m = 1; m < tokens; ++m) Kind::inputs(p, t + m, i, count, room + m * block_in);
    const auto add = tiles[static_cast<std::size_t>((vectors - 1) * strip_tokens + tokens - 1)];
    for (int64_t k = 0; k < count; k += part_inputs) {
      ask();
      add(panel + k * vectors * lanes, x + k, Kind::stride(p),
          (std::min(part_inputs, count - k) + Kind::step - 1) / Kind::step, totals + t * vectors * lanes);
    }
  }
}

// Inputs in blocks, and in each the outputs in strips: a block's columns are asked for as a whole, some before every tile
// of the block before it, because a strip of them is too narrow to be read from memory by itself.
template <class T, class Kind>
void many_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  using Number = typename Kind::Number;
  constexpr int64_t width = strip * lanes;
  const int64_t strips = (end - begin + width - 1) / width, size = p.tokens * width;
  float* memory = scratch(static_cast<std::size_t>(block_in * (width + strip_tokens) + strips * size));
  auto* panel = reinterpret_cast<Number*>(memory);
  auto* room = reinterpret_cast<Number*>(memory + block_in * width);
  float* totals = memory + block_in * (width + strip_tokens);
  std::fill_n(totals, strips * size, 0.0f);
  // pairs are interleaved two vectors at a time
  const auto vectors_of = [](int64_t outputs) {
    constexpr int64_t unit = lanes * Kind::step;
    return static_cast<int>((outputs + unit - 1) / unit * Kind::step);
  };
  for (int64_t i = 0; i < w.in; i += block_in) {
    const int64_t count = std::min(block_in, w.in - i), next = i + count;
    const int64_t next_count = std::min(block_in, w.in - next);
    const int64_t tiles = (p.tokens + strip_tokens - 1) / strip_tokens * ((count + part_inputs - 1) / part_inputs);
    for (int64_t s = 0; s < strips; ++s) {
      int64_t k = next_count * s / strips;
      const int64_t stop = next_count * (s + 1) / strips, piece = (stop - k) / tiles + 1;
      const auto ask = [&] {
        for (const int64_t to = std::min(stop, k + piece); k < to; ++k)
          for (int64_t j = begin; j < end; j += line / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(weights<T>(w) + (next + k) * w.pitch() + j, 0, 2);
      };
      const int64_t o = begin + s * width, outputs = std::min(width, end - o);
      const int vectors = vectors_of(outputs);
      Kind::fill(w, i, count, o, outputs, vectors, panel);
      add_block<Kind>(p, i, count, vectors, panel, room, totals + s * size, ask);
    }
  }
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t o = begin + s * width, outputs = std::min(width, end - o), pitch = vectors_of(outputs) * lanes;
    for (int64_t t = 0; t < p.tokens; ++t)
      sweep(outputs, [&](int64_t j, auto part) {
        put(p.y + t * p.y_stride + o + j, load(totals + s * size + t * pitch + j), p.add, part);
      });
  }
}
static_assert(block_in % part_inputs == 0);

template <class T>
void by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  const bool is_narrow = count <= narrow_vectors * lanes && count % lanes == 0 && !p.active && !p.part_stride;
  auto many = many_tokens_by_columns<T, Widened<T>>;
  auto few = is_narrow ? narrow<T, narrow_vectors> : few_tokens_by_columns<T>;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, std::uint16_t>)
    if (p.rounded.values) {
#if defined(ROOKERY_TILES)
      many = columns_by_tiles;
#else
      many = many_tokens_by_columns<T, Pairs>;
#endif
      few = few_tokens_by_columns<T>;
    }
#endif
  (p.tokens > few_tokens ? many : few)(w, p, begin, end);
}

}  // namespace

void float32_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  by_columns<float>(w, p, begin, end);
}

void bfloat16_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  by_columns<std::uint16_t>(w, p, begin, end);
}

void float16_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  by_columns<float16>(w, p, begin, end);
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
