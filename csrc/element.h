// What the sweeps do to one element, and the 16-bit weight formats.
#pragma once

#include "philox.h"

namespace zo_fused {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// ---- update formulas: the order of roundings is part of the specification ----------------------

// The start of every weight update: one rounded product.
template <class L>
ZO_HD typename L::F32 decayed(typename L::F32 weight, float decay) {
  return L::mul(weight, L::splat(decay));
}

// acc + coeff * z. Also the low-rank update, with z the product of the factors.
template <class L>
ZO_HD typename L::F32 step(typename L::F32 acc, float coeff, typename L::F32 z) {
  return L::fma(L::splat(coeff), z, acc);
}

// moment = beta * moment + grad * u; returns restore * u + step * moment.
template <class L>
ZO_HD typename L::F32 momentum(typename L::F32& moment, typename L::F32 u, float beta, float grad,
                               float restore, float step) {
  moment = L::fma(L::splat(grad), u, L::mul(moment, L::splat(beta)));
  return L::fma(L::splat(step), moment, L::mul(u, L::splat(restore)));
}

// ---- conversions of one number on the bits: for machines without an instruction ----------------

ZO_HD uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

ZO_HD float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

ZO_HD float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even.
ZO_HD BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

ZO_HD float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: an integer times 2^-24; the product is exact.
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}

// Round to nearest, ties to even; overflow to infinity.
ZO_HD Half to_half(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};   // NaN
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // >= 65520
  if (magnitude >= 0x38800000u) {                                                // >= 2^-14: normal
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
  }
  // Subnormal: at 0.5 the spacing of floats is 2^-24, so the sum rounds to the bits of the result.
  const uint32_t sum = bits_of(float_of(magnitude) + 0.5f);
  return {static_cast<uint16_t>(sign | (sum - bits_of(0.5f)))};
}

}  // namespace zo_fused
