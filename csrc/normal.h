// Standard normals from random words: Box-Muller without libm, the same bits on every machine. And
// signs, which are cheaper.
// `zo_fused/sweeps/reference.py` explains each step and is the definition.
#pragma once

#include "philox.h"

namespace zo_fused {

// c0 + c1*x + c2*x^2 + ..., highest degree first, one fma a degree.
template <class L, class... Rest>
ZO_HD typename L::F32 horner(typename L::F32 x, float c0, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) {
    return L::splat(c0);
  } else {
    return L::fma(horner<L>(x, rest...), x, L::splat(c0));
  }
}

// sqrt(-ln u) with u = float((a & 0x7fffffff) | 1) * 2^-31.
template <class L>
ZO_HD typename L::F32 radius(typename L::U32 a) {
  const auto bits = L::bits(L::to_float(L::and_or(a, 0x7FFFFFFFu, 1u)));
  const auto linear = L::to_float(L::sub(L::splat(0x4F000000u), bits));
  const auto v = L::sub(L::as_float(L::and_or(bits, 0x7FFFFFu, 0x3F800000u)), L::splat(1.5f));
  const auto log =
      horner<L>(v, -2850767.75f, 1281372.875f, -651781.875f, 366677.21875f, -165749.09375f);
  const auto t = L::fma(L::fnma(v, v, L::splat(0.25f)), log, linear);
  const auto y = L::as_float(L::sub(L::splat(0x5F200000u), L::shr(L::bits(t), 1)));
  const auto q = L::mul(t, y);
  const auto sqrt =
      horner<L>(L::mul(q, y), 0x1.71a556p-11f, -0x1.d08340p-11f, 0x1.5e0892p-11f, -0x1.a26ff2p-13f);
  return L::mul(q, sqrt);
}

// Two normals from two words; the top bits of the words are the signs.
template <class L>
ZO_HD void normal_pair(typename L::U32 a, typename L::U32 b, typename L::F32& z0,
                       typename L::F32& z1) {
  const auto r = radius<L>(a);
  const auto s =
      L::fma(L::as_float(L::and_or(b, 0x7FFFFFu, 0x3F800000u)), L::splat(2.0f), L::splat(-3.0f));
  const auto y = L::mul(s, s);
  const auto sin = L::mul(horner<L>(y, 0x1.921f32p-1f, -0x1.4a9ac4p-4f, 0x1.3e202ap-9f), s);
  const auto cos = L::mul(horner<L>(y, 1.0f, -0x1.3bd3a2p-2f, 0x1.03b162p-6f, -0x1.4ea9e8p-12f), r);
  z0 = L::as_float(L::xor_and(L::bits(L::fnma(sin, r, cos)), a, 0x80000000u));
  z1 = L::as_float(L::xor_and(L::bits(L::fma(sin, r, cos)), b, 0x80000000u));
}

// ---- hadamard ------------------------------------------------------------------------------------

// The 16 bytes of four words, each less its mean 127.5, go through a 16-point Hadamard transform,
// byte k = 8 (b / 2) + 2 w + b % 2 for byte b of word w. `packed[i]` has two sums of eight: lo of the
// low halves of the words, hi of the high ones. Outputs i and 8 + i are their sum and difference.
template <class L>
ZO_HD void hadamard_halves(typename L::U32 (&packed)[8], const typename L::U32 (&words)[4]) {
  typename L::U32 even[4], odd[4];  // sums and differences of neighbouring bytes
  for (int w = 0; w < 4; ++w) L::byte_pairs(words[w], even[w], odd[w]);
  const auto across_words = [&](const typename L::U32(&x)[4], int i0) ZO_LAMBDA {
    const auto a = L::add_halves(x[0], x[1]), b = L::sub_halves(x[0], x[1]);
    const auto c = L::add_halves(x[2], x[3]), d = L::sub_halves(x[2], x[3]);
    packed[i0] = L::add_halves(a, c);
    packed[i0 + 2] = L::add_halves(b, d);
    packed[i0 + 4] = L::sub_halves(a, c);
    packed[i0 + 6] = L::sub_halves(b, d);
  };
  across_words(even, 0);
  across_words(odd, 1);
}

// y (A + C y^2): variance 1 and kurtosis 3. y^2 is exact.
template <class L>
ZO_HD typename L::F32 near_normal(typename L::F32 y) {
  const auto slope = L::fma(L::mul(y, y), L::splat(0x1.228252p-33f), L::splat(0x1.b6f80cp-9f));
  return L::mul(y, slope);
}

}  // namespace zo_fused
