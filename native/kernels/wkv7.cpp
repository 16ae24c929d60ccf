// Forward: lanes hold value rows, the state lies [key][value] and the loop runs over keys with broadcasts, so nothing is
// summed across lanes; the product of the state with the next token's `a` is taken while the state is being updated.
// Backward: lanes hold keys, because then only two sums a token (for dv and for the adjoint of S a) run across lanes
// instead of five; states inside a chunk are computed again from its checkpoint, never by inverting the update.
#include "kernels/wkv7.hpp"

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int64_t chunk = wkv7_chunk;
constexpr int tile = lanes == 16 ? 4 : 2;  // vectors of value rows that fit the registers: 16 registers hold two
constexpr int64_t group = 16;              // value rows that go backward together, so that their states stay in cache
constexpr int block = lanes / 2;           // value rows whose two sums fill one vector

// Hands out pieces of the thread's scratch memory.
struct Pieces {
  float* next;
  float* take(int64_t count) {
    float* piece = next;
    next += count;
    return piece;
  }
};

// One head of a tensor [tokens, heads, channels].
struct Head {
  Wkv7Tensor tensor;
  int64_t heads, head, channels;
  int64_t offset(int64_t token) const { return (token * heads + head) * channels; }

  // Copies tokens first … first + count − 1 to float32 [count, channels].
  void read(int64_t first, int64_t count, float* out) const {
    for (int64_t t = 0; t < count; ++t, out += channels) {
      const int64_t from = offset(first + t);
      for (int64_t j = 0; j < channels; j += lanes)
        if (!tensor.data)
          store(out + j, vfloat{});
        else if (tensor.bfloat16)
          store(out + j, load(static_cast<const std::uint16_t*>(tensor.data) + from + j));
        else
          store(out + j, load(static_cast<const float*>(tensor.data) + from + j));
    }
  }

  void write(int64_t first, int64_t count, const float* in) const {
    for (int64_t t = 0; t < count; ++t, in += channels) {
      const int64_t to = offset(first + t);
      for (int64_t j = 0; j < channels; j += lanes)
        if (tensor.bfloat16)
          store(static_cast<std::uint16_t*>(tensor.data) + to + j, load(in + j));
        else
          store(static_cast<float*>(tensor.data) + to + j, load(in + j));
    }
  }
};

void exponentials(float* x, int64_t count) {
  for (int64_t j = 0; j < count; j += lanes) store(x + j, exp(load(x + j)));
}

void fill(float* x, int64_t count, float value) {
  for (int64_t j = 0; j < count; j += lanes) store(x + j, splat(value));
}

void copy_transposed(const float* in, int64_t rows, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t j = 0; j < columns; j += lanes) {
      vfloat x[lanes];
      for (int m = 0; m < lanes; ++m) x[m] = load(in + (i + m) * columns + j);
      transpose(x);
      for (int m = 0; m < lanes; ++m) store(out + (j + m) * rows + i, x[m]);
    }
}

using Chunk = Wkv7Chunk;

// Moves `n` vectors of value rows through the chunk; `state` is their part of S, [key][value]. The row of `a` after the
// last token must be zeros.
template <int n>
void forward_tile(const Chunk& c, float* state, int64_t row) {
  vfloat removed[n] = {};
  for (int64_t j = 0; j < c.key; ++j)
    for (int m = 0; m < n; ++m) removed[m] += load(state + j * c.value + m * lanes) * c.a[j];
  for (int64_t t = 0; t < c.tokens; ++t) {
    const float *r = c.r + t * c.key, *w = c.w + t * c.key, *k = c.k + t * c.key, *b = c.b + t * c.key;
    const float* next_a = c.a + (t + 1) * c.key;
    vfloat v[n], y[n] = {}, next[n] = {};
    for (int m = 0; m < n; ++m) {
      v[m] = load(c.v + t * c.value + row + m * lanes);
      store(c.removed + t * c.value + row + m * lanes, removed[m]);
    }
    for (int64_t j = 0; j < c.key; ++j) {
      const vfloat wj = splat(w[j]), bj = splat(b[j]), kj = splat(k[j]), rj = splat(r[j]), aj = splat(next_a[j]);
#pragma GCC unroll 4
      for (int m = 0; m < n; ++m) {
        float* place = state + j * c.value + m * lanes;
        const vfloat s = load(place) * wj + removed[m] * bj + v[m] * kj;
        store(place, s);
        y[m] += s * rj;
        next[m] += s * aj;
      }
    }
    for (int m = 0; m < n; ++m) {
      store(c.y + t * c.value + row + m * lanes, y[m]);
      removed[m] = next[m];
    }
  }
}

void forward_chunk(const Chunk& c, float* state) {
  int64_t row = 0;
  for (; row + tile * lanes <= c.value; row += tile * lanes) forward_tile<tile>(c, state + row, row);
  for (; row < c.value; row += lanes) forward_tile<1>(c, state + row, row);
}

void forward(
    const Wkv7Shape& shape, const Wkv7Inputs& in, const Wkv7Results& out, int64_t row, int64_t head) {
  const int64_t key = shape.key, value = shape.value, square = key * value;
  Pieces pieces{scratch(square + chunk * (5 * key + 3 * value) + key)};
  float* state = pieces.take(square);
  Chunk c{0, key, value};
  for (float** x : {&c.r, &c.w, &c.k, &c.b}) *x = pieces.take(chunk * key);
  c.a = pieces.take((chunk + 1) * key);
  for (float** x : {&c.v, &c.y, &c.removed}) *x = pieces.take(chunk * value);
  const auto keys = [&](const Wkv7Tensor& x) { return Head{x, shape.heads, head, key}; };
  const auto values = [&](const Wkv7Tensor& x) { return Head{x, shape.heads, head, value}; };

  const int64_t place = (row * shape.heads + head) * square, end = shape.starts[row + 1];
  copy_transposed(in.state + place, value, key, state);
  int64_t saved = shape.chunks[row];
  for (int64_t first = shape.starts[row]; first < end; first += chunk, ++saved) {
    const int64_t count = c.tokens = end - first < chunk ? end - first : chunk;
    keys(in.r).read(first, count, c.r);
    keys(in.log_w).read(first, count, c.w);
    exponentials(c.w, count * key);
    keys(in.k).read(first, count, c.k);
    keys(in.a).read(first, count, c.a);
    fill(c.a + count * key, key, 0);
    keys(in.b).read(first, count, c.b);
    values(in.v).read(first, count, c.v);
    if (out.checkpoints) copy_transposed(state, key, value, out.checkpoints + (saved * shape.heads + head) * square);
    forward_chunk(c, state);
    values(out.y).write(first, count, c.y);
    if (out.removed) values({out.removed, false}).write(first, count, c.removed);
  }
  copy_transposed(state, key, value, out.state + place);
}

// What the backward pass adds: gradients of a chunk in float32, and the adjoint of the state.
struct Adjoint {
  float *y, *r, *w, *k, *a, *b, *v;  // [tokens, key] and [tokens, value]
  float* states;                     // [tokens + 1, group, key], S before and after every token, of a group of rows
  float* state;                      // [value, key]
  float* removed;                    // [group], of S_{t−1} a_t
};

// States of a group of value rows within the chunk, from the one before it in g.states.
void replay(const Chunk& c, const Adjoint& g, int64_t row) {
  const int64_t key = c.key;
  for (int64_t i = 0; i < group; i += block)
    for (int64_t j = 0; j < key; j += lanes) {
      vfloat s[block];
#pragma GCC unroll 8
      for (int m = 0; m < block; ++m) s[m] = load(g.states + (i + m) * key + j);
      for (int64_t t = 0; t < c.tokens; ++t) {
        const vfloat w = load(c.w + t * key + j), b = load(c.b + t * key + j), k = load(c.k + t * key + j);
        const float *removed = c.removed + t * c.value + row + i, *v = c.v + t * c.value + row + i;
        float* after = g.states + ((t + 1) * group + i) * key + j;
#pragma GCC unroll 8
        for (int m = 0; m < block; ++m) {
          s[m] = s[m] * w + removed[m] * b + v[m] * k;
          store(after + m * key, s[m]);
        }
      }
    }
}

// One token of `block` value rows. On entry the adjoint of the state is that of S_{t+1}, which the update of token t + 1
// is taken back from first: its decay and its `a` are the rows after token t's (1 and 0 where the chunk ends).
inline void backward_token(const Chunk& c, const Adjoint& g, int64_t row, int64_t i, int64_t t) {
  const int64_t key = c.key, at = t * key, next = at + key;
  const float *y = g.y + t * c.value + row + i, *v = c.v + t * c.value + row + i;
  const float *removed = c.removed + t * c.value + row + i, *before = g.states + (t * group + i) * key;
  const float *after = before + group * key, *d_removed = g.removed + i;
  float* adjoint = g.state + (row + i) * key;
  vfloat part[2 * block] = {};
  for (int64_t j = 0; j < key; j += lanes) {
    const vfloat w = load(c.w + next + j), a = load(c.a + next + j);
    const vfloat r = load(c.r + at + j), k = load(c.k + at + j), b = load(c.b + at + j);
    vfloat dr = load(g.r + at + j), da = load(g.a + next + j), dw = load(g.w + at + j);
    vfloat dk = load(g.k + at + j), db = load(g.b + at + j);
#pragma GCC unroll 8
    for (int m = 0; m < block; ++m) {
      const vfloat s = load(after + m * key + j);
      dr += s * y[m];
      da += s * d_removed[m];
      const vfloat d = load(adjoint + m * key + j) * w + d_removed[m] * a + y[m] * r;
      store(adjoint + m * key + j, d);
      dw += d * load(before + m * key + j);
      dk += d * v[m];
      db += d * removed[m];
      part[m] += d * k;
      part[block + m] += d * b;
    }
    store(g.r + at + j, dr);
    store(g.a + next + j, da);
    store(g.w + at + j, dw);
    store(g.k + at + j, dk);
    store(g.b + at + j, db);
  }
  float total[lanes];
  store(total, sums(part));
  std::memcpy(g.v + t * c.value + row + i, total, block * sizeof(float));
  std::memcpy(g.removed + i, total + block, block * sizeof(float));
}

// Takes the update of the chunk's first token back.
void leave_chunk(const Chunk& c, const Adjoint& g, int64_t row) {
  for (int64_t j = 0; j < c.key; j += lanes) {
    const vfloat w = load(c.w + j), a = load(c.a + j);
    vfloat da = load(g.a + j);
    for (int64_t i = 0; i < group; ++i) {
      float* adjoint = g.state + (row + i) * c.key + j;
      da += load(g.states + i * c.key + j) * g.removed[i];
      store(adjoint, load(adjoint) * w + g.removed[i] * a);
    }
    store(g.a + j, da);
  }
}

void backward_chunk(const Chunk& c, const Adjoint& g, const float* checkpoint) {
  for (float* x : {g.r, g.w, g.k, g.b}) fill(x, c.tokens * c.key, 0);
  fill(g.a, (c.tokens + 1) * c.key, 0);
  for (int64_t row = 0; row < c.value; row += group) {
    std::memcpy(g.states, checkpoint + row * c.key, group * c.key * sizeof(float));
    replay(c, g, row);
    fill(g.removed, group, 0);
    for (int64_t t = c.tokens - 1; t >= 0; --t)
      for (int64_t i = 0; i < group; i += block) backward_token(c, g, row, i, t);
    leave_chunk(c, g, row);
  }
  for (int64_t j = 0; j < c.tokens * c.key; j += lanes) store(g.w + j, load(g.w + j) * load(c.w + j));
}

void backward(
    const Wkv7Shape& shape, const Wkv7Inputs& in, const Wkv7Results& kept, const Wkv7Grads& grads, int64_t row,
    int64_t head) {
  const int64_t key = shape.key, value = shape.value, square = key * value;
  Pieces pieces{scratch(chunk * (10 * key + 4 * value) + 3 * key + (chunk + 1) * group * key + square + group)};
  Chunk c{0, key, value};
  for (float** x : {&c.r, &c.k, &c.b}) *x = pieces.take(chunk * key);
  for (float** x : {&c.w, &c.a}) *x = pieces.take((chunk + 1) * key);
  for (float** x : {&c.v, &c.removed}) *x = pieces.take(chunk * value);
  Adjoint g{};
  for (float** x : {&g.r, &g.w, &g.k, &g.b}) *x = pieces.take(chunk * key);
  g.a = pieces.take((chunk + 1) * key);
  for (float** x : {&g.y, &g.v}) *x = pieces.take(chunk * value);
  g.states = pieces.take((chunk + 1) * group * key);
  g.state = pieces.take(square);
  g.removed = pieces.take(group);
  const auto keys = [&](const Wkv7Tensor& x) { return Head{x, shape.heads, head, key}; };
  const auto values = [&](const Wkv7Tensor& x) { return Head{x, shape.heads, head, value}; };

  const int64_t place = (row * shape.heads + head) * square, start = shape.starts[row];
  if (grads.state)
    std::memcpy(g.state, grads.state + place, square * sizeof(float));
  else
    fill(g.state, square, 0);
  for (int64_t n = (shape.starts[row + 1] - start + chunk - 1) / chunk - 1; n >= 0; --n) {
    const int64_t first = start + n * chunk, left = shape.starts[row + 1] - first;
    const int64_t count = c.tokens = left < chunk ? left : chunk;
    keys(in.r).read(first, count, c.r);
    keys(in.log_w).read(first, count, c.w);
    exponentials(c.w, count * key);
    fill(c.w + count * key, key, 1);
    keys(in.k).read(first, count, c.k);
    keys(in.a).read(first, count, c.a);
    fill(c.a + count * key, key, 0);
    keys(in.b).read(first, count, c.b);
    values(in.v).read(first, count, c.v);
    values({kept.removed, false}).read(first, count, c.removed);
    values(grads.y).read(first, count, g.y);
    backward_chunk(c, g, kept.checkpoints + ((shape.chunks[row] + n) * shape.heads + head) * square);
    keys(grads.r).write(first, count, g.r);
    keys(grads.log_w).write(first, count, g.w);
    keys(grads.k).write(first, count, g.k);
    keys(grads.a).write(first, count, g.a);
    keys(grads.b).write(first, count, g.b);
    values(grads.v).write(first, count, g.v);
  }
  std::memcpy(grads.initial_state + place, g.state, square * sizeof(float));
}

}  // namespace
}  // namespace ROOKERY_ISA

const Wkv7Kernels ROOKERY_ISA::wkv7{ROOKERY_ISA::forward_chunk, ROOKERY_ISA::forward, ROOKERY_ISA::backward};

}  // namespace rookery
