// Vectors of 32-bit lanes, as wide as the instruction set that a file is compiled for. The same bits from all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define EPI_AVX512
#include <immintrin.h>
constexpr int LANES = 16;
#elif defined(__AVX2__)
#define EPI_AVX2
#include <immintrin.h>
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Two versions of one inline function that differ in their instructions must not be taken for one by the linker.
namespace {

typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));
typedef uint8_t u8 __attribute__((vector_size(LANES)));

template <class V>
inline V load(const void *from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
inline void store(void *to, V v) {
  memcpy(to, &v, sizeof v);
}

template <class To, class From>
inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From), "as() keeps the bits");
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}

inline f32 splat(float v) { return f32{} + v; }
inline i32 splat(int32_t v) { return i32{} + v; }
inline u32 splat(uint32_t v) { return u32{} + v; }

inline u32 iota() {
  u32 v;
  for (int lane = 0; lane < LANES; lane++) v[lane] = lane;
  return v;
}

// The smaller; b where a is NaN, as the instructions have it.
inline f32 min_of(f32 a, f32 b) {
#if defined(EPI_AVX512)
  return (f32)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(EPI_AVX2)
  return (f32)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// The larger; b where a is NaN.
inline f32 max_of(f32 a, f32 b) {
#if defined(EPI_AVX512)
  return (f32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(EPI_AVX2)
  return (f32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline i32 min_of(i32 a, i32 b) { return a < b ? a : b; }

inline u32 max_of(u32 a, u32 b) {
#if defined(EPI_AVX512)
  return (u32)_mm512_max_epu32((__m512i)a, (__m512i)b);
#else
  return a > b ? a : b;
#endif
}

inline f32 to_float(i32 v) {
#if defined(EPI_AVX512)
  return (f32)_mm512_cvtepi32_ps((__m512i)v);
#else
  return __builtin_convertvector(v, f32);
#endif
}

// Towards zero.
inline i32 to_int(f32 v) {
#if defined(EPI_AVX512)
  return (i32)_mm512_cvttps_epi32((__m512)v);
#else
  return __builtin_convertvector(v, i32);
#endif
}

// The largest lane.
inline uint32_t largest_of(u32 v) {
#if defined(EPI_AVX512)
  return _mm512_reduce_max_epu32((__m512i)v);
#else
  uint32_t largest = v[0];
  for (int lane = 1; lane < LANES; lane++) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

// Correctly rounded.
inline f32 root_of(f32 v) {
#if defined(EPI_AVX512)
  return (f32)_mm512_sqrt_ps((__m512)v);
#elif defined(EPI_AVX2)
  return (f32)_mm256_sqrt_ps((__m256)v);
#else
  for (int lane = 0; lane < LANES; lane++) v[lane] = std::sqrt(v[lane]);
  return v;
#endif
}

// a * b + c, of numbers whose product is exact, so that a fused operation rounds the same.
inline f32 exact_product_plus(f32 a, f32 b, f32 c) {
#if defined(EPI_AVX512)
  return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// v + 1 in the lanes where a < b.
inline i32 plus_one_where_less(i32 v, f32 a, f32 b) {
#if defined(EPI_AVX512)
  const __mmask16 less = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
  return (i32)_mm512_mask_add_epi32((__m512i)v, less, (__m512i)v, _mm512_set1_epi32(1));
#else
  return v - (a < b);
#endif
}

// The lanes of a comparison as bits.
inline uint32_t bits_of(i32 v) {
#if defined(EPI_AVX512)
  return _mm512_movepi32_mask((__m512i)v);
#elif defined(EPI_AVX2)
  return _mm256_movemask_ps((__m256)v);
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; lane++) bits |= uint32_t(v[lane] & 1) << lane;
  return bits;
#endif
}

inline u32 widen(u16 v) {
#if defined(EPI_AVX512)
  return (u32)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(EPI_AVX2)
  return (u32)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, u32);
#endif
}

inline u32 widen(u8 v) {
#if defined(EPI_AVX512)
  return (u32)_mm512_cvtepu8_epi32((__m128i)v);
#elif defined(EPI_AVX2)
  __m128i low = {};
  memcpy(&low, &v, sizeof v);
  return (u32)_mm256_cvtepu8_epi32(low);
#else
  return __builtin_convertvector(v, u32);
#endif
}

// Lanes must fit.
inline u16 narrow16(u32 v) {
#if defined(EPI_AVX512)
  return (u16)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(EPI_AVX2)
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (u16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(v, u16);
#endif
}

// Lanes must fit.
inline u8 narrow8(u32 v) {
#if defined(EPI_AVX512)
  return (u8)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(EPI_AVX2)
  const __m128i words = (__m128i)narrow16(v);
  const __m128i bytes = _mm_packus_epi16(words, words);
  u8 result;
  memcpy(&result, &bytes, sizeof result);
  return result;
#else
  return __builtin_convertvector(v, u8);
#endif
}

}  // namespace
