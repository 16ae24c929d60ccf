// Vectors of the width of the instruction set that a kernel file is being compiled for (GCC and Clang extensions).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

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

struct float16 {
  std::uint16_t bits;
};

inline vfloat load(const float16* p) {
#if defined(__AVX512F__)
  __m256i h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff, h);
#elif defined(__F16C__)
  __m128i h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)_mm256_cvtph_ps(h);
#elif defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
  float16x4_t h;
  std::memcpy(&h, p, sizeof h);
  return (vfloat)vcvt_f32_f16(h);
#else
  vhalf h;
  std::memcpy(&h, p, sizeof h);
  const vint wide = __builtin_convertvector(h, vint);
  // exponent and fraction in float32's places are 2^112 too small; infinities become 65536, which no weight is
  const vfloat size = (vfloat)((wide & 0x7fff) << 13) * 5.192296858534828e33f;
  return (vfloat)((vint)size | (wide & 0x8000) << 16);
#endif
}

// Rounds to the nearest bfloat16, ties to even; not a number stays one. AVX-512 takes subnormal numbers for zero.
inline void store(std::uint16_t* p, vfloat v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const vint bits = (vint)v;
  const vint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vint kept = v == v ? rounded : (bits >> 16) | 0x40;
  const vhalf h = __builtin_convertvector(kept, vhalf);
#endif
  std::memcpy(p, &h, sizeof h);
}

inline float sum(vfloat v) {
  float total = 0;
  for (int i = 0; i < lanes; ++i) total += v[i];
  return total;
}

// The two halves of an exchange between vectors: lane l of `keep_low` is a[l] where bit `step` of l is 0 and b[l ^ step]
// where it is 1; `keep_high` has a[l ^ step] and b[l].
template <int step, int... l>
inline vfloat keep_low(vfloat a, vfloat b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (l & step ? lanes + (l ^ step) : l)...);
#else
  return __builtin_shuffle(a, b, vint{(l & step ? lanes + (l ^ step) : l)...});
#endif
}

template <int step, int... l>
inline vfloat keep_high(vfloat a, vfloat b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (l & step ? lanes + l : l ^ step)...);
#else
  return __builtin_shuffle(a, b, vint{(l & step ? lanes + l : l ^ step)...});
#endif
}

constexpr std::make_integer_sequence<int, lanes> lane_numbers{};

// Lane l of the result is the sum over x[l]. Destroys x[0] … x[lanes − 1].
template <int step = lanes / 2>
inline vfloat sums(vfloat* x) {
#pragma GCC unroll 8
  for (int m = 0; m < step; ++m)
    x[m] = keep_low<step>(x[m], x[m + step], lane_numbers) + keep_high<step>(x[m], x[m + step], lane_numbers);
  if constexpr (step > 1)
    return sums<step / 2>(x);
  else
    return x[0];
}

// Exchanges rows and columns of x[0] … x[lanes − 1].
template <int step = lanes / 2>
inline void transpose(vfloat* x) {
#pragma GCC unroll 16
  for (int m = 0; m < lanes; ++m)
    if (!(m & step)) {
      const vfloat upper = keep_low<step>(x[m], x[m + step], lane_numbers);
      x[m + step] = keep_high<step>(x[m], x[m + step], lane_numbers);
      x[m] = upper;
    }
  if constexpr (step > 1) transpose<step / 2>(x);
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
