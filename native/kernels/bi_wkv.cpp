// Two passes over the tokens: one sums what is before each, the other, from the end, what is after it. Lanes hold
// channels, which do not know of each other.
#include "kernels/bi_wkv.hpp"

#include <utility>

#include "core/scratch.hpp"
#include "kernels/log_sums.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

// Calls work(j, width) for every vector of a task's channels, j counted from the first channel of the tensor.
template <class Work>
void each_vector(const BiWkvShape& shape, int64_t first, Work&& work) {
  const int64_t left = shape.channels - first;
  sweep(left < bi_wkv_channels ? left : bi_wkv_channels, [&](int64_t j, auto width) { work(first + j, width); });
}

// Vectors of a token in scratch memory.
struct Kept {
  float* data;
  vfloat get(int64_t i) const { return load(data + i * lanes); }
  void put(int64_t i, vfloat x) const { store(data + i * lanes, x); }
  void put_sums(const Sums& s) const {
    const Sums r = rounded(s);
    put(0, r.weighted), put(1, r.total), put(2, r.top.high);
  }
  Sums sums() const { return {get(0), get(1), {get(2), vfloat{}}}; }
};

inline Sums no_sums() { return {vfloat{}, vfloat{}, {splat(nothing), vfloat{}}}; }

// The sum of both.
inline Sums joined(const Sums& a, const Sums& b) {
  const Pair e = against_larger(a.top, b.top);
  return {e.x * a.weighted + e.y * b.weighted, e.x * a.total + e.y * b.total, e.top};
}

inline Sums own(vfloat exponent, vfloat v) { return {v, splat(1.0f), {exponent, vfloat{}}}; }

// e^−ω, as what is added to an exponent per token.
inline vfloat step_of(vfloat omega) { return bounded(-omega); }

void forward(const BiWkvShape& shape, const BiWkvInputs& in, const HeadTensor& y, int64_t row, int64_t channel) {
  const int64_t c = shape.channels, begin = row * shape.tokens, end = begin + shape.tokens;
  float* memory = scratch(static_cast<std::size_t>(shape.tokens * 3 * lanes));
  each_vector(shape, channel, [&](int64_t j, auto width) {
    const vfloat step = step_of(load(in.omega + j, width)), mu = load(in.mu + j, width);
    Sums s = no_sums();
    for (int64_t t = begin; t < end; ++t) {
      Kept{memory + (t - begin) * 3 * lanes}.put_sums(s);
      move_past(s, step, get(in.k, t * c + j, width), get(in.v, t * c + j, width));
    }
    s = no_sums();
    for (int64_t t = end - 1; t >= begin; --t) {
      const vfloat k = get(in.k, t * c + j, width), v = get(in.v, t * c + j, width);
      const Sums all = joined(joined(Kept{memory + (t - begin) * 3 * lanes}.sums(), s), own(mu + k, v));
      put(y, t * c + j, all.weighted / all.total, width);
      move_past(s, step, k, v);
    }
  });
}

// What the outputs on one side of a token say to its key and value. As sums, they are gradients with respect to
// numerators and denominators; their exponents and those of the keys add up to 0 at most.
struct Adjoint {
  Sums s = no_sums();
  vfloat omega{};

  // Gradients of k and v through the other outputs, given e^k by its exponent. Also adds to that of ω, for `seen`: the
  // sums before the token, on the side that is not the adjoint's.
  inline std::pair<vfloat, vfloat> read(vfloat k, vfloat v, vfloat step, const Sums& seen) {
    const vfloat through = falling((s.top.high + k) + s.top.low);
    const Exponent moved = add(s.top, step);
    const vfloat passed = falling((moved.high + seen.top.high) + (moved.low + seen.top.low));
    omega -= passed * (seen.weighted * s.weighted + seen.total * s.total);
    return {through * (s.weighted * v + s.total), through * s.weighted};
  }

  // Past a token with the gradient `grad` of its output `y`, whose denominator is `total` e^top.
  inline void advance(vfloat step, vfloat grad, vfloat y, Exponent top) {
    s = joined({s.weighted, s.total, add(s.top, step)}, {grad, -grad * y, -top});
  }
};

constexpr int64_t kept = 8;    // vectors of a token: the sums before and after it, dk and dv so far
constexpr int64_t chunk = 32;  // sums of gradients are added up in two steps: many small numbers onto one large one would lose digits

// Tokens from the last to the first: all that needs the sums after them or the outputs after them.
template <class Width>
void backward_from_end(
    const BiWkvShape& shape, const BiWkvInputs& in, const BiWkvGrads& grads, float* memory, int64_t begin, int64_t j,
    Width width, vfloat& grad_omega, vfloat& grad_mu) {
  const int64_t c = shape.channels;
  const vfloat step = step_of(load(in.omega + j, width)), mu = load(in.mu + j, width);
  Sums after = no_sums();
  Adjoint later;
  vfloat some_mu{};
  for (int64_t t = shape.tokens - 1; t >= 0; --t) {
    const int64_t at = (begin + t) * c + j;
    const vfloat k = get(in.k, at, width), v = get(in.v, at, width), grad_y = get(grads.y, at, width);
    const Kept past{memory + t * kept * lanes}, future{past.data + 3 * lanes}, rest{past.data + 6 * lanes};
    const Sums all = joined(joined(past.sums(), after), own(mu + k, v));
    const vfloat y = all.weighted / all.total, scaled = grad_y / all.total;
    const vfloat weight = scaled * falling((mu + k - all.top.high) - all.top.low);
    const auto [grad_k, grad_v] = later.read(k, v, step, past.sums());
    future.put_sums(after);
    some_mu += weight * (v - y);
    rest.put(0, grad_k + weight * (v - y)), rest.put(1, grad_v + weight);
    later.advance(step, scaled, y, all.top);
    move_past(after, step, k, v);
    if (t % chunk == 0) {
      grad_omega += later.omega, grad_mu += some_mu;
      later.omega = some_mu = vfloat{};
    }
  }
}

void backward(
    const BiWkvShape& shape, const BiWkvInputs& in, const BiWkvGrads& grads, int64_t row, int64_t channel) {
  const int64_t c = shape.channels, begin = row * shape.tokens;
  float* memory = scratch(static_cast<std::size_t>(shape.tokens * kept * lanes));
  each_vector(shape, channel, [&](int64_t j, auto width) {
    const vfloat step = step_of(load(in.omega + j, width)), mu = load(in.mu + j, width);
    Sums before = no_sums();
    for (int64_t t = 0; t < shape.tokens; ++t) {
      Kept{memory + t * kept * lanes}.put_sums(before);
      move_past(before, step, get(in.k, (begin + t) * c + j, width), get(in.v, (begin + t) * c + j, width));
    }
    vfloat grad_omega{}, grad_mu{};
    backward_from_end(shape, in, grads, memory, begin, j, width, grad_omega, grad_mu);
    Adjoint earlier;
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const int64_t at = (begin + t) * c + j;
      const vfloat k = get(in.k, at, width), v = get(in.v, at, width);
      const Kept past{memory + t * kept * lanes}, future{past.data + 3 * lanes}, rest{past.data + 6 * lanes};
      const auto [grad_k, grad_v] = earlier.read(k, v, step, future.sums());
      put(grads.k, at, rest.get(0) + grad_k, width);
      put(grads.v, at, rest.get(1) + grad_v, width);
      const Sums all = joined(joined(past.sums(), future.sums()), own(mu + k, v));
      earlier.advance(step, get(grads.y, at, width) / all.total, all.weighted / all.total, all.top);
      if (t % chunk == chunk - 1 || t + 1 == shape.tokens) {
        grad_omega += earlier.omega;
        earlier.omega = vfloat{};
      }
    }
    store(grads.omega + row * c + j, grad_omega, width);
    store(grads.mu + row * c + j, grad_mu, width);
  });
}

}  // namespace
}  // namespace ROOKERY_ISA

const BiWkvKernels ROOKERY_ISA::bi_wkv{ROOKERY_ISA::forward, ROOKERY_ISA::backward};

}  // namespace rookery
