// Two vectors where L has one. The arithmetic of the two is independent, and interleaved it keeps
// the execution ports busy through the long chains of Philox and of the normals.
#pragma once

#include "../element.h"

namespace zo_fused {

template <class L>
struct Twice {
  using One = L;
  static constexpr int lanes = 2 * L::lanes;
  struct F32 {
    typename L::F32 a, b;
  };
  struct U32 {
    typename L::U32 a, b;
  };
  struct Word {
    typename L::Word a, b;
  };
  struct Product {
    typename L::Product a, b;
  };

  // Philox: a has counters first .. first + L::lanes, b those that follow.
  ZO_HD static Word counters(uint32_t first) {
    return {L::counters(first), L::counters(first + L::lanes)};
  }
  ZO_HD static Word word(uint32_t x) { return {L::word(x), L::word(x)}; }
  ZO_HD static Product product(Word x, uint32_t y) {
    return {L::product(x.a, y), L::product(x.b, y)};
  }
  ZO_HD static Word high(Product p) { return {L::high(p.a), L::high(p.b)}; }
  ZO_HD static Word low(Product p) { return {L::low(p.a), L::low(p.b)}; }
  ZO_HD static Word xor3(Word x, Word y, uint32_t k) {
    return {L::xor3(x.a, y.a, k), L::xor3(x.b, y.b, k)};
  }
  ZO_HD static U32 join(Word x) { return {L::join(x.a), L::join(x.b)}; }

  // integers
  ZO_HD static U32 splat(uint32_t x) { return {L::splat(x), L::splat(x)}; }
  ZO_HD static U32 add(U32 x, U32 y) { return {L::add(x.a, y.a), L::add(x.b, y.b)}; }
  ZO_HD static U32 sub(U32 x, U32 y) { return {L::sub(x.a, y.a), L::sub(x.b, y.b)}; }
  ZO_HD static U32 min(U32 x, U32 y) { return {L::min(x.a, y.a), L::min(x.b, y.b)}; }
  ZO_HD static U32 max(U32 x, U32 y) { return {L::max(x.a, y.a), L::max(x.b, y.b)}; }
  ZO_HD static U32 shr(U32 x, int bits) { return {L::shr(x.a, bits), L::shr(x.b, bits)}; }
  ZO_HD static U32 and_or(U32 x, uint32_t mask, uint32_t set) {
    return {L::and_or(x.a, mask, set), L::and_or(x.b, mask, set)};
  }
  ZO_HD static U32 xor_and(U32 x, U32 y, uint32_t mask) {
    return {L::xor_and(x.a, y.a, mask), L::xor_and(x.b, y.b, mask)};
  }

  // between the two
  ZO_HD static U32 bits(F32 x) { return {L::bits(x.a), L::bits(x.b)}; }
  ZO_HD static F32 as_float(U32 x) { return {L::as_float(x.a), L::as_float(x.b)}; }
  ZO_HD static F32 to_float(U32 x) { return {L::to_float(x.a), L::to_float(x.b)}; }

  // floats
  ZO_HD static F32 splat(float x) { return {L::splat(x), L::splat(x)}; }
  ZO_HD static F32 add(F32 x, F32 y) { return {L::add(x.a, y.a), L::add(x.b, y.b)}; }
  ZO_HD static F32 sub(F32 x, F32 y) { return {L::sub(x.a, y.a), L::sub(x.b, y.b)}; }
  ZO_HD static F32 mul(F32 x, F32 y) { return {L::mul(x.a, y.a), L::mul(x.b, y.b)}; }
  ZO_HD static F32 div(F32 x, F32 y) { return {L::div(x.a, y.a), L::div(x.b, y.b)}; }
  ZO_HD static F32 sqrt(F32 x) { return {L::sqrt(x.a), L::sqrt(x.b)}; }
  ZO_HD static F32 fma(F32 x, F32 y, F32 z) {
    return {L::fma(x.a, y.a, z.a), L::fma(x.b, y.b, z.b)};
  }
  ZO_HD static F32 fnma(F32 x, F32 y, F32 z) {
    return {L::fnma(x.a, y.a, z.a), L::fnma(x.b, y.b, z.b)};
  }
  ZO_HD static F32 ones(uint32_t bits) { return {L::ones(bits), L::ones(bits >> L::lanes)}; }
  ZO_HD static F32 at_least(F32 x, float floor) {
    return {L::at_least(x.a, floor), L::at_least(x.b, floor)};
  }
  ZO_HD static F32 choose(uint32_t bits, F32 x, F32 y) {
    return {L::choose(bits, x.a, y.a), L::choose(bits >> L::lanes, x.b, y.b)};
  }
  ZO_HD static F32 sign(F32 x) { return {L::sign(x.a), L::sign(x.b)}; }
  ZO_HD static U32 unless_nan(F32 x, U32 value, uint32_t nan) {
    return {L::unless_nan(x.a, value.a, nan), L::unless_nan(x.b, value.b, nan)};
  }

  // To element order: the elements of a come first.
  ZO_HD static void interleave(F32 (&z)[4]) {
    typename L::F32 a[4] = {z[0].a, z[1].a, z[2].a, z[3].a};
    typename L::F32 b[4] = {z[0].b, z[1].b, z[2].b, z[3].b};
    L::interleave(a);
    L::interleave(b);
    z[0] = {a[0], a[1]};
    z[1] = {a[2], a[3]};
    z[2] = {b[0], b[1]};
    z[3] = {b[2], b[3]};
  }

  // memory
  template <class T>
  ZO_HD static F32 load(const T* p) {
    return {L::load(p), L::load(p + L::lanes)};
  }
  template <class T>
  ZO_HD static void store(T* p, F32 x) {
    L::store(p, x.a);
    L::store(p + L::lanes, x.b);
  }
  ZO_HD static U32 load_bits(const uint16_t* p) {
    return {L::load_bits(p), L::load_bits(p + L::lanes)};
  }
  template <class T>
  ZO_HD static void store_bits(T* p, U32 x) {
    L::store_bits(p, x.a);
    L::store_bits(p + L::lanes, x.b);
  }
  ZO_HD static void store_words(uint16_t* p, U32 x) {
    L::store_words(p, x.a);
    L::store_words(p + 2 * L::lanes, x.b);
  }
};

}  // namespace zo_fused
