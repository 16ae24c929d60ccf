// Instructions that multiply pairs of bfloat16 numbers and add them to a float32: the second of a pair, then the first,
// rounding after each; subnormal numbers count as zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {

#if defined(__AVX512BF16__)
constexpr bool has_pairs = true;
typedef __m512i vpairs;

inline vpairs load_pairs(const std::uint16_t* p) { return _mm512_loadu_si512(p); }

inline void store_pairs(std::uint16_t* p, vpairs v) { _mm512_storeu_si512(p, v); }

// The first `count` numbers, zeros after them.
inline vpairs load_pairs(const std::uint16_t* p, std::int64_t count) {
  return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
}

// Two neighbouring numbers in every lane.
inline vpairs splat_pair(const std::uint16_t* p) {
  std::int32_t both;
  std::memcpy(&both, p, sizeof both);
  return _mm512_set1_epi32(both);
}

// Neighbouring numbers in each other's place.
inline vpairs turned(vpairs a) { return _mm512_maskz_rol_epi32(0xffff, a, 16); }

inline vfloat add_products(vfloat sum, vpairs a, vpairs b) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// Writes pairs (a[j], b[j]) to `to`.
inline void store_interleaved(std::uint16_t* to, vpairs a, vpairs b) {
  const vpairs low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
  const vpairs first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), last = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, first, high));
  _mm512_storeu_si512(to + 2 * lanes, _mm512_permutex2var_epi64(low, last, high));
}

// While it lives, float32 arithmetic of this thread takes subnormal numbers for zero, as the instructions above do.
class Flush {
 public:
  explicit Flush(bool flush) : kept_(_mm_getcsr()) {
    if (flush) _mm_setcsr(kept_ | 0x8040);
  }
  ~Flush() { _mm_setcsr(kept_); }
  Flush(const Flush&) = delete;

 private:
  unsigned kept_;
};
#else
constexpr bool has_pairs = false;

struct Flush {
  explicit Flush(bool) {}
};
#endif

}  // namespace ROOKERY_ISA
}  // namespace rookery
