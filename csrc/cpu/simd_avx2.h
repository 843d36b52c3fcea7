// 8 lanes of AVX2, FMA and F16C. Included inside the region compiled for that target.
#pragma once

#include "../element.h"

namespace zo_fused {

struct Avx2 {
  static constexpr int lanes = 8;
  using F32 = __m256;
  using U32 = __m256i;

  // 32-bit words in the low halves of 64-bit lanes, as vpmuludq wants them; the high halves are
  // garbage. Lane i of `even` is lane 2i of the joined vector, lane i of `odd` lane 2i + 1.
  struct Word {
    __m256i even, odd;
  };
  using Product = Word;

  // Philox. Lane 4l + j holds counter 2j + l, so that `interleave` works within 128-bit lanes.
  ZO_HD static Word counters(uint32_t first) {
    const __m256i n = _mm256_set1_epi64x(first);
    return {_mm256_add_epi64(n, _mm256_setr_epi64x(0, 4, 1, 5)),
            _mm256_add_epi64(n, _mm256_setr_epi64x(2, 6, 3, 7))};
  }
  ZO_HD static Word word(uint32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  ZO_HD static Product product(Word a, uint32_t b) {
    const __m256i m = _mm256_set1_epi32(b);
    return {_mm256_mul_epu32(a.even, m), _mm256_mul_epu32(a.odd, m)};
  }
  ZO_HD static Word high(Product p) {
    return {_mm256_srli_epi64(p.even, 32), _mm256_shuffle_epi32(p.odd, 0xF5)};
  }
  ZO_HD static Word low(Product p) { return p; }
  ZO_HD static Word xor3(Word a, Word b, uint32_t c) {
    const __m256i k = _mm256_set1_epi32(c);
    return {_mm256_xor_si256(a.even, _mm256_xor_si256(b.even, k)),
            _mm256_xor_si256(a.odd, _mm256_xor_si256(b.odd, k))};
  }
  ZO_HD static U32 join(Word a) {
    return _mm256_blend_epi32(a.even, _mm256_shuffle_epi32(a.odd, 0xA0), 0xAA);
  }

  // integers
  ZO_HD static U32 splat(uint32_t x) { return _mm256_set1_epi32(x); }
  ZO_HD static U32 add(U32 a, U32 b) { return _mm256_add_epi32(a, b); }
  ZO_HD static U32 sub(U32 a, U32 b) { return _mm256_sub_epi32(a, b); }
  ZO_HD static U32 min(U32 a, U32 b) { return _mm256_min_epu32(a, b); }
  ZO_HD static U32 max(U32 a, U32 b) { return _mm256_max_epu32(a, b); }
  ZO_HD static U32 shr(U32 a, int bits) { return _mm256_srli_epi32(a, bits); }
  ZO_HD static U32 and_or(U32 a, uint32_t mask, uint32_t set) {
    return _mm256_or_si256(_mm256_and_si256(a, splat(mask)), splat(set));
  }
  ZO_HD static U32 xor_and(U32 a, U32 b, uint32_t mask) {
    return _mm256_xor_si256(a, _mm256_and_si256(b, splat(mask)));
  }

  // Two integers of 16 bits in a lane. First the sums of neighbouring bytes, less their mean, and
  // the differences.
  ZO_HD static void byte_pairs(U32 word, U32& sums, U32& differences) {
    sums = sub_halves(_mm256_maddubs_epi16(word, splat(0x01010101u)), splat(0x00FF00FFu));
    differences = _mm256_maddubs_epi16(word, splat(0xFF01FF01u));
  }
  ZO_HD static U32 add_halves(U32 a, U32 b) { return _mm256_add_epi16(a, b); }
  ZO_HD static U32 sub_halves(U32 a, U32 b) { return _mm256_sub_epi16(a, b); }
  ZO_HD static F32 sum(U32 packed) {
    return to_float(_mm256_madd_epi16(packed, splat(0x00010001u)));
  }
  ZO_HD static F32 difference(U32 packed) {
    return to_float(_mm256_madd_epi16(packed, splat(0xFFFF0001u)));
  }

  // between the two
  ZO_HD static U32 bits(F32 x) { return _mm256_castps_si256(x); }
  ZO_HD static F32 as_float(U32 x) { return _mm256_castsi256_ps(x); }
  ZO_HD static F32 to_float(U32 x) { return _mm256_cvtepi32_ps(x); }

  // floats
  ZO_HD static F32 splat(float x) { return _mm256_set1_ps(x); }
  ZO_HD static F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
  ZO_HD static F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
  ZO_HD static F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
  ZO_HD static F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
  ZO_HD static F32 sqrt(F32 x) { return _mm256_sqrt_ps(x); }
  ZO_HD static F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
  ZO_HD static F32 fnma(F32 a, F32 b, F32 c) { return _mm256_fnmadd_ps(a, b, c); }
  ZO_HD static F32 ones(uint32_t bits) {
    const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    return as_float(and_or(_mm256_sllv_epi32(splat(bits), to_sign), 0x80000000u, 0x3F800000u));
  }
  // vmaxps has its second operand where one is NaN.
  ZO_HD static F32 at_least(F32 x, float floor) { return _mm256_max_ps(x, splat(floor)); }
  ZO_HD static F32 choose(uint32_t bits, F32 a, F32 b) {
    const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    return _mm256_blendv_ps(b, a, as_float(_mm256_sllv_epi32(splat(bits), to_sign)));
  }
  ZO_HD static F32 sign(F32 x) {
    const __m256 one = _mm256_or_ps(_mm256_and_ps(x, splat(-0.0f)), splat(1.0f));
    return _mm256_and_ps(one, _mm256_cmp_ps(x, splat(0.0f), _CMP_NEQ_OQ));
  }
  ZO_HD static U32 unless_nan(F32 x, U32 value, uint32_t nan) {
    const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return bits(_mm256_blendv_ps(as_float(value), as_float(splat(nan)), is_nan));
  }

  // Words 0..3 of 8 counters to element order: a 4x4 transpose in every 128-bit lane.
  ZO_HD static void interleave(F32 (&z)[4]) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z[0], z[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(z[0], z[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z[2], z[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(z[2], z[3]));
    z[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    z[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    z[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    z[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }

  // The quarters of 128 bits of both in turn: of a, of b, of a, ..
  ZO_HD static void zip_quads(F32& a, F32& b) {
    const F32 low = _mm256_permute2f128_ps(a, b, 0x20);
    b = _mm256_permute2f128_ps(a, b, 0x31);
    a = low;
  }

  // memory
  ZO_HD static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  ZO_HD static F32 load(const Half* p) { return _mm256_cvtph_ps(load_16_bits(p)); }
  ZO_HD static F32 load(const BFloat16* p) {
    return as_float(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16_bits(p)), 16));
  }
  ZO_HD static void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
  ZO_HD static void store(Half* p, F32 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    store_16_bits(p, _mm256_cvtps_ph(x, nearest));
  }
  // As `to_bfloat16`.
  ZO_HD static void store(BFloat16* p, F32 x) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits(x), 16), splat(1u));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits(x), splat(0x7FFFu)), odd);
    store_bits(p, unless_nan(x, shr(sum, 16), 0x7FC0u));
  }

  // 16-bit numbers, one in a lane, and in their order in words.
  ZO_HD static U32 load_bits(const uint16_t* p) { return _mm256_cvtepu16_epi32(load_16_bits(p)); }
  ZO_HD static void store_bits(void* p, U32 x) {
    const __m128i high = _mm256_extracti128_si256(x, 1);
    store_16_bits(p, _mm_packus_epi32(_mm256_castsi256_si128(x), high));
  }
  ZO_HD static void store_words(uint16_t* p, U32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
  }

 private:
  ZO_HD static __m128i load_16_bits(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  ZO_HD static void store_16_bits(void* p, __m128i x) {
    _mm_storeu_si128(static_cast<__m128i*>(p), x);
  }
};

}  // namespace zo_fused
