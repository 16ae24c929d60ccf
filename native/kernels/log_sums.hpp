// Sums of exponentials over tokens, in vectors of channels. They are kept as multiples of e^top, where top is the
// largest exponent in them, so that every exponential taken here is of a number ≤ 0.
#pragma once

#include <cstdint>

#include "core/math.hpp"
#include "kernels/sequences.hpp"

namespace rookery {
namespace ROOKERY_ISA {

// The exponent of sums without a token: e to it is zero, and sums with it stay finite.
constexpr float nothing = -1e38f;

// Loads and stores `lanes` numbers, or the first few of them, of a tensor [tokens, channels].
template <class Width>
inline vfloat get(const HeadTensor& x, std::int64_t at, Width width) {
  if (!x.data) return vfloat{};
  if (x.bfloat16) return load(static_cast<const std::uint16_t*>(x.data) + at, width);
  return load(static_cast<const float*>(x.data) + at, width);
}

template <class Width>
inline void put(const HeadTensor& x, std::int64_t at, vfloat value, Width width) {
  if (x.bfloat16)
    store(static_cast<std::uint16_t*>(x.data) + at, value, width);
  else
    store(static_cast<float*>(x.data) + at, value, width);
}

// e^x for x ≤ 0, 0 where float32 has no more than a few digits of it.
inline vfloat falling(vfloat x) {
  const vfloat e = exp(x);
  return x < splat(-87.0f) ? vfloat{} : e;
}

// A log decay may be −∞, which has no place in the arithmetic of `add`.
inline vfloat bounded(vfloat log_w) {
  const vfloat lowest = splat(-1e37f);
  return log_w < lowest ? lowest : log_w;
}

// An exponent in two parts. A slow decay is added to it once per token, and rounded every time in the same direction:
// in one float32, 1000 tokens would shift the weight of what is old by up to 1e-3.
struct Exponent {
  vfloat high, low;
};

inline Exponent operator-(Exponent x) { return {-x.high, -x.low}; }

// x + step, exactly but for the rounding of the lower part.
inline Exponent add(Exponent x, vfloat step) {
  const vfloat y = step + x.low, sum = x.high + y, moved = sum - x.high;
  return {sum, (x.high - (sum - moved)) + (y - moved)};
}

// e^(x − top) and e^(y − top) for top = max(x, y): one of them is 1.
struct Pair {
  vfloat x, y;
  Exponent top;
};

inline Pair against_larger(Exponent x, Exponent y) {
  const vfloat gap = (x.high - y.high) + (x.low - y.low), zero{}, one = splat(1.0f);
  const vfloat small = falling(gap > zero ? -gap : gap);
  const Exponent top{gap > zero ? x.high : y.high, gap > zero ? x.low : y.low};
  return {gap > zero ? one : small, gap > zero ? small : one, top};
}

// Sums of e^k v and of e^k, as multiples of e^top.
struct Sums {
  vfloat weighted, total;
  Exponent top;
};

// Moves the sums past a token; returns by what the old sums and the token were scaled.
inline Pair move_past(Sums& s, vfloat log_w, vfloat k, vfloat v) {
  const Pair e = against_larger(add(s.top, log_w), {k, vfloat{}});
  s = {e.x * s.weighted + e.y * v, e.x * s.total + e.y, e.top};
  return e;
}

// What a token weighs beside the sums before it in its own output.
inline Pair weigh(const Sums& s, vfloat u, vfloat k) { return against_larger(s.top, {u + k, vfloat{}}); }

template <class Width>
inline Sums load_sums(const float* state, std::int64_t channels, std::int64_t j, Width width) {
  return {load(state + j, width), load(state + channels + j, width), {load(state + 2 * channels + j, width), vfloat{}}};
}

// The same sums with an exponent of one part.
inline Sums rounded(const Sums& s) {
  // e^low = 1 + low, as low is no more than a rounding of high; the sum itself would round low away
  return {s.weighted + s.weighted * s.top.low, s.total + s.total * s.top.low, {s.top.high, vfloat{}}};
}

template <class Width>
inline void store_sums(float* state, std::int64_t channels, std::int64_t j, const Sums& s, Width width) {
  const Sums r = rounded(s);
  store(state + j, r.weighted, width);
  store(state + channels + j, r.total, width);
  store(state + 2 * channels + j, r.top.high, width);
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
