// Vectors of bytes for packed matrices: sums of four products, tables of 16 levels, interleaving.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "core/simd.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace rookery {
namespace ROOKERY_ISA {

constexpr int vector_bytes = ROOKERY_VECTOR_BYTES;
typedef std::uint8_t vbytes __attribute__((vector_size(ROOKERY_VECTOR_BYTES)));

inline vbytes load_bytes(const std::uint8_t* p) {
  vbytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_bytes(std::uint8_t* p, vbytes v) { std::memcpy(p, &v, sizeof v); }

// Whether `dot4` takes weights + 128, as they are stored, so that the sum must begin with `Integers::balance`.
#if defined(__AVX512VNNI__)
constexpr bool is_balanced = true;
inline vbytes weights_of(vbytes stored) { return stored; }
#else
constexpr bool is_balanced = false;
inline vbytes weights_of(vbytes stored) { return stored ^ 0x80; }
#endif

// In each lane: sum + the four weights there times the four numbers in `x`, whole numbers from -127 to 127.
inline vint dot4(vint sum, vbytes weights, std::int32_t x) {
#if defined(__AVX512VNNI__)
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  // sizes of the weights times the numbers with the weights' signs: pairs add up to 127 · 128 · 2 < 2^15
  const __m256i w = (__m256i)weights, signed_x = _mm256_sign_epi8(_mm256_set1_epi32(x), w);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x);
  return sum + (vint)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__x86_64__)
  const __m128i zero = _mm_setzero_si128(), w = (__m128i)weights, four = _mm_cvtsi32_si128(x);
  const __m128i wide_x = _mm_srai_epi16(_mm_unpacklo_epi8(zero, _mm_unpacklo_epi32(four, four)), 8);
  const __m128i low = _mm_madd_epi16(_mm_srai_epi16(_mm_unpacklo_epi8(zero, w), 8), wide_x);
  const __m128i high = _mm_madd_epi16(_mm_srai_epi16(_mm_unpackhi_epi8(zero, w), 8), wide_x);
  const __m128 even = _mm_shuffle_ps((__m128)low, (__m128)high, 0x88), odd = _mm_shuffle_ps((__m128)low, (__m128)high, 0xdd);
  return sum + (vint)even + (vint)odd;
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vint)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
  const int8x16_t w = (int8x16_t)weights, four = vreinterpretq_s8_s32(vdupq_n_s32(x));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four)), high = vmull_high_s8(w, four);
  return sum + (vint)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
  std::int8_t four[4];
  std::memcpy(four, &x, 4);
  for (int lane = 0; lane < lanes; ++lane)
    for (int i = 0; i < 4; ++i) sum[lane] += static_cast<std::int8_t>(weights[4 * lane + i]) * four[i];
  return sum;
#endif
}

// Sixteen levels, stored as numbers + 128.
struct Levels {
  vbytes table;

  explicit Levels(const std::array<std::int8_t, 16>& levels) {
    for (int i = 0; i < vector_bytes; ++i)
      table[i] = static_cast<std::uint8_t>(levels[static_cast<std::size_t>(i % 16)] + 128);
  }

  // The levels of the codes in the low halves of bytes.
  vbytes operator()(vbytes codes) const {
#if defined(__AVX512VBMI__)
    // looks at six bits, the table repeats; the plain form warns in GCC 12
    return (vbytes)_mm512_maskz_permutexvar_epi8(~0ull, (__m512i)codes, (__m512i)table);
#elif defined(__AVX2__)
    return (vbytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)(codes & 15));
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (vbytes)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)(codes & 15));
#else
    std::uint8_t all[vector_bytes], at[vector_bytes], levels[vector_bytes];  // faster than lanes taken one by one
    store_bytes(all, table);
    store_bytes(at, codes);
    for (int i = 0; i < vector_bytes; ++i) levels[i] = all[at[i] & 15];
    return load_bytes(levels);
#endif
  }
};

// Bytes whose low halves are the high halves of `packed`; the others hold anything.
inline vbytes high_codes(vbytes packed) {
  typedef std::uint16_t vpairs __attribute__((vector_size(ROOKERY_VECTOR_BYTES)));
  return (vbytes)((vpairs)packed >> 4);  // x86 has no shift of bytes
}

// Within every 16 bytes: a0 b0 a1 b1 … of the lower or the upper halves, in steps of bytes or pairs.
#if defined(__AVX512BW__)
inline vbytes zip_low(vbytes a, vbytes b) { return (vbytes)_mm512_unpacklo_epi8((__m512i)a, (__m512i)b); }
inline vbytes zip_high(vbytes a, vbytes b) { return (vbytes)_mm512_unpackhi_epi8((__m512i)a, (__m512i)b); }
inline vbytes zip_pairs_low(vbytes a, vbytes b) { return (vbytes)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b); }
inline vbytes zip_pairs_high(vbytes a, vbytes b) { return (vbytes)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline vbytes zip_low(vbytes a, vbytes b) { return (vbytes)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b); }
inline vbytes zip_high(vbytes a, vbytes b) { return (vbytes)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b); }
inline vbytes zip_pairs_low(vbytes a, vbytes b) { return (vbytes)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b); }
inline vbytes zip_pairs_high(vbytes a, vbytes b) { return (vbytes)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b); }
#elif defined(__x86_64__)
inline vbytes zip_low(vbytes a, vbytes b) { return (vbytes)_mm_unpacklo_epi8((__m128i)a, (__m128i)b); }
inline vbytes zip_high(vbytes a, vbytes b) { return (vbytes)_mm_unpackhi_epi8((__m128i)a, (__m128i)b); }
inline vbytes zip_pairs_low(vbytes a, vbytes b) { return (vbytes)_mm_unpacklo_epi16((__m128i)a, (__m128i)b); }
inline vbytes zip_pairs_high(vbytes a, vbytes b) { return (vbytes)_mm_unpackhi_epi16((__m128i)a, (__m128i)b); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
inline vbytes zip_low(vbytes a, vbytes b) { return (vbytes)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b); }
inline vbytes zip_high(vbytes a, vbytes b) { return (vbytes)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b); }
inline vbytes zip_pairs_low(vbytes a, vbytes b) { return (vbytes)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b); }
inline vbytes zip_pairs_high(vbytes a, vbytes b) { return (vbytes)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b); }
#else
inline vbytes zip(vbytes a, vbytes b, int first, int step) {
  vbytes zipped;
  for (int i = 0; i < 16; ++i) {
    const int from = first + i / (2 * step) * step + i % step;
    zipped[i] = i / step % 2 ? b[from] : a[from];
  }
  return zipped;
}
inline vbytes zip_low(vbytes a, vbytes b) { return zip(a, b, 0, 1); }
inline vbytes zip_high(vbytes a, vbytes b) { return zip(a, b, 8, 1); }
inline vbytes zip_pairs_low(vbytes a, vbytes b) { return zip(a, b, 0, 2); }
inline vbytes zip_pairs_high(vbytes a, vbytes b) { return zip(a, b, 8, 2); }
#endif

// Four rows -> four vectors of four bytes from each; see `Packing`.
inline void interleave(const vbytes* rows, vbytes* mixed) {
  const vbytes low01 = zip_low(rows[0], rows[1]), high01 = zip_high(rows[0], rows[1]);
  const vbytes low23 = zip_low(rows[2], rows[3]), high23 = zip_high(rows[2], rows[3]);
  mixed[0] = zip_pairs_low(low01, low23);
  mixed[1] = zip_pairs_high(low01, low23);
  mixed[2] = zip_pairs_low(high01, high23);
  mixed[3] = zip_pairs_high(high01, high23);
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
