// The lane type of one number: the portable CPU path, and a CUDA thread.
#pragma once

#include "element.h"

namespace zo_fused {

struct Scalar {
  static constexpr int lanes = 1;
  using F32 = float;
  using U32 = uint32_t;
  using Word = uint32_t;  // of one Philox counter
  using Product = uint64_t;

  // Philox
  ZO_HD static Word counters(uint32_t first) { return first; }
  ZO_HD static Word word(uint32_t x) { return x; }
  ZO_HD static Product product(Word a, uint32_t b) { return static_cast<Product>(a) * b; }
  ZO_HD static Word high(Product p) { return static_cast<Word>(p >> 32); }
  ZO_HD static Word low(Product p) { return static_cast<Word>(p); }
  ZO_HD static Word xor3(Word a, Word b, uint32_t c) { return a ^ b ^ c; }
  ZO_HD static U32 join(Word a) { return a; }

  // integers
  ZO_HD static U32 splat(uint32_t x) { return x; }
  ZO_HD static U32 add(U32 a, U32 b) { return a + b; }
  ZO_HD static U32 sub(U32 a, U32 b) { return a - b; }
  ZO_HD static U32 min(U32 a, U32 b) { return a < b ? a : b; }
  ZO_HD static U32 max(U32 a, U32 b) { return a < b ? b : a; }
  ZO_HD static U32 shr(U32 a, int bits) { return a >> bits; }
  ZO_HD static U32 and_or(U32 a, uint32_t mask, uint32_t set) { return (a & mask) | set; }
  ZO_HD static U32 xor_and(U32 a, U32 b, uint32_t mask) { return a ^ (b & mask); }

  // Two integers lo and hi, packed as lo + 65536 hi, which + and - keep. First the sums of
  // neighbouring bytes, less their mean, and the differences.
  ZO_HD static void byte_pairs(U32 word, U32& sums, U32& differences) {
    const U32 even = word & 0x00FF00FFu, odd = word >> 8 & 0x00FF00FFu;
    sums = even + odd - 0x00FF00FFu;
    differences = even - odd;
  }
  ZO_HD static U32 add_halves(U32 a, U32 b) { return a + b; }
  ZO_HD static U32 sub_halves(U32 a, U32 b) { return a - b; }
  // lo + hi and lo - hi, for numbers in [-2048, 2048): as floats above 2^23 they are their bits.
  ZO_HD static F32 sum(U32 packed) {
    const U32 x = packed + 0x08000800u;
    return add(sub(float_of(0x4B000000u | x >> 16), 0x1.001p24f), float_of(0x4B000000u | (x & 0xFFFFu)));
  }
  ZO_HD static F32 difference(U32 packed) {
    const U32 x = packed + 0x08000800u;
    return sub(float_of(0x4B000000u | (x & 0xFFFFu)), float_of(0x4B000000u | x >> 16));
  }

  // between the two
  ZO_HD static U32 bits(F32 x) { return bits_of(x); }
  ZO_HD static F32 as_float(U32 x) { return float_of(x); }
  ZO_HD static F32 to_float(U32 x) { return static_cast<float>(static_cast<int32_t>(x)); }

  // floats
  ZO_HD static F32 splat(float x) { return x; }
#if defined(__CUDA_ARCH__)  // intrinsics, which no compiler option contracts or approximates
  ZO_HD static F32 add(F32 a, F32 b) { return __fadd_rn(a, b); }
  ZO_HD static F32 sub(F32 a, F32 b) { return __fsub_rn(a, b); }
  ZO_HD static F32 mul(F32 a, F32 b) { return __fmul_rn(a, b); }
  ZO_HD static F32 div(F32 a, F32 b) { return __fdiv_rn(a, b); }
  ZO_HD static F32 sqrt(F32 x) { return __fsqrt_rn(x); }
  ZO_HD static F32 fma(F32 a, F32 b, F32 c) { return __fmaf_rn(a, b, c); }    // a*b + c
  ZO_HD static F32 fnma(F32 a, F32 b, F32 c) { return __fmaf_rn(-a, b, c); }  // c - a*b
#else
  ZO_HD static F32 add(F32 a, F32 b) { return a + b; }
  ZO_HD static F32 sub(F32 a, F32 b) { return a - b; }
  ZO_HD static F32 mul(F32 a, F32 b) { return a * b; }
  ZO_HD static F32 div(F32 a, F32 b) { return a / b; }
  ZO_HD static F32 sqrt(F32 x) { return __builtin_sqrtf(x); }
  ZO_HD static F32 fma(F32 a, F32 b, F32 c) { return __builtin_fmaf(a, b, c); }
  ZO_HD static F32 fnma(F32 a, F32 b, F32 c) { return __builtin_fmaf(-a, b, c); }
#endif
  // -1 where a bit is set, else 1: the lowest bit is the first lane's.
  ZO_HD static F32 ones(uint32_t bits) {
    return as_float(and_or(bits << 31, 0x80000000u, 0x3F800000u));
  }
  // x, or the floor where x is not above it: also where it is NaN.
  ZO_HD static F32 at_least(F32 x, float floor) { return x > floor ? x : floor; }
  // a where a bit is set, else b: the lowest bit is the first lane's.
  ZO_HD static F32 choose(uint32_t bits, F32 a, F32 b) { return bits & 1 ? a : b; }
  // -1, 0 or 1; 0 for NaN.
  ZO_HD static F32 sign(F32 x) { return static_cast<F32>((x > 0) - (x < 0)); }
  ZO_HD static U32 unless_nan(F32 x, U32 value, uint32_t nan) { return x != x ? nan : value; }

  // Words 0..3 of the counters, one vector each, to element order.
  ZO_HD static void interleave(F32 (&)[4]) {}

  ZO_HD static F32 load(const float* p) { return *p; }
  ZO_HD static F32 load(const Half* p) { return zo_fused::to_float(*p); }
  ZO_HD static F32 load(const BFloat16* p) { return zo_fused::to_float(*p); }
  ZO_HD static void store(float* p, F32 x) { *p = x; }
  ZO_HD static void store(Half* p, F32 x) { *p = to_half(x); }
  ZO_HD static void store(BFloat16* p, F32 x) { *p = to_bfloat16(x); }

  // 16-bit numbers, one in a lane, and in their order in words.
  ZO_HD static U32 load_bits(const uint16_t* p) { return *p; }
  template <class T>
  ZO_HD static void store_bits(T* p, U32 x) {
    p->bits = static_cast<uint16_t>(x);
  }
  ZO_HD static void store_words(uint16_t* p, U32 x) {
    p[0] = static_cast<uint16_t>(x);
    p[1] = static_cast<uint16_t>(x >> 16);
  }
};

}  // namespace zo_fused
