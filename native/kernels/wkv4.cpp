// Channels do not know of each other: lanes hold channels, and the loop runs over tokens.
#include "kernels/wkv4.hpp"

#include <utility>

#include "kernels/log_sums.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

constexpr int64_t chunk = wkv4_chunk;

// Calls work(j, width) for every vector of a task's channels, j counted from the first channel of the tensor.
template <class Work>
void each_vector(const Wkv4Shape& shape, int64_t first, Work&& work) {
  const int64_t left = shape.channels - first;
  sweep(left < wkv4_channels ? left : wkv4_channels, [&](int64_t j, auto width) { work(first + j, width); });
}

// The average over what is in the sums and a token.
inline vfloat average(const Sums& s, vfloat u, vfloat k, vfloat v) {
  const Pair e = weigh(s, u, k);
  return (e.x * s.weighted + e.y * v) / (e.x * s.total + e.y);
}

void advance(const Wkv4Piece& in, float* state, int64_t begin, int64_t end) {
  const int64_t c = in.channels;
  sweep(end - begin, [&](int64_t at, auto width) {
    const int64_t j = begin + at;
    const vfloat log_w = bounded(load(in.log_w + j, width)), u = load(in.u + j, width);
    Sums s = load_sums(state, c, j, width);
    for (int64_t t = 0; t < in.tokens; ++t) {
      const vfloat k = load(in.k + t * c + j, width), v = load(in.v + t * c + j, width);
      store(in.y + t * c + j, average(s, u, k, v), width);
      move_past(s, log_w, k, v);
      s = rounded(s);
    }
    store_sums(state, c, j, s, width);
  });
}

void forward(const Wkv4Shape& shape, const Wkv4Inputs& in, const Wkv4Results& out, int64_t row, int64_t channel) {
  const int64_t c = shape.channels, end = shape.starts[row + 1];
  float* last = out.state + row * 3 * c;
  each_vector(shape, channel, [&](int64_t j, auto width) {
    store_sums(last, c, j, load_sums(in.state + row * 3 * c, c, j, width), width);
  });
  int64_t saved = shape.chunks[row];
  // chunks outside, channels inside: the memory of neighbouring channels is in cache when their turn comes
  for (int64_t first = shape.starts[row]; first < end; first += chunk, ++saved) {
    const int64_t stop = end - first < chunk ? end : first + chunk;
    each_vector(shape, channel, [&](int64_t j, auto width) {
      const vfloat log_w = bounded(load(in.log_w + j, width)), u = load(in.u + j, width);
      Sums s = load_sums(last, c, j, width);
      if (out.checkpoints) store_sums(out.checkpoints + saved * 3 * c, c, j, s, width);
      for (int64_t t = first; t < stop; ++t) {
        const vfloat k = get(in.k, t * c + j, width), v = get(in.v, t * c + j, width);
        put(out.y, t * c + j, average(s, u, k, v), width);
        move_past(s, log_w, k, v);
      }
      store_sums(last, c, j, s, width);
    });
  }
}

// What the backward pass knows of every token of a chunk.
struct Token {
  Sums before;
  Pair step;  // of `move_past`; its top is that of the sums after the token
};

// Gradients with respect to the true sums, as multiples of e^top. That exponent and the one of the sums at the same
// place add up to 0 at most, whatever the decay (each product is a term of some later sum, divided by that sum).
struct Adjoint {
  vfloat weighted, total;
  Exponent top;
};

struct Parameters {
  vfloat log_w, u;
};

// One token of one vector of channels. `a` is of the sums after the token on entry, of those before it on return;
// returns the gradients of k and v.
inline std::pair<vfloat, vfloat> backward_token(
    const Token& token, const Parameters& p, vfloat k, vfloat v, vfloat grad_y, Adjoint& a, Parameters& grad) {
  const Sums& s = token.before;
  const Pair e = weigh(s, p.u, k);
  const vfloat divisor = e.x * s.total + e.y, y = (e.x * s.weighted + e.y * v) / divisor;
  const vfloat scaled = grad_y / divisor, own = scaled * e.y;
  // token.step scales with the sums after the token: what comes from there needs this factor
  const vfloat through = falling((token.step.top.high + a.top.high) + (token.step.top.low + a.top.low));
  const vfloat written = through * token.step.y;
  const vfloat grad_k = own * (v - y) + written * (a.weighted * v + a.total);
  const vfloat grad_v = own + written * a.weighted;
  grad.u += own * (v - y);
  grad.log_w += through * token.step.x * (a.weighted * s.weighted + a.total * s.total);
  const Pair f = against_larger(add(a.top, p.log_w), -e.top);
  a = {f.x * a.weighted + f.y * scaled, f.x * a.total - f.y * scaled * y, f.top};
  return {grad_k, grad_v};
}

// The state of the backward pass between two chunks, of one vector of channels.
struct Carried {
  Adjoint adjoint{vfloat{}, vfloat{}, {splat(wkv4_nothing), vfloat{}}};
  Parameters grad{};
};

// The chunk of tokens first … stop − 1. `last` is the gradient of the sums after it as multiples of e^(their top),
// given for the last chunk of a row, where nothing is carried yet.
template <class Width>
void backward_chunk(
    const Wkv4Shape& shape, const Wkv4Inputs& in, const float* checkpoint, const float* last, const Wkv4Grads& grads,
    int64_t first, int64_t stop, int64_t j, Width width, Carried& carried) {
  const int64_t c = shape.channels;
  const Parameters p{bounded(load(in.log_w + j, width)), load(in.u + j, width)};
  Token tokens[chunk];
  Sums s = load_sums(checkpoint, c, j, width);
  for (int64_t t = first; t < stop; ++t) {
    tokens[t - first].before = s;
    tokens[t - first].step = move_past(s, p.log_w, get(in.k, t * c + j, width), get(in.v, t * c + j, width));
  }
  if (last) carried.adjoint = {load(last + j, width), load(last + c + j, width), {-s.top.high, vfloat{}}};
  Parameters grad{};  // summed chunk by chunk: many small numbers onto one large one would lose digits
  for (int64_t t = stop - 1; t >= first; --t) {
    const int64_t at = t * c + j;
    const vfloat k = get(in.k, at, width), v = get(in.v, at, width), y = get(grads.y, at, width);
    const auto [grad_k, grad_v] = backward_token(tokens[t - first], p, k, v, y, carried.adjoint, grad);
    put(grads.k, at, grad_k, width);
    put(grads.v, at, grad_v, width);
  }
  carried.grad.log_w += grad.log_w;
  carried.grad.u += grad.u;
}

void backward(
    const Wkv4Shape& shape, const Wkv4Inputs& in, const float* checkpoints, const Wkv4Grads& grads, int64_t row,
    int64_t channel) {
  const int64_t c = shape.channels, start = shape.starts[row], end = shape.starts[row + 1];
  const float* last = grads.state ? grads.state + row * 3 * c : nullptr;
  Carried carried[wkv4_channels / lanes];
  for (int64_t n = (end - start + chunk - 1) / chunk - 1; n >= 0; --n) {
    const int64_t first = start + n * chunk;
    const bool whole = end - first >= chunk, is_last = end - first <= chunk;
    each_vector(shape, channel, [&](int64_t j, auto width) {
      backward_chunk(shape, in, checkpoints + (shape.chunks[row] + n) * 3 * c, is_last ? last : nullptr, grads, first,
                     whole ? first + chunk : end, j, width, carried[(j - channel) / lanes]);
    });
  }
  each_vector(shape, channel, [&](int64_t j, auto width) {
    const Carried& at = carried[(j - channel) / lanes];
    store(grads.log_w + row * c + j, at.grad.log_w, width);
    store(grads.u + row * c + j, at.grad.u, width);
    Sums grad{};
    if (start < end) {
      const Adjoint& a = at.adjoint;
      const vfloat through = falling((a.top.high + load(in.state + (row * 3 + 2) * c + j, width)) + a.top.low);
      grad.weighted = through * a.weighted;
      grad.total = through * a.total;
    } else if (last) {
      grad.weighted = load(last + j, width);
      grad.total = load(last + c + j, width);
    }
    store_sums(grads.initial_state + row * 3 * c, c, j, grad, width);
  });
}

}  // namespace
}  // namespace ROOKERY_ISA

const Wkv4Kernels ROOKERY_ISA::wkv4{ROOKERY_ISA::advance, ROOKERY_ISA::forward, ROOKERY_ISA::backward};

}  // namespace rookery
