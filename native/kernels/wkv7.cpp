// Forward: lanes hold value rows, the state lies [key][value] and the loop runs over keys with broadcasts: nothing is
// summed across lanes; the product of the state with the next token's `a` is taken while the state is being updated.
// Backward: lanes hold keys, because then only two sums a token (for dv and for the adjoint of S a) run across lanes
// instead of five. The update of token t + 1 is taken back together with the output of token t. States inside a chunk
// are computed again from its checkpoint, never by inverting the update, which loses all digits where decay is strong.
#include "kernels/wkv7.hpp"

#include "core/math.hpp"
#include "core/scratch.hpp"
#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int64_t chunk = wkv7_chunk;
constexpr bool many_registers = lanes == 16;     // 32 instead of 16
constexpr int tile = many_registers ? 4 : 2;     // vectors of value rows that go forward together
constexpr int64_t group = many_registers ? 8 : 16;  // value rows that go backward together; their states stay in cache
constexpr int block = lanes / 2;                 // value rows whose two sums fill one vector

// Hands out pieces of the thread's scratch memory, with gaps: pieces whose sizes are powers of two would otherwise
// compete for the same few places of the cache.
constexpr int64_t gap = 80;
struct Pieces {
  float* next;
  float* take(int64_t count) {
    float* piece = next;
    next += count + gap;
    return piece;
  }
};

// A row of floats for every token of a chunk.
template <class T>
struct Rows {
  T* first = nullptr;
  int64_t stride = 0;
  T* operator[](int64_t t) const { return first + t * stride; }
};
using Given = Rows<const float>;
using Made = Rows<float>;

void fill(float* x, int64_t count, float value) {
  for (int64_t j = 0; j < count; j += lanes) store(x + j, splat(value));
}

// One head of a tensor [tokens, heads, channels].
struct Head {
  Wkv7Tensor tensor;
  int64_t heads, head, channels;
  int64_t offset(int64_t token) const { return (token * heads + head) * channels; }

  // Tokens from `first` on as float32: where they lie, or else converted into `room`.
  Given read(int64_t first, int64_t count, float* room) const {
    if (!tensor.data) {
      fill(room, channels, 0);
      return {room, 0};
    }
    if (!tensor.bfloat16) return {static_cast<const float*>(tensor.data) + offset(first), heads * channels};
    for (int64_t t = 0; t < count; ++t) {
      const auto* from = static_cast<const std::uint16_t*>(tensor.data) + offset(first + t);
      for (int64_t j = 0; j < channels; j += lanes) store(room + t * channels + j, load(from + j));
    }
    return {room, channels};
  }

  // Where to put tokens from `first` on: in the tensor, or in `room` for `write` to convert.
  Made place(int64_t first, float* room) const {
    if (tensor.bfloat16) return {room, channels};
    return {static_cast<float*>(tensor.data) + offset(first), heads * channels};
  }

  void write(int64_t first, int64_t count, Made made) const {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < channels; j += lanes)
        if (tensor.bfloat16)
          store(static_cast<std::uint16_t*>(tensor.data) + offset(first + t) + j, load(made[t] + j));
        else
          store(static_cast<float*>(tensor.data) + offset(first + t) + j, load(made[t] + j));
  }
};

Given exponentials(Given x, int64_t count, int64_t channels, float* room) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t j = 0; j < channels; j += lanes) store(room + t * channels + j, exp(load(x[t] + j)));
  return {room, channels};
}

// Some tokens of one head in float32, and the w and a that stand for the token after them.
struct Chunk {
  int64_t tokens = 0, key, value;
  Given r{}, w{}, k{}, a{}, b{}, v{};
  float *last_w{}, *last_a{};
  float* room[6]{};
  const float* next_w(int64_t t) const { return t + 1 < tokens ? w[t + 1] : last_w; }
  const float* next_a(int64_t t) const { return t + 1 < tokens ? a[t + 1] : last_a; }
};

constexpr int64_t chunk_floats(int64_t key, int64_t value) {
  return chunk * (5 * key + value) + 2 * key + 8 * gap;
}

Chunk make_chunk(const Wkv7Shape& shape, Pieces& pieces) {
  Chunk c{.key = shape.key, .value = shape.value};
  for (float*& room : c.room) room = pieces.take(chunk * (&room == c.room ? shape.value : shape.key));
  c.last_w = pieces.take(shape.key);
  c.last_a = pieces.take(shape.key);
  fill(c.last_w, shape.key, 1);
  fill(c.last_a, shape.key, 0);
  return c;
}

void read_chunk(const Wkv7Shape& shape, const Wkv7Inputs& in, int64_t head, int64_t first, int64_t end, Chunk& c) {
  const auto read = [&](const Wkv7Tensor& x, int64_t channels, float* room) {
    return Head{x, shape.heads, head, channels}.read(first, c.tokens, room);
  };
  c.tokens = end - first < chunk ? end - first : chunk;
  c.v = read(in.v, c.value, c.room[0]);
  c.r = read(in.r, c.key, c.room[1]);
  c.w = exponentials(read(in.log_w, c.key, c.room[2]), c.tokens, c.key, c.room[2]);
  c.k = read(in.k, c.key, c.room[3]);
  c.a = read(in.a, c.key, c.room[4]);
  c.b = read(in.b, c.key, c.room[5]);
}

// S [value][key] to and from the order of the forward pass, [key][value]. `place(row, j)` says where in `out` the
// vector of a value row's keys from j on belongs.
void to_key_major(const float* in, int64_t value, int64_t key, float* out) {
  for (int64_t i = 0; i < value; i += lanes)
    for (int64_t j = 0; j < key; j += lanes) {
      vfloat x[lanes];
      for (int m = 0; m < lanes; ++m) x[m] = load(in + (i + m) * key + j);
      transpose(x);
      for (int m = 0; m < lanes; ++m) store(out + (j + m) * value + i, x[m]);
    }
}

template <class Place>
void from_key_major(const float* in, int64_t value, int64_t key, float* out, Place place) {
  for (int64_t j = 0; j < key; j += lanes)
    for (int64_t i = 0; i < value; i += lanes) {
      vfloat x[lanes];
      for (int m = 0; m < lanes; ++m) x[m] = load(in + (j + m) * value + i);
      transpose(x);
      for (int m = 0; m < lanes; ++m) store(out + place(i + m, j), x[m]);
    }
}

// The order of the backward pass: `group` value rows together, in them one vector of keys of every row after the other,
// so that the kernels reach all rows of a group at fixed distances.
int64_t tiled(int64_t row, int64_t j, int64_t key) {
  return row / group * group * key + j * group + row % group * lanes;
}

// Moves `n` vectors of value rows through the chunk; `state` is their part of S. Outputs go to `y`, S_{t−1} a_t to
// `removed_out` where there is one.
template <int n>
void forward_tile(const Chunk& c, float* state, int64_t row, Made y_out, Made removed_out) {
  vfloat removed[n] = {};
  for (int64_t j = 0; j < c.key; ++j)
    for (int m = 0; m < n; ++m) removed[m] += load(state + j * c.value + m * lanes) * c.a[0][j];
  for (int64_t t = 0; t < c.tokens; ++t) {
    const float *r = c.r[t], *w = c.w[t], *k = c.k[t], *b = c.b[t], *next_a = c.next_a(t);
    vfloat v[n], y[n] = {}, next[n] = {};
    for (int m = 0; m < n; ++m) v[m] = load(c.v[t] + row + m * lanes);
    if (removed_out.first)
      for (int m = 0; m < n; ++m) store(removed_out[t] + row + m * lanes, removed[m]);
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
      store(y_out[t] + row + m * lanes, y[m]);
      removed[m] = next[m];
    }
  }
}

void forward_rows(const Chunk& c, float* state, Made y, Made removed) {
  int64_t i = 0;
  for (; i + tile * lanes <= c.value; i += tile * lanes) forward_tile<tile>(c, state + i, i, y, removed);
  for (; i < c.value; i += lanes) forward_tile<1>(c, state + i, i, y, removed);
}

void advance(const Wkv7Chunk& given, float* state) {
  Chunk c{.tokens = given.tokens, .key = given.key, .value = given.value};
  c.r = {given.r, c.key};
  c.w = {given.w, c.key};
  c.k = {given.k, c.key};
  c.a = {given.a, c.key};
  c.b = {given.b, c.key};
  c.v = {given.v, c.value};
  c.last_a = given.a + c.tokens * c.key;
  forward_rows(c, state, {given.y, c.value}, {});
}

void forward(
    const Wkv7Shape& shape, const Wkv7Inputs& in, const Wkv7Results& out, int64_t row, int64_t head) {
  const int64_t key = shape.key, value = shape.value, square = key * value;
  Pieces pieces{scratch(chunk_floats(key, value) + square + chunk * value + 2 * gap)};
  Chunk c = make_chunk(shape, pieces);
  float *state = pieces.take(square), *y_room = pieces.take(chunk * value);
  const Head y{out.y, shape.heads, head, value}, removed{{out.removed, false}, shape.heads, head, value};

  const int64_t place = (row * shape.heads + head) * square, end = shape.starts[row + 1];
  to_key_major(in.state + place, value, key, state);
  float* saved = out.checkpoints + (shape.chunks[row] * shape.heads + head) * square;
  for (int64_t first = shape.starts[row]; first < end; first += chunk, saved += shape.heads * square) {
    read_chunk(shape, in, head, first, end, c);
    if (out.checkpoints)
      from_key_major(state, value, key, saved, [&](int64_t i, int64_t j) { return tiled(i, j, key); });
    const Made y_out = y.place(first, y_room), removed_out = out.removed ? removed.place(first, nullptr) : Made{};
    forward_rows(c, state, y_out, removed_out);
    if (out.y.bfloat16) y.write(first, c.tokens, y_out);
  }
  from_key_major(state, value, key, out.state + place, [&](int64_t i, int64_t j) { return i * key + j; });
}

// What the backward pass adds to a chunk.
struct Adjoint {
  Given y, removed;       // gradient of the outputs, and the forward pass' S_{t−1} a_t, [tokens, value]
  Made r, w, k, a, b, v;  // gradients of the chunk's inputs; that of `a` has one token more
  float* states;          // S before and after every token, of a group of rows: [tokens + 1, group, key], tiled
  float* state;           // adjoint of S, tiled
};

// States of a group of value rows within the chunk, from the one before it.
void replay(const Chunk& c, const Adjoint& g, int64_t row) {
  constexpr int rows = 8;
  for (int64_t i = 0; i < group; i += rows)
    for (int64_t j = 0; j < c.key; j += lanes) {
      float* place = g.states + j * group + i * lanes;
      vfloat s[rows];
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) s[m] = load(place + m * lanes);
      for (int64_t t = 0; t < c.tokens; ++t) {
        const vfloat w = load(c.w[t] + j), b = load(c.b[t] + j), k = load(c.k[t] + j);
        const float *removed = g.removed[t] + row + i, *v = c.v[t] + row + i;
        place += group * c.key;
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) {
          s[m] = s[m] * w + removed[m] * b + v[m] * k;
          store(place + m * lanes, s[m]);
        }
      }
    }
}

// The sums of the first `block` vectors go to `first`, those of the others to `second`.
inline void keep_sums(vfloat* part, float* first, float* second) {
  float total[lanes];
  store(total, sums(part));
  std::memcpy(first, total, block * sizeof(float));
  std::memcpy(second, total + block, block * sizeof(float));
}

// Makes the adjoint of S_{t+1} that of S_t, by the update of token t + 1 and the output of token t, and takes its
// products with k_t and b_t: dv_t, and the adjoint of S_{t−1} a_t.
void step_back(const Chunk& c, const Adjoint& g, int64_t row, int64_t t, const float* d_removed, float* new_d_removed) {
  for (int64_t i = 0; i < group; i += block) {
    const float *y = g.y[t] + row + i, *w = c.next_w(t), *a = c.next_a(t), *r = c.r[t], *k = c.k[t], *b = c.b[t];
    float* adjoint = g.state + row * c.key + i * lanes;
    vfloat part[2 * block] = {};
    for (int64_t j = 0; j < c.key; j += lanes, adjoint += lanes * group) {
      const vfloat wj = load(w + j), aj = load(a + j), rj = load(r + j), kj = load(k + j), bj = load(b + j);
#pragma GCC unroll 8
      for (int m = 0; m < block; ++m) {
        const vfloat d = load(adjoint + m * lanes) * wj + d_removed[i + m] * aj + y[m] * rj;
        store(adjoint + m * lanes, d);
        part[m] += d * kj;
        part[block + m] += d * bj;
      }
    }
    keep_sums(part, g.v[t] + row + i, new_d_removed + i);
  }
}

// Adds what a group of value rows gives to the gradients of the inputs of token t, and of a_{t+1}.
void add_gradients(const Chunk& c, const Adjoint& g, int64_t row, int64_t t, const float* d_removed) {
  constexpr int pair = 2;  // so that a broadcast serves two products and sums do not wait for each other
  const float *y = g.y[t] + row, *v = c.v[t] + row, *removed = g.removed[t] + row;
  for (int64_t j = 0; j < c.key; j += pair * lanes) {
    const float *before = g.states + (t * c.key + j) * group, *after = before + group * c.key;
    const float* adjoint = g.state + row * c.key + j * group;
    vfloat dr[pair] = {}, da[pair] = {}, dw[pair] = {}, dk[pair] = {}, db[pair] = {};
    for (int64_t m = 0; m < group; ++m)
      for (int p = 0; p < pair; ++p) {
        const int64_t at = p * lanes * group + m * lanes;
        const vfloat s = load(after + at), d = load(adjoint + at);
        dr[p] += s * y[m];
        da[p] += s * d_removed[m];
        dw[p] += d * load(before + at);
        dk[p] += d * v[m];
        db[p] += d * removed[m];
      }
    for (int p = 0; p < pair; ++p) {
      const int64_t at = j + p * lanes;
      store(g.r[t] + at, load(g.r[t] + at) + dr[p]);
      store(g.a[t + 1] + at, load(g.a[t + 1] + at) + da[p]);
      store(g.w[t] + at, load(g.w[t] + at) + dw[p]);
      store(g.k[t] + at, load(g.k[t] + at) + dk[p]);
      store(g.b[t] + at, load(g.b[t] + at) + db[p]);
    }
  }
}

// Both of the above at once, with every number of a state loaded once: where there are registers for it.
void step_back_and_add(
    const Chunk& c, const Adjoint& g, int64_t row, int64_t t, const float* d_removed, float* new_d_removed) {
  for (int64_t i = 0; i < group; i += block) {
    const float *y = g.y[t] + row + i, *v = c.v[t] + row + i, *removed = g.removed[t] + row + i;
    const float *before = g.states + t * group * c.key + i * lanes, *after = before + group * c.key;
    const float *w = c.next_w(t), *a = c.next_a(t), *r = c.r[t], *k = c.k[t], *b = c.b[t], *from = d_removed + i;
    float* adjoint = g.state + row * c.key + i * lanes;
    vfloat part[2 * block] = {};
    for (int64_t j = 0, at = 0; j < c.key; j += lanes, at += lanes * group) {
      const vfloat wj = load(w + j), aj = load(a + j), rj = load(r + j), kj = load(k + j), bj = load(b + j);
      vfloat dr = load(g.r[t] + j), da = load(g.a[t + 1] + j), dw = load(g.w[t] + j);
      vfloat dk = load(g.k[t] + j), db = load(g.b[t] + j);
#pragma GCC unroll 8
      for (int m = 0; m < block; ++m) {
        const vfloat s = load(after + at + m * lanes);
        dr += s * y[m];
        da += s * from[m];
        const vfloat d = load(adjoint + at + m * lanes) * wj + from[m] * aj + y[m] * rj;
        store(adjoint + at + m * lanes, d);
        dw += d * load(before + at + m * lanes);
        dk += d * v[m];
        db += d * removed[m];
        part[m] += d * kj;
        part[block + m] += d * bj;
      }
      store(g.r[t] + j, dr);
      store(g.a[t + 1] + j, da);
      store(g.w[t] + j, dw);
      store(g.k[t] + j, dk);
      store(g.b[t] + j, db);
    }
    keep_sums(part, g.v[t] + row + i, new_d_removed + i);
  }
}

// Takes the update of the chunk's first token back.
void leave_chunk(const Chunk& c, const Adjoint& g, int64_t row, const float* d_removed) {
  for (int64_t j = 0; j < c.key; j += lanes) {
    const vfloat w = load(c.w[0] + j), a = load(c.a[0] + j);
    vfloat da = load(g.a[0] + j);
    for (int64_t i = 0; i < group; ++i) {
      float* adjoint = g.state + row * c.key + j * group + i * lanes;
      da += load(g.states + j * group + i * lanes) * d_removed[i];
      store(adjoint, load(adjoint) * w + d_removed[i] * a);
    }
    store(g.a[0] + j, da);
  }
}

void backward_chunk(const Chunk& c, const Adjoint& g, const float* checkpoint) {
  for (const Made& x : {g.r, g.w, g.k, g.b}) fill(x.first, c.tokens * c.key, 0);
  fill(g.a.first, (c.tokens + 1) * c.key, 0);
  for (int64_t row = 0; row < c.value; row += group) {
    std::memcpy(g.states, checkpoint + row * c.key, group * c.key * sizeof(float));
    replay(c, g, row);
    float d_removed[2][group] = {};  // adjoint of S_t a_{t+1}, and of S_{t−1} a_t
    for (int64_t t = c.tokens - 1; t >= 0; --t) {
      if constexpr (many_registers) {
        step_back_and_add(c, g, row, t, d_removed[0], d_removed[1]);
      } else {
        step_back(c, g, row, t, d_removed[0], d_removed[1]);
        add_gradients(c, g, row, t, d_removed[0]);
      }
      std::memcpy(d_removed[0], d_removed[1], sizeof d_removed[0]);
    }
    leave_chunk(c, g, row, d_removed[0]);
  }
  for (int64_t j = 0; j < c.tokens * c.key; j += lanes) store(g.w.first + j, load(g.w.first + j) * load(c.w.first + j));
}

void backward(
    const Wkv7Shape& shape, const Wkv7Inputs& in, const Wkv7Results& kept, const Wkv7Grads& grads, int64_t row,
    int64_t head) {
  const int64_t key = shape.key, value = shape.value, square = key * value;
  const int64_t adjoint_floats = chunk * (5 * key + 2 * value) + key + (chunk + 1) * group * key + square;
  Pieces pieces{scratch(chunk_floats(key, value) + adjoint_floats + 10 * gap)};
  Chunk c = make_chunk(shape, pieces);
  Adjoint g{};
  for (Made* x : {&g.r, &g.w, &g.k, &g.b}) *x = {pieces.take(chunk * key), key};
  g.a = {pieces.take((chunk + 1) * key), key};
  g.v = {pieces.take(chunk * value), value};
  float* y_room = pieces.take(chunk * value);
  g.states = pieces.take((chunk + 1) * group * key);
  g.state = pieces.take(square);
  const auto keys = [&](const Wkv7Tensor& x) { return Head{x, shape.heads, head, key}; };
  const auto values = [&](const Wkv7Tensor& x) { return Head{x, shape.heads, head, value}; };

  const int64_t place = (row * shape.heads + head) * square, start = shape.starts[row], end = shape.starts[row + 1];
  for (int64_t i = 0; i < value; ++i)
    for (int64_t j = 0; j < key; j += lanes)
      store(g.state + tiled(i, j, key), grads.state ? load(grads.state + place + i * key + j) : vfloat{});
  for (int64_t n = (end - start + chunk - 1) / chunk - 1; n >= 0; --n) {
    const int64_t first = start + n * chunk;
    read_chunk(shape, in, head, first, end, c);
    g.y = values(grads.y).read(first, c.tokens, y_room);
    g.removed = values({kept.removed, false}).read(first, c.tokens, nullptr);
    backward_chunk(c, g, kept.checkpoints + ((shape.chunks[row] + n) * shape.heads + head) * square);
    keys(grads.r).write(first, c.tokens, g.r);
    keys(grads.log_w).write(first, c.tokens, g.w);
    keys(grads.k).write(first, c.tokens, g.k);
    keys(grads.a).write(first, c.tokens, g.a);
    keys(grads.b).write(first, c.tokens, g.b);
    values(grads.v).write(first, c.tokens, g.v);
  }
  for (int64_t i = 0; i < value; ++i)
    for (int64_t j = 0; j < key; j += lanes)
      store(grads.initial_state + place + i * key + j, load(g.state + tiled(i, j, key)));
}

}  // namespace
}  // namespace ROOKERY_ISA

const Wkv7Kernels ROOKERY_ISA::wkv7{ROOKERY_ISA::advance, ROOKERY_ISA::forward, ROOKERY_ISA::backward};

}  // namespace rookery
