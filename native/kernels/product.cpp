// Every weight is widened to float32, so all formats of one order share their arithmetic; packed ones are multiplied in
// integer_product.cpp.
#include "kernels/product.hpp"

#include <algorithm>

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "core/simd.hpp"
#include "kernels/integer_product.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int together = 4;                             // rows that are read at once
constexpr int tile_tokens = lanes > 8 ? lanes / 4 : 2;  // tokens whose sums fit the registers beside them
constexpr int few_tokens = 2 * tile_tokens;             // tokens that do not pay for widening the weights first
constexpr int64_t near = 96 * 1024;                     // floats of x that stay in the second-level cache
constexpr int64_t near_sums = 4096;                     // floats of sums that stay in the first-level cache
constexpr int line = 64;                                // bytes

template <class T>
const T* weights(const Matrix& w) {
  return static_cast<const T*>(w.data);
}

// ---- rows: lanes run over inputs, one sum of vectors an output, added up across lanes at the end

template <class... P>
inline void put(float* y, vfloat value, bool add, P... part) {
  store(y, add ? load(y, part...) + value : value, part...);
}

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
template <int tokens, class R>
inline void dots(const R& rows, const float* x, int64_t x_stride, int64_t in, vfloat* totals) {
  constexpr int64_t step = line / sizeof(*rows.row[0]);
  vfloat total[tokens * together] = {};
  const auto add = [&](int64_t k, auto part) {
    vfloat weight[together];
#pragma GCC unroll 4
    for (int i = 0; i < together; ++i) weight[i] = load(rows.row[i] + k, part);
#pragma GCC unroll 4
    for (int m = 0; m < tokens; ++m) {
      const vfloat xk = load(x + m * x_stride + k, part);
#pragma GCC unroll 4
      for (int i = 0; i < together; ++i) total[m * together + i] += weight[i] * xk;
    }
  };
  int64_t k = 0;
  for (; k + step <= in; k += step) {
    rows.ask(k);
#pragma GCC unroll 8
    for (int64_t m = 0; m < step; m += lanes) add(k + m, Whole{});
  }
  sweep(in - k, [&](int64_t j, auto part) { add(k + j, part); });
  for (int i = 0; i < tokens * together; ++i) totals[i] = total[i];
}

template <class T>
void one_token_by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += lanes) {
    vfloat totals[lanes];
    for (int g = 0; g < lanes; g += together) dots<1>(Rows<T>(w, o + g, end), p.x, 0, w.in, totals + g);
    const vfloat result = sums(totals);
    if (o + lanes <= end)
      put(p.y + o, result, p.add, Whole{});
    else
      put(p.y + o, result, p.add, Part{static_cast<std::size_t>(end - o)});
  }
}

// Adds up across lanes and writes `outputs` outputs of `tokens` tokens. Destroys `totals`.
template <int tokens>
inline void finish(vfloat* totals, const Product& p, int64_t t, int64_t o, int64_t outputs) {
  float results[(tokens * together + lanes - 1) / lanes * lanes];
  for (int n = 0; n < tokens * together; n += lanes) {
    vfloat some[lanes] = {};
    for (int i = 0; i < lanes && n + i < tokens * together; ++i) some[i] = totals[n + i];
    store(results + n, sums(some));
  }
  for (int m = 0; m < tokens; ++m)
    for (int64_t i = 0; i < outputs; ++i) {
      float* y = p.y + (t + m) * p.y_stride + o + i;
      *y = p.add ? *y + results[m * together + i] : results[m * together + i];
    }
}

template <int tokens, class T>
inline void tile_of_rows(
    const Rows<T>& rows, const Matrix& w, const Product& p, int64_t t, int64_t o, int64_t outputs) {
  vfloat totals[tokens * together];
  dots<tokens>(rows, p.x + t * p.x_stride, p.x_stride, w.in, totals);
  finish<tokens>(totals, p, t, o, outputs);
}

// The outputs at places `begin` … of p.outputs; their additions are those of all the others.
template <int tokens, class T>
inline void tile_of_list(const Matrix& w, const Product& p, int64_t t, int64_t o, int64_t end) {
  const ListedRows<T> rows(w, p.outputs, o, end);
  vfloat totals[tokens * together];
  dots<tokens>(rows, p.x + t * p.x_stride, p.x_stride, w.in, totals);
  float sums_of[tokens * together];
  Product compact = p;  // side by side first, then to their places
  compact.y = sums_of;
  compact.y_stride = together;
  compact.add = false;
  finish<tokens>(totals, compact, 0, 0, together);
  for (int m = 0; m < tokens; ++m)
    for (int64_t i = 0; i < std::min<int64_t>(together, end - o); ++i)
      p.y[(t + m) * p.y_stride + p.outputs[o + i]] = sums_of[m * together + i];
}

template <class T>
void listed_by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += together) {
    int64_t t = 0;
    for (; t + tile_tokens <= p.tokens; t += tile_tokens) tile_of_list<tile_tokens, T>(w, p, t, o, end);
    for (; t < p.tokens; ++t) tile_of_list<1, T>(w, p, t, o, end);
  }
}

// Few tokens: the rows are widened for every tile anew.
template <class T>
void few_tokens_by_rows(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += together) {
    const Rows<T> rows(w, o, end);
    const int64_t outputs = std::min<int64_t>(together, end - o);
    int64_t t = 0;
    for (; t + tile_tokens <= p.tokens; t += tile_tokens) tile_of_rows<tile_tokens>(rows, w, p, t, o, outputs);
    if (p.tokens - t >= 3) tile_of_rows<std::min(3, tile_tokens)>(rows, w, p, t, o, outputs);
    if (p.tokens - t == 2) tile_of_rows<2>(rows, w, p, t, o, outputs);
    if (p.tokens - t == 1) tile_of_rows<1>(rows, w, p, t, o, outputs);
  }
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
  finish<tokens>(total, p, t, o, outputs);
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
  const auto run = p.outputs                ? listed_by_rows<T>
                   : p.tokens == 1          ? one_token_by_rows<T>
                   : p.tokens <= few_tokens ? few_tokens_by_rows<T>
                                            : many_tokens_by_rows<T>;
  run(w, p, begin, end);
}

// ---- columns: lanes run over outputs, which every input is added to in turn

constexpr int abreast = 8;                         // inputs whose columns are read at once
constexpr int64_t block_in = 64;                   // inputs whose columns are widened at once
constexpr int strip = lanes > 8 ? 4 : 2;           // vectors of outputs held in registers …
constexpr int strip_tokens = lanes > 8 ? 6 : 4;    // … for so many tokens
constexpr int narrow_vectors = lanes > 8 ? 4 : 8;  // vectors of outputs of a matrix whose sums stay in registers

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
    for (int m = 0; m < n; ++m) x[t * n + m] = p.x[t * p.x_stride + list[i + m]];
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

// Few tokens: long pieces of columns are read one after the other, and the sums lie in the first-level cache.
template <class T>
void few_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const Inputs list(w, p);
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
      for (; i + abreast <= stop; i += abreast)
        add_columns<T, abreast>(w, p, list, i, begin, count, sums, stride, ahead);
      for (; i < stop; ++i) add_columns<T, 1>(w, p, list, i, begin, count, sums, stride, ahead);
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

// One strip of outputs of `tokens` tokens: adds `count` inputs from `i` on; `panel` [inputs, width] has their columns.
template <int tokens>
inline void tile_by_columns(const float* panel, const Product& p, int64_t i, int64_t count, int64_t t, float* sums) {
  constexpr int64_t width = strip * lanes;
  vfloat total[tokens * strip];
  for (int n = 0; n < tokens * strip; ++n) total[n] = load(sums + t * width + n * lanes);
  const float* x = p.x + t * p.x_stride + i;
  for (int64_t k = 0; k < count; ++k, panel += width) {
    vfloat weight[strip];
#pragma GCC unroll 4
    for (int n = 0; n < strip; ++n) weight[n] = load(panel + n * lanes);
#pragma GCC unroll 6
    for (int m = 0; m < tokens; ++m) {
      const vfloat xk = splat(x[m * p.x_stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < strip; ++n) total[m * strip + n] += weight[n] * xk;
    }
  }
  for (int n = 0; n < tokens * strip; ++n) store(sums + t * width + n * lanes, total[n]);
}

template <int tokens = strip_tokens>
inline void last_tile_by_columns(
    const float* panel, const Product& p, int64_t i, int64_t count, int64_t t, float* sums) {
  if (p.tokens - t == tokens)
    tile_by_columns<tokens>(panel, p, i, count, t, sums);
  else if constexpr (tokens > 1)
    last_tile_by_columns<tokens - 1>(panel, p, i, count, t, sums);
}

// Inputs in blocks, and in each the outputs in strips: a block's columns are asked for as a whole while the one before
// it is used, because a strip of them is too narrow to be read from memory by itself.
template <class T>
void many_tokens_by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t width = strip * lanes;
  const int64_t strips = (end - begin + width - 1) / width, size = strips * p.tokens * width;
  float* panel = scratch(static_cast<std::size_t>(block_in * width + 2 * size));
  float *sums = panel + block_in * width, *totals = sums + size;
  std::fill_n(totals, size, 0.0f);
  for (int64_t i = 0; i < w.in; i += block_in) {
    const int64_t count = std::min(block_in, w.in - i), next = i + count;
    const int64_t next_count = std::min(block_in, w.in - next);
    if (i % part_inputs == 0) std::fill_n(sums, size, 0.0f);
    for (int64_t s = 0; s < strips; ++s) {
      for (int64_t k = next_count * s / strips; k < next_count * (s + 1) / strips; ++k)
        for (int64_t j = begin; j < end; j += line / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(weights<T>(w) + (next + k) * w.pitch() + j, 0, 2);
      const int64_t o = begin + s * width, outputs = std::min(width, end - o);
      for (int64_t k = 0; k < count; ++k) {
        const T* column = weights<T>(w) + (i + k) * w.pitch() + o;
        float* wide = panel + k * width;
        sweep(outputs, [&](int64_t j, auto part) { store(wide + j, load(column + j, part)); });
      }
      float* strip_sums = sums + s * p.tokens * width;
      int64_t t = 0;
      for (; t + strip_tokens <= p.tokens; t += strip_tokens)
        tile_by_columns<strip_tokens>(panel, p, i, count, t, strip_sums);
      if (t < p.tokens) last_tile_by_columns(panel, p, i, count, t, strip_sums);
    }
    if (next % part_inputs == 0 || next == w.in)
      for (int64_t j = 0; j < size; j += lanes) store(totals + j, load(totals + j) + load(sums + j));
  }
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t t = 0; t < p.tokens; ++t)
      sweep(std::min(width, end - begin - s * width), [&](int64_t j, auto part) {
        const vfloat total = load(totals + (s * p.tokens + t) * width + j, part);
        put(p.y + t * p.y_stride + begin + s * width + j, total, p.add, part);
      });
}
static_assert(part_inputs % block_in == 0);

template <class T>
void by_columns(const Matrix& w, const Product& p, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  const bool is_narrow = count <= narrow_vectors * lanes && count % lanes == 0 && !p.active && !p.part_stride;
  const auto run = p.tokens > few_tokens ? many_tokens_by_columns<T>
                   : is_narrow           ? narrow<T, narrow_vectors>
                                         : few_tokens_by_columns<T>;
  run(w, p, begin, end);
}

}  // namespace
}  // namespace ROOKERY_ISA

const ProductKernels ROOKERY_ISA::product{
    {{by_rows<float>, by_rows<std::uint16_t>, by_rows<float16>, ROOKERY_ISA::int8_by_rows,
      ROOKERY_ISA::q8_0_by_rows, ROOKERY_ISA::int4_by_rows, ROOKERY_ISA::int4_by_rows},
     {by_columns<float>, by_columns<std::uint16_t>, by_columns<float16>, ROOKERY_ISA::int8_by_columns,
      ROOKERY_ISA::q8_0_by_columns, ROOKERY_ISA::int4_by_columns, ROOKERY_ISA::int4_by_columns}},
    ROOKERY_ISA::few_tokens,
    ROOKERY_ISA::quantise,
    ROOKERY_ISA::row};

}  // namespace rookery
