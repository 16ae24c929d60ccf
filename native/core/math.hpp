// Element-wise functions of vectors, and loops over any number of elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {

// e^x for |x| ≤ 87, relative error below 2e-7; beyond that the value at ±87. Not a number stays one.
inline vfloat exp(vfloat x) {
  const vfloat highest = splat(87.0f), lowest = splat(-87.0f);
  x = x > highest ? highest : x;
  x = x < lowest ? lowest : x;
  // x = n ln 2 + r: adding 1.5 · 2^23 leaves the nearest integer n in the low bits; ln 2 in two parts keeps r exact
  const vfloat shifted = x * 1.44269504f + 12582912.0f;
  const vfloat n = shifted - 12582912.0f;
  const vfloat r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  // e^r = 1 + r + r² q(r) on |r| ≤ ln(2) / 2, q fitted for the smallest relative error, 3.1e-9
  const vfloat q = (((r * 0.00138145f + 0.00836878f) * r + 0.04166839f) * r + 0.1666652f) * r + 0.49999993f;
  const vfloat scale = (vfloat)(((vint)shifted + (127 - 0x4b400000)) << 23);
  return (q * (r * r) + r + 1.0f) * scale;
}

// The logistic function, 1 minus it, and their product, its slope; each accurate on both sides of zero.
struct Sigmoid {
  vfloat value, rest, slope;
};

inline Sigmoid sigmoid(vfloat x) {
  const vfloat zero{};
  const vfloat small = exp(x < zero ? x : -x);  // ≤ 1: nothing overflows
  const vfloat near = 1.0f / (1.0f + small), far = small * near;
  return {x < zero ? far : near, x < zero ? near : far, near * far};
}

// How much of a vector a step of `sweep` has: all lanes, or the first few. The others read as zero and are not written.
struct Whole {};
struct Part {
  std::size_t count;
};

template <class T>
inline vfloat load(const T* p, Whole) {
  return load(p);
}

template <class T>
inline vfloat load(const T* p, Part part) {
  T buffer[lanes] = {};
  std::memcpy(buffer, p, part.count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store(T* p, vfloat v, Whole) {
  store(p, v);
}

template <class T>
inline void store(T* p, vfloat v, Part part) {
  T buffer[lanes];
  store(buffer, v);
  std::memcpy(p, buffer, part.count * sizeof(T));
}

// Calls step(j, Whole{}) for every full vector of `count` elements, then step(j, Part{…}) for what is left.
template <class Step>
[[gnu::always_inline]] inline void sweep(std::int64_t count, Step&& step) {
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) step(j, Whole{});
  if (j < count) step(j, Part{static_cast<std::size_t>(count - j)});
}

// Writes lanes `first` … `last` − 1 of a vector to y, or adds them to what is there.
inline void give(float* y, vfloat v, bool add, std::int64_t first, std::int64_t last) {
  if (first <= 0 && last >= lanes) return store(y, add ? load(y) + v : v);
  for (std::int64_t l = first > 0 ? first : 0; l < (last < lanes ? last : lanes); ++l) y[l] = add ? y[l] + v[l] : v[l];
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
