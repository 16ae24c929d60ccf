// Vectors of the width of the instruction set that a kernel file is being compiled for (GCC and Clang extensions).
#pragma once

#include <cstdint>
#include <cstring>

namespace rookery {
namespace ROOKERY_ISA {

constexpr int lanes = ROOKERY_VECTOR_BYTES / 4;
typedef float vfloat __attribute__((vector_size(ROOKERY_VECTOR_BYTES)));
typedef std::int32_t vint __attribute__((vector_size(ROOKERY_VECTOR_BYTES)));
typedef std::uint16_t vhalf __attribute__((vector_size(ROOKERY_VECTOR_BYTES / 2)));

inline vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

inline vfloat splat(float x) { return x - vfloat{}; }

// bfloat16 is the upper half of a float32.
inline vfloat load(const std::uint16_t* p) {
  vhalf h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vint) << 16);
}

// Rounds to the nearest bfloat16, ties to even; not a number stays one.
inline void store(std::uint16_t* p, vfloat v) {
  const vint bits = (vint)v;
  const vint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vint kept = v == v ? rounded : (bits >> 16) | 0x40;
  const vhalf h = __builtin_convertvector(kept, vhalf);
  std::memcpy(p, &h, sizeof h);
}

inline float sum(vfloat v) {
  float total = 0;
  for (int i = 0; i < lanes; ++i) total += v[i];
  return total;
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
