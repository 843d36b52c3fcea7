// 16 lanes of AVX-512 (F, BW, DQ, VL). Included inside the region compiled for that target.
#pragma once

#include "../element.h"

namespace zo_fused {

struct Avx512 {
  static constexpr int lanes = 16;
  using F32 = __m512;
  using U32 = __m512i;

  // 32-bit words in the low halves of 64-bit lanes, as vpmuludq wants them; the high halves are
  // garbage. Lane i of `even` is lane 2i of the joined vector, lane i of `odd` lane 2i + 1.
  struct Word {
    __m512i even, odd;
  };
  using Product = Word;

  // Philox. Lane 4l + j holds counter 4j + l, so that `interleave` works within 128-bit lanes.
  ZO_HD static Word counters(uint32_t first) {
    const __m512i n = _mm512_set1_epi64(first);
    return {_mm512_add_epi64(n, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11)),
            _mm512_add_epi64(n, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15))};
  }
  ZO_HD static Word word(uint32_t x) { return {_mm512_set1_epi32(x), _mm512_set1_epi32(x)}; }
  ZO_HD static Product product(Word a, uint32_t b) {
    const __m512i m = _mm512_set1_epi32(b);
    return {_mm512_mul_epu32(a.even, m), _mm512_mul_epu32(a.odd, m)};
  }
  // A shift runs on port 0 and a shuffle on port 5: one of each keeps both busy.
  ZO_HD static Word high(Product p) {
    return {_mm512_srli_epi64(p.even, 32), _mm512_shuffle_epi32(p.odd, _MM_PERM_DDBB)};
  }
  ZO_HD static Word low(Product p) { return p; }
  ZO_HD static Word xor3(Word a, Word b, uint32_t c) {
    const __m512i k = _mm512_set1_epi32(c);
    return {_mm512_ternarylogic_epi32(a.even, b.even, k, 0x96),
            _mm512_ternarylogic_epi32(a.odd, b.odd, k, 0x96)};
  }
  ZO_HD static U32 join(Word a) {
    return _mm512_mask_shuffle_epi32(a.even, 0xAAAA, a.odd, _MM_PERM_CCAA);
  }

  // integers
  ZO_HD static U32 splat(uint32_t x) { return _mm512_set1_epi32(x); }
  ZO_HD static U32 add(U32 a, U32 b) { return _mm512_add_epi32(a, b); }
  ZO_HD static U32 sub(U32 a, U32 b) { return _mm512_sub_epi32(a, b); }
  ZO_HD static U32 min(U32 a, U32 b) { return _mm512_min_epu32(a, b); }
  ZO_HD static U32 max(U32 a, U32 b) { return _mm512_max_epu32(a, b); }
  ZO_HD static U32 shr(U32 a, int bits) { return _mm512_srli_epi32(a, bits); }
  ZO_HD static U32 and_or(U32 a, uint32_t mask, uint32_t set) {
    return _mm512_ternarylogic_epi32(a, splat(mask), splat(set), 0xEA);
  }
  ZO_HD static U32 xor_and(U32 a, U32 b, uint32_t mask) {
    return _mm512_ternarylogic_epi32(a, b, splat(mask), 0x78);
  }

  // Two integers of 16 bits in a lane. First the sums of neighbouring bytes, less their mean, and
  // the differences.
  ZO_HD static void byte_pairs(U32 word, U32& sums, U32& differences) {
    sums = sub_halves(_mm512_maddubs_epi16(word, splat(0x01010101u)), splat(0x00FF00FFu));
    differences = _mm512_maddubs_epi16(word, splat(0xFF01FF01u));
  }
  ZO_HD static U32 add_halves(U32 a, U32 b) { return _mm512_add_epi16(a, b); }
  ZO_HD static U32 sub_halves(U32 a, U32 b) { return _mm512_sub_epi16(a, b); }
  ZO_HD static F32 sum(U32 packed) {
    return to_float(_mm512_madd_epi16(packed, splat(0x00010001u)));
  }
  ZO_HD static F32 difference(U32 packed) {
    return to_float(_mm512_madd_epi16(packed, splat(0xFFFF0001u)));
  }

  // between the two
  ZO_HD static U32 bits(F32 x) { return _mm512_castps_si512(x); }
  ZO_HD static F32 as_float(U32 x) { return _mm512_castsi512_ps(x); }
  ZO_HD static F32 to_float(U32 x) { return _mm512_cvtepi32_ps(x); }

  // floats
  ZO_HD static F32 splat(float x) { return _mm512_set1_ps(x); }
  ZO_HD static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  ZO_HD static F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  ZO_HD static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  ZO_HD static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  ZO_HD static F32 sqrt(F32 x) { return _mm512_sqrt_ps(x); }
  ZO_HD static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  ZO_HD static F32 fnma(F32 a, F32 b, F32 c) { return _mm512_fnmadd_ps(a, b, c); }
  ZO_HD static F32 ones(uint32_t bits) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), splat(1.0f), splat(-1.0f));
  }
  // vmaxps has its second operand where one is NaN.
  ZO_HD static F32 at_least(F32 x, float floor) { return _mm512_max_ps(x, splat(floor)); }
  ZO_HD static F32 choose(uint32_t bits, F32 a, F32 b) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
  }
  ZO_HD static F32 sign(F32 x) {
    const __mmask16 some = _mm512_cmp_ps_mask(x, splat(0.0f), _CMP_NEQ_OQ);
    const U32 one = and_or(bits(x), 0x80000000u, 0x3F800000u);
    return as_float(_mm512_maskz_mov_epi32(some, one));
  }
  ZO_HD static U32 unless_nan(F32 x, U32 value, uint32_t nan) {
    return _mm512_mask_mov_epi32(value, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), splat(nan));
  }

  // Words 0..3 of 16 counters to element order: a 4x4 transpose in every 128-bit lane.
  ZO_HD static void interleave(F32 (&z)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z[0], z[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(z[0], z[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z[2], z[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(z[2], z[3]));
    z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }

  // The quarters of 128 bits of both in turn: of a, of b, of a, ..
  ZO_HD static void zip_quads(F32& a, F32& b) {
    const U32 first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const U32 second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const U32 x = bits(a), y = bits(b);
    a = as_float(_mm512_permutex2var_epi64(x, first, y));
    b = as_float(_mm512_permutex2var_epi64(x, second, y));
  }

  // memory
  ZO_HD static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  ZO_HD static F32 load(const Half* p) { return _mm512_cvtph_ps(load_16_bits(p)); }
  ZO_HD static F32 load(const BFloat16* p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_16_bits(p)), 16));
  }
  ZO_HD static void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
  ZO_HD static void store(Half* p, F32 x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    store_16_bits(p, _mm512_cvtps_ph(x, nearest));
  }
  // As `to_bfloat16`. (vcvtneps2bf16 would flush subnormals.)
  ZO_HD static void store(BFloat16* p, F32 x) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits(x), 16), splat(1u));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits(x), splat(0x7FFFu)), odd);
    store_bits(p, unless_nan(x, shr(sum, 16), 0x7FC0u));
  }

  // 16-bit numbers, one in a lane, and in their order in words.
  ZO_HD static U32 load_bits(const uint16_t* p) { return _mm512_cvtepu16_epi32(load_16_bits(p)); }
  ZO_HD static void store_bits(void* p, U32 x) { store_16_bits(p, _mm512_cvtepi32_epi16(x)); }
  ZO_HD static void store_words(uint16_t* p, U32 x) { _mm512_storeu_si512(p, x); }

 private:
  ZO_HD static __m256i load_16_bits(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  ZO_HD static void store_16_bits(void* p, __m256i x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  }
};

}  // namespace zo_fused
