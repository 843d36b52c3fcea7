// The lane type of a CUDA thread: `Scalar`, with the GPU's instructions where they give the same
// bits in fewer steps, and its approximate units for the transform "fast".
#pragma once

#include "../normal.h"
#include "../scalar.h"

#if !defined(__CUDACC__)
#include <cmath>  // emulation
#endif

namespace zo_fused {

struct Lane : Scalar {
#if defined(__CUDA_ARCH__)
  // Three-input logic takes one immediate operand: (a & mask) | set is two instructions, or one if
  // `set` comes in a register. Grids have one axis, so blockIdx.z is zero; the compiler does not
  // know. This saves one instruction in 35.
  ZO_HD static U32 and_or(U32 a, uint32_t mask, uint32_t set) {
    return (a & mask) | (set == 0 ? 0 : set + blockIdx.z);
  }

  // A product of 64 bits, however much the compiler knows about its factors.
  ZO_HD static Product product(Word a, uint32_t b) {
    Product p;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
    return p;
  }

  // The same number, if all threads of a warp have it: but the compiler must keep it in a register.
  ZO_HD static uint32_t kept(uint32_t x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }

  // Two neighbours of 16 bits in one word, the first one in the low half.
  ZO_HD static void widen(Half, uint32_t pair, float& x0, float& x1) {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(x0), "=f"(x1)
        : "r"(pair));
  }
  ZO_HD static uint32_t narrow(Half, float x0, float x1) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(x0), "f"(x1));
    return pair;
  }
  ZO_HD static uint32_t narrow(BFloat16, float x0, float x1) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(x0), "f"(x1));
    return pair;
  }

  ZO_HD static float fast_log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  ZO_HD static float fast_sqrt(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  ZO_HD static float fast_sin(float x) { return __sinf(x); }
  ZO_HD static float fast_cos(float x) { return __cosf(x); }
#else
  ZO_HD static uint32_t kept(uint32_t x) { return x; }
  ZO_HD static void widen(Half, uint32_t pair, float& x0, float& x1) {
    x0 = zo_fused::to_float(Half{static_cast<uint16_t>(pair)});
    x1 = zo_fused::to_float(Half{static_cast<uint16_t>(pair >> 16)});
  }
  ZO_HD static uint32_t narrow(Half, float x0, float x1) {
    return to_half(x0).bits | static_cast<uint32_t>(to_half(x1).bits) << 16;
  }
  ZO_HD static uint32_t narrow(BFloat16, float x0, float x1) {
    return to_bfloat16(x0).bits | static_cast<uint32_t>(to_bfloat16(x1).bits) << 16;
  }
  static float fast_log2(float x) { return std::log2(x); }
  static float fast_sqrt(float x) { return std::sqrt(x); }
  static float fast_sin(float x) { return std::sin(x); }
  static float fast_cos(float x) { return std::cos(x); }
#endif
  ZO_HD static void widen(BFloat16, uint32_t pair, float& x0, float& x1) {
    x0 = float_of(pair << 16);
    x1 = float_of(pair & 0xFFFF0000u);
  }
};

// `normal_pair` on the approximate units: the same u, and the same angle (pi/4) (s + 1).
ZO_HD void fast_normal_pair(uint32_t a, uint32_t b, float& z0, float& z1) {
  const float u = Lane::mul(Lane::to_float(Lane::and_or(a, 0x7FFFFFFFu, 1u)), 0x1p-31f);
  // -2 ln 2; the sign of an approximate logarithm close to 0 may be wrong.
  const float r = Lane::fast_sqrt(__builtin_fabsf(Lane::mul(Lane::fast_log2(u), -0x1.62e43p+0f)));
  const float m = Lane::as_float(Lane::and_or(b, 0x7FFFFFu, 0x3F800000u));
  const float angle = Lane::fma(m, 0x1.921fb6p+0f, -0x1.921fb6p+0f);
  z0 = Lane::mul(Lane::fast_cos(angle), r);
  z1 = Lane::mul(Lane::fast_sin(angle), r);
  z0 = Lane::as_float(Lane::xor_and(Lane::bits(z0), a, 0x80000000u));
  z1 = Lane::as_float(Lane::xor_and(Lane::bits(z1), b, 0x80000000u));
}

}  // namespace zo_fused
