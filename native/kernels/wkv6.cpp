// Forward: lanes hold value rows, the state lies [key][value] and the loop runs over keys with broadcasts, so nothing
// is summed across lanes. Backward: lanes hold keys, because then only one sum a token (for dv) runs across lanes instead
// of three; states inside a chunk are computed again from its checkpoint. Nothing is ever divided by a decay, which may
// be 0.
#include "kernels/wkv6.hpp"

#include "core/scratch.hpp"
#include "kernels/heads.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int64_t chunk = wkv6_chunk;
constexpr int tile = 4;                          // vectors of value rows that go forward together
constexpr int block = lanes == 16 ? 8 : lanes;   // value rows that go backward at once
constexpr int64_t group = lanes == 16 ? 8 : 16;  // … and one chunk after the other: their states stay in cache

// Some tokens of one head in float32.
struct Chunk {
  int64_t tokens, key, value;
  const float* u;
  Given r{}, w{}, k{}, v{};
  float* own{};  // [tokens], Σ r u k: how much a token reads of its own value
  float *room_r{}, *room_w{}, *room_k{}, *room_v{};
};

constexpr int64_t chunk_floats(int64_t key, int64_t value) {
  return chunk * (3 * key + value + 1) + 5 * Pieces::gap;
}

Chunk make_chunk(const HeadShape& shape, const Wkv6Inputs& in, int64_t head, Pieces& pieces) {
  Chunk c{0, shape.key, shape.value, in.u + head * shape.key};
  for (float** room : {&c.room_r, &c.room_w, &c.room_k}) *room = pieces.take(chunk * shape.key);
  c.room_v = pieces.take(chunk * shape.value);
  c.own = pieces.take(chunk);
  if (in.constant_decay) {
    const Given log_w = HeadRows{in.log_w, shape.heads, head, shape.key}.read(0, 1, c.room_w);
    for (int64_t j = 0; j < c.key; j += lanes) store(c.room_w + j, decay(load(log_w[0] + j)));
    c.w = {c.room_w, 0};
  }
  return c;
}

void read_own(Chunk& c) {
  for (int64_t t = 0; t < c.tokens; ++t) {
    vfloat own{};
    sweep(c.key, [&](int64_t j, auto part) {
      own += load(c.r[t] + j, part) * load(c.u + j, part) * load(c.k[t] + j, part);
    });
    c.own[t] = sum(own);
  }
}

void read_chunk(const HeadShape& shape, const Wkv6Inputs& in, int64_t head, int64_t first, int64_t end, Chunk& c) {
  const auto read = [&](const HeadTensor& x, int64_t channels, float* room) {
    return HeadRows{x, shape.heads, head, channels}.read(first, c.tokens, room);
  };
  c.tokens = end - first < chunk ? end - first : chunk;
  c.r = read(in.r, c.key, c.room_r);
  c.k = read(in.k, c.key, c.room_k);
  c.v = read(in.v, c.value, c.room_v);
  if (!in.constant_decay) {
    const Given log_w = read(in.log_w, c.key, c.room_w);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t j = 0; j < c.key; j += lanes) store(c.room_w + t * c.key + j, decay(load(log_w[t] + j)));
    c.w = {c.room_w, c.key};
  }
  read_own(c);
}

// Moves `n` vectors of value rows through the chunk, or one of which there is only a part; `state` is their part of S,
// [key][value].
template <int n, class Width = Whole>
void forward_tile(const Chunk& c, float* state, int64_t row, Made out, Width width = {}) {
  for (int64_t t = 0; t < c.tokens; ++t) {
    const float *r = c.r[t], *w = c.w[t], *k = c.k[t];
    vfloat v[n], y[n];
    for (int m = 0; m < n; ++m) {
      v[m] = load(c.v[t] + row + m * lanes, width);
      y[m] = v[m] * c.own[t];
    }
    for (int64_t j = 0; j < c.key; ++j) {
      const vfloat wj = splat(w[j]), kj = splat(k[j]), rj = splat(r[j]);
#pragma GCC unroll 4
      for (int m = 0; m < n; ++m) {
        float* place = state + j * c.value + m * lanes;
        const vfloat s = load(place, width);
        y[m] += s * rj;
        store(place, s * wj + v[m] * kj, width);
      }
    }
    for (int m = 0; m < n; ++m) store(out[t] + row + m * lanes, y[m], width);
  }
}

void forward_chunk(const Chunk& c, float* state, Made out) {
  int64_t row = 0;
  for (; row + tile * lanes <= c.value; row += tile * lanes) forward_tile<tile>(c, state + row, row, out);
  for (; row + lanes <= c.value; row += lanes) forward_tile<1>(c, state + row, row, out);
  if (row < c.value) forward_tile<1>(c, state + row, row, out, Part{static_cast<std::size_t>(c.value - row)});
}

void advance(const Wkv6Piece& in, float* state) {
  float own[chunk];
  Chunk c{0, in.key, in.value, in.u};
  c.own = own;
  for (int64_t first = 0; first < in.tokens; first += chunk) {
    const auto from = [&](const float* x, int64_t stride) { return Given{x + first * stride, stride}; };
    c.tokens = in.tokens - first < chunk ? in.tokens - first : chunk;
    c.r = from(in.r, in.stride);
    c.k = from(in.k, in.stride);
    c.v = from(in.v, in.stride);
    c.w = from(in.w, in.w_stride);
    read_own(c);
    forward_chunk(c, state, {in.y + first * in.stride, in.stride});
  }
}

void forward(
    const HeadShape& shape, const Wkv6Inputs& in, const Wkv6Results& out, int64_t row, int64_t head) {
  const int64_t key = shape.key, value = shape.value, square = key * value;
  Pieces pieces{scratch(square + chunk_floats(key, value) + chunk * value + 2 * Pieces::gap)};
  float* state = pieces.take(square);
  float* room = pieces.take(chunk * value);
  Chunk c = make_chunk(shape, in, head, pieces);
  const HeadRows results{out.y, shape.heads, head, value};
  const int64_t place = (row * shape.heads + head) * square, end = shape.starts[row + 1];
  copy_transposed(in.state + place, value, key, state);
  int64_t saved = shape.chunks[row];
  for (int64_t first = shape.starts[row]; first < end; first += chunk, ++saved) {
    read_chunk(shape, in, head, first, end, c);
    if (out.checkpoints) copy_transposed(state, key, value, out.checkpoints + (saved * shape.heads + head) * square);
    const Made y = results.place(first, room);
    forward_chunk(c, state, y);
    results.write(first, c.tokens, y);
  }
  copy_transposed(state, key, value, out.state + place);
}

// What the backward pass adds: gradients of a chunk, and the adjoint of the state.
struct Adjoint {
  Given y;           // [tokens, value]
  Made r, w, k, v;   // [tokens, key]; v [tokens, value]; w is that of the decay itself, one row where it is constant
  float* u;          // [key], sum over the row's tokens
  float* states;     // [tokens, group, key], S before every token, of a group of rows
  float* state;      // [value, key]
};

// States of a group of value rows before each token of the chunk, from the first of them.
void replay(const Chunk& c, const Adjoint& g, int64_t row) {
  const int64_t key = c.key;
  for (int64_t i = 0; i < group; i += block)
    for (int64_t j = 0; j < key; j += lanes) {
      vfloat s[block];
#pragma GCC unroll 16
      for (int m = 0; m < block; ++m) s[m] = load(g.states + (i + m) * key + j);
      for (int64_t t = 0; t + 1 < c.tokens; ++t) {
        const vfloat w = load(c.w[t] + j), k = load(c.k[t] + j);
        const float* v = c.v[t] + row + i;
        float* next = g.states + ((t + 1) * group + i) * key + j;
#pragma GCC unroll 16
        for (int m = 0; m < block; ++m) {
          s[m] = s[m] * w + v[m] * k;
          store(next + m * key, s[m]);
        }
      }
    }
}

// One token of `block` value rows, but for what it reads of its own value. The adjoint is that of S after the token on
// entry, of S before it on return.
inline void backward_token(const Chunk& c, const Adjoint& g, int64_t row, int64_t i, int64_t t) {
  const int64_t key = c.key;
  const float *y = g.y[t] + row + i, *v = c.v[t] + row + i, *before = g.states + (t * group + i) * key;
  float* adjoint = g.state + (row + i) * key;
  vfloat part[lanes] = {};
  for (int64_t j = 0; j < key; j += lanes) {
    const vfloat r = load(c.r[t] + j), w = load(c.w[t] + j), k = load(c.k[t] + j);
    vfloat dr = load(g.r[t] + j), dw = load(g.w[t] + j), dk = load(g.k[t] + j);
#pragma GCC unroll 16
    for (int m = 0; m < block; ++m) {
      const vfloat s = load(before + m * key + j), d = load(adjoint + m * key + j);
      dr += s * y[m];
      dw += d * s;
      dk += d * v[m];
      part[m] += d * k;
      store(adjoint + m * key + j, d * w + y[m] * r);
    }
    store(g.r[t] + j, dr);
    store(g.w[t] + j, dw);
    store(g.k[t] + j, dk);
  }
  float total[lanes];
  store(total, sums(part));
  std::memcpy(g.v[t] + row + i, total, block * sizeof(float));
}

// What every token reads of its own value, (Σ r u k) v.
void backward_own(const Chunk& c, const Adjoint& g) {
  for (int64_t t = 0; t < c.tokens; ++t) {
    vfloat product{};
    for (int64_t i = 0; i < c.value; i += lanes) {
      const vfloat y = load(g.y[t] + i);
      product += load(c.v[t] + i) * y;
      store(g.v[t] + i, load(g.v[t] + i) + y * c.own[t]);
    }
    const float delta = sum(product);
    for (int64_t j = 0; j < c.key; j += lanes) {
      const vfloat r = load(c.r[t] + j), k = load(c.k[t] + j), u = load(c.u + j);
      store(g.r[t] + j, load(g.r[t] + j) + u * k * delta);
      store(g.k[t] + j, load(g.k[t] + j) + u * r * delta);
      store(g.u + j, load(g.u + j) + r * k * delta);
    }
  }
}

void backward_chunk(const Chunk& c, const Adjoint& g, const float* checkpoint) {
  for (int64_t t = 0; t < c.tokens; ++t)
    for (const Made& x : {g.r, g.w, g.k}) fill(x[t], c.key, 0);
  for (int64_t row = 0; row < c.value; row += group) {
    std::memcpy(g.states, checkpoint + row * c.key, group * c.key * sizeof(float));
    replay(c, g, row);
    for (int64_t t = c.tokens - 1; t >= 0; --t)
      for (int64_t i = 0; i < group; i += block) backward_token(c, g, row, i, t);
  }
  backward_own(c, g);
}

// From the gradient of a decay to that of its logarithm; added to `total` where all tokens have the same.
void finish_decay(const Chunk& c, const Adjoint& g, float* total) {
  for (int64_t t = 0; t < (total ? 1 : c.tokens); ++t)
    for (int64_t j = 0; j < c.key; j += lanes) {
      const vfloat d = load(g.w[t] + j) * load(c.w[t] + j);
      if (total)
        store(total + j, load(total + j) + d);
      else
        store(g.w[t] + j, d);
    }
}

void backward(
    const HeadShape& shape, const Wkv6Inputs& in, const float* checkpoints, const Wkv6Grads& grads, int64_t row,
    int64_t head) {
  const int64_t key = shape.key, value = shape.value, square = key * value;
  Pieces pieces{scratch(
      chunk_floats(key, value) + chunk * (3 * key + 2 * value) + chunk * group * key + square + 7 * Pieces::gap)};
  Chunk c = make_chunk(shape, in, head, pieces);
  float *room_r = pieces.take(chunk * key), *room_w = pieces.take(chunk * key), *room_k = pieces.take(chunk * key);
  float *room_v = pieces.take(chunk * value), *room_y = pieces.take(chunk * value);
  Adjoint g{};
  g.states = pieces.take(chunk * group * key);
  g.state = pieces.take(square);
  const auto keys = [&](const HeadTensor& x) { return HeadRows{x, shape.heads, head, key}; };
  const auto values = [&](const HeadTensor& x) { return HeadRows{x, shape.heads, head, value}; };

  const int64_t number = row * shape.heads + head, start = shape.starts[row];
  float* constant = in.constant_decay ? grads.constant_log_w + number * key : nullptr;
  g.u = grads.u + number * key;
  fill(g.u, key, 0);
  if (constant) fill(constant, key, 0);
  if (grads.state)
    std::memcpy(g.state, grads.state + number * square, square * sizeof(float));
  else
    fill(g.state, square, 0);
  for (int64_t n = (shape.starts[row + 1] - start + chunk - 1) / chunk - 1; n >= 0; --n) {
    const int64_t first = start + n * chunk;
    read_chunk(shape, in, head, first, shape.starts[row + 1], c);
    g.y = values(grads.y).read(first, c.tokens, room_y);
    g.r = keys(grads.r).place(first, room_r);
    g.w = constant ? Made{room_w, 0} : keys(grads.log_w).place(first, room_w);
    g.k = keys(grads.k).place(first, room_k);
    g.v = values(grads.v).place(first, room_v);
    backward_chunk(c, g, checkpoints + ((shape.chunks[row] + n) * shape.heads + head) * square);
    finish_decay(c, g, constant);
    keys(grads.r).write(first, c.tokens, g.r);
    if (!constant) keys(grads.log_w).write(first, c.tokens, g.w);
    keys(grads.k).write(first, c.tokens, g.k);
    values(grads.v).write(first, c.tokens, g.v);
  }
  std::memcpy(grads.initial_state + number * square, g.state, square * sizeof(float));
}

}  // namespace
}  // namespace ROOKERY_ISA

const Wkv6Kernels ROOKERY_ISA::wkv6{ROOKERY_ISA::advance, ROOKERY_ISA::forward, ROOKERY_ISA::backward};

}  // namespace rookery
