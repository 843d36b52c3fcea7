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

// Whether weights of this type are rounded.
template <class T>
inline constexpr bool rounds = sizeof(T) == 2;

enum class Rule { momentum, sign, adam, hizoo };

// How words become normals or signs. Only GPUs have `fast`.
enum class Transform { portable, signs, hadamard, fast };

// A parameter's row of coefficients.
struct MomentCoeffs {
  float beta, gain, beta2, gain2, eps, step;
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

// A factor's momentum, in three roundings.
template <class L>
ZO_HD typename L::F32 momentum(typename L::F32 moment, typename L::F32 u, float coeff,
                               float decay) {
  return L::add(L::mul(moment, L::splat(decay)), L::mul(u, L::splat(coeff)));
}

// What Adam moves a weight by, but for the factor `step`.
template <class L>
ZO_HD typename L::F32 adam(typename L::F32 first, typename L::F32 second, float eps) {
  return L::div(first, L::add(L::sqrt(second), L::splat(eps)));
}

// second + square * z^2: one direction of a second moment that is not kept.
template <class L>
ZO_HD typename L::F32 add_square(typename L::F32 second, float square, typename L::F32 z) {
  return L::fma(L::mul(L::splat(square), z), z, second);
}

// HiZOO's Hessian after a step whose directions have the sum v of squares.
template <class L>
ZO_HD typename L::F32 new_hessian(typename L::F32 hessian, typename L::F32 v,
                                  const MomentCoeffs& c) {
  return L::at_least(L::fma(v, hessian, L::mul(hessian, L::splat(c.beta2))), c.eps);
}

// The estimate g goes into the first moment, which is `kept` from step to step or not, and with
// Adam into the second. Returns what the weight is then moved by, but for the factor `step`.
template <class L, Rule rule, bool kept>
ZO_HD typename L::F32 moments(typename L::F32 g, typename L::F32& first, typename L::F32& second,
                              const MomentCoeffs& c) {
  const auto gain = L::splat(c.gain);
  if constexpr (kept) {
    first = L::fma(gain, g, L::mul(first, L::splat(c.beta)));
  } else {
    first = L::mul(g, gain);
  }
  if constexpr (rule == Rule::adam) {
    second = L::fma(L::mul(g, L::splat(c.gain2)), g, L::mul(second, L::splat(c.beta2)));
    return adam<L>(first, second, c.eps);
  } else if constexpr (rule == Rule::sign) {
    return L::sign(first);
  } else {
    return first;
  }
}

// ---- stochastic rounding: the bits of x in 16, by a random number below 2^16 -------------------

template <class L>
ZO_HD typename L::U32 stochastic(BFloat16, typename L::F32 x, typename L::U32 random) {
  return L::unless_nan(x, L::shr(L::add(L::bits(x), random), 16), 0x7FC0u);
}

template <class L>
ZO_HD typename L::U32 stochastic(Half, typename L::F32 x, typename L::U32 random) {
  // The specification takes the bits of |x| * 2^-112. Products that are subnormal are slow on many
  // CPUs. `shifted` is those bits plus 112 << 23 without a product: where it would be normal, they
  // are the bits of |x|. Elsewhere (|x| < 2^-14) the sum rounds |x| to the same multiple of 2^-37,
  // the spacing of floats at 2^-14. The wrong one of the two is the smaller.
  const auto magnitude = L::and_or(L::bits(x), 0x7FFFFFFFu, 0u);
  const auto sum = L::bits(L::add(L::as_float(magnitude), L::splat(0x1p-14f)));
  const auto shifted = L::max(magnitude, L::sub(sum, L::splat(1u << 23)));
  const auto cut = L::shr(L::add(shifted, L::shr(random, 3)), 13);
  const auto rounded = L::min(L::sub(cut, L::splat(112u << 10)), L::splat(0x7C00u));
  return L::unless_nan(x, L::xor_and(rounded, L::shr(L::bits(x), 16), 0x8000u), 0x7E00u);
}

// *p = x. 32 bits have nothing to round.
template <class L, class T>
ZO_HD void store_stochastic(T* p, typename L::F32 x, typename L::U32 random) {
  if constexpr (rounds<T>) {
    L::store_bits(p, stochastic<L>(T{}, x, random));
  } else {
    L::store(p, x);
  }
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
