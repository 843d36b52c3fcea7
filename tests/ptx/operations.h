// What PTX instructions do with the values of registers. An operation has the bits that the PTX ISA
// gives it; what that leaves open (approximations) has those of libm.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace ptx {

// ---- values ------------------------------------------------------------------------------------

// As a register holds them: zeros above the value.
inline uint64_t held(uint64_t x) { return x; }
inline uint64_t held(int64_t x) { return static_cast<uint64_t>(x); }
inline uint64_t held(uint32_t x) { return x; }
inline uint64_t held(int32_t x) { return static_cast<uint32_t>(x); }
inline uint64_t held(uint16_t x) { return x; }
inline uint64_t held(bool x) { return x; }
inline uint64_t held(float x) { return std::isnan(x) ? 0x7FFFFFFF : std::bit_cast<uint32_t>(x); }

inline uint64_t pair(float low, float high) { return held(low) | held(high) << 32; }

inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float approximately(double (*function)(double), float x) {
  return static_cast<float>(function(x));
}

inline uint16_t half_of(float x) {
  if (std::isnan(x)) return 0x7FFF;
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}

inline uint16_t bfloat16_of(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Shifts by the width or more leave nothing, or the sign.
template <class T>
T left(T x, uint32_t n) {
  return n < 8 * sizeof(T) ? static_cast<T>(x << n) : 0;
}
template <class T>
T right(T x, uint32_t n) {
  constexpr uint32_t width = 8 * sizeof(T);
  return n < width ? x >> n : x < 0 ? static_cast<T>(-1) : 0;
}

template <class T>
T field(T x, uint32_t position, uint32_t length) {
  const T from = right(x, position & 0xFF);
  return from & static_cast<T>(left<T>(1, length & 0xFF) - 1);
}

template <class T>
T quotient(T x, T y) {
  if (y == 0) throw std::runtime_error("division by zero");
  if constexpr (std::is_signed_v<T>) {
    if (y == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(x));
  }
  return x / y;
}

// Each digit of the selector takes a byte of b:a or, with its top bit, that byte's sign.
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (digit & 7) & 0xFF;
    if (digit & 8) byte = byte & 0x80 ? 0xFF : 0;
    made |= byte << 8 * i;
  }
  return made;
}

// The upper word of hi:lo after a shift to the left, the lower one after one to the right.
inline uint32_t funnel_left(uint32_t lo, uint32_t hi, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{hi} << 32 | lo) << (n & 31) >> 32);
}
inline uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{hi} << 32 | lo) >> (n & 31));
}

inline uint32_t dot2(uint32_t a, uint32_t b, uint32_t c) {
  const auto byte = [b](int i) { return static_cast<uint32_t>(static_cast<int8_t>(b >> 8 * i)); };
  return c + (a & 0xFFFF) * byte(0) + (a >> 16) * byte(1);
}

// ---- operations --------------------------------------------------------------------------------

// Every operation but those of `Special`: its name, and its result from operands a, b and c. The
// assembler writes `b32` for u32 and s32 where the sign makes no difference.
#define ANY_WIDTH(X, W)                        \
  X("mov.b" #W, u##W(a))                       \
  X("selp.b" #W, p(c) ? u##W(a) : u##W(b))     \
  X("and.b" #W, held(u##W(a)) & held(u##W(b))) \
  X("or.b" #W, held(u##W(a)) | held(u##W(b)))  \
  X("shl.b" #W, left(u##W(a), u32(b)))         \
  X("setp.eq.b" #W, u##W(a) == u##W(b))        \
  X("setp.ne.b" #W, u##W(a) != u##W(b))

#define INTEGERS(X, W)                                 \
  X("add.b" #W, u##W(a) + u##W(b))                     \
  X("sub.b" #W, u##W(a) - u##W(b))                     \
  X("neg.b" #W, 0 - u##W(a))                           \
  X("not.b" #W, ~u##W(a))                              \
  X("xor.b" #W, u##W(a) ^ u##W(b))                     \
  X("mul.lo.b" #W, u##W(a) * u##W(b))                  \
  X("mad.lo.b" #W, u##W(a) * u##W(b) + u##W(c))        \
  X("shr.u" #W, right(u##W(a), u32(b)))                \
  X("shr.s" #W, right(s##W(a), u32(b)))                \
  X("bfe.u" #W, field(u##W(a), u32(b), u32(c)))        \
  X("min.u" #W, u##W(a) < u##W(b) ? u##W(a) : u##W(b)) \
  X("max.u" #W, u##W(a) > u##W(b) ? u##W(a) : u##W(b)) \
  X("min.s" #W, s##W(a) < s##W(b) ? s##W(a) : s##W(b)) \
  X("max.s" #W, s##W(a) > s##W(b) ? s##W(a) : s##W(b)) \
  X("div.u" #W, quotient(u##W(a), u##W(b)))            \
  X("div.s" #W, quotient(s##W(a), s##W(b)))            \
  X("setp.lt.u" #W, u##W(a) < u##W(b))                 \
  X("setp.le.u" #W, u##W(a) <= u##W(b))                \
  X("setp.gt.u" #W, u##W(a) > u##W(b))                 \
  X("setp.ge.u" #W, u##W(a) >= u##W(b))                \
  X("setp.lt.s" #W, s##W(a) < s##W(b))                 \
  X("setp.le.s" #W, s##W(a) <= s##W(b))                \
  X("setp.gt.s" #W, s##W(a) > s##W(b))                 \
  X("setp.ge.s" #W, s##W(a) >= s##W(b))

#define FLOATS(X)                                                       \
  X("add.rn.f32", f(a) + f(b))                                          \
  X("sub.rn.f32", f(a) - f(b))                                          \
  X("mul.rn.f32", f(a) * f(b))                                          \
  X("mul.rn.ftz.f32", flushed(flushed(f(a)) * flushed(f(b))))           \
  X("div.rn.f32", f(a) / f(b))                                          \
  X("sqrt.rn.f32", std::sqrt(f(a)))                                     \
  X("fma.rn.f32", std::fma(f(a), f(b), f(c)))                           \
  X("neg.f32", u32(a) ^ 0x80000000u)                                    \
  X("abs.f32", u32(a) & 0x7FFFFFFFu)                                    \
  X("add.rn.f32x2", pair(f(a) + f(b), g(a) + g(b)))                     \
  X("sub.rn.f32x2", pair(f(a) - f(b), g(a) - g(b)))                     \
  X("mul.rn.f32x2", pair(f(a) * f(b), g(a) * g(b)))                     \
  X("fma.rn.f32x2", pair(std::fma(f(a), f(b), f(c)), std::fma(g(a), g(b), g(c)))) \
  X("setp.eq.f32", f(a) == f(b))                                        \
  X("setp.lt.f32", f(a) < f(b))                                         \
  X("setp.le.f32", f(a) <= f(b))                                        \
  X("setp.gt.f32", f(a) > f(b))                                         \
  X("setp.ge.f32", f(a) >= f(b))                                        \
  X("setp.num.f32", !std::isunordered(f(a), f(b)))                      \
  X("setp.nan.f32", std::isunordered(f(a), f(b)))                       \
  X("lg2.approx.ftz.f32", flushed(approximately(std::log2, flushed(f(a)))))  \
  X("sqrt.approx.ftz.f32", flushed(approximately(std::sqrt, flushed(f(a))))) \
  X("sin.approx.ftz.f32", flushed(approximately(std::sin, flushed(f(a)))))   \
  X("cos.approx.ftz.f32", flushed(approximately(std::cos, flushed(f(a)))))   \
  X("sin.approx.f32", approximately(std::sin, f(a)))                    \
  X("cos.approx.f32", approximately(std::cos, f(a)))

#define CONVERSIONS(X)                                                       \
  X("cvt.u16.u32", u16(a))                                                   \
  X("cvt.u32.u16", uint32_t{u16(a)})                                         \
  X("cvt.u32.u64", u32(a))                                                   \
  X("cvt.u64.u32", uint64_t{u32(a)})                                         \
  X("cvt.s64.s32", int64_t{s32(a)})                                          \
  X("setp.lt.s16", static_cast<int16_t>(u16(a)) < static_cast<int16_t>(u16(b))) \
  X("cvt.s16.s8", static_cast<uint16_t>(static_cast<int8_t>(u16(a))))        \
  X("cvt.rn.f32.u32", static_cast<float>(u32(a)))                            \
  X("cvt.rn.f32.s32", static_cast<float>(s32(a)))                            \
  X("cvt.f32.f16", static_cast<float>(std::bit_cast<_Float16>(u16(a))))      \
  X("cvt.f32.bf16", std::bit_cast<float>(uint32_t{u16(a)} << 16))            \
  X("cvt.rn.f16.f32", half_of(f(a)))                                         \
  X("cvt.rn.bf16.f32", bfloat16_of(f(a)))                                    \
  X("cvt.rn.f16x2.f32", uint32_t{half_of(f(a))} << 16 | half_of(f(b)))       \
  X("cvt.rn.bf16x2.f32", uint32_t{bfloat16_of(f(a))} << 16 | bfloat16_of(f(b)))

#define OPERATIONS(X)                                                          \
  ANY_WIDTH(X, 16)                                                             \
  ANY_WIDTH(X, 32)                                                             \
  ANY_WIDTH(X, 64)                                                             \
  INTEGERS(X, 32)                                                              \
  INTEGERS(X, 64)                                                              \
  FLOATS(X)                                                                    \
  CONVERSIONS(X)                                                               \
  X("mov.pred", p(a))                                                          \
  X("not.pred", !p(a))                                                         \
  X("and.pred", p(a) && p(b))                                                  \
  X("or.pred", p(a) || p(b))                                                   \
  X("cvta.to.global.u64", u64(a))                                              \
  X("mul.hi.u32", uint64_t{u32(a)} * u32(b) >> 32)                             \
  X("mul.wide.u32", uint64_t{u32(a)} * u32(b))                                 \
  X("mul.wide.s32", int64_t{s32(a)} * s32(b))                                  \
  X("mad.wide.u32", uint64_t{u32(a)} * u32(b) + u64(c))                        \
  X("mad.wide.s32", static_cast<uint64_t>(int64_t{s32(a)} * s32(b)) + u64(c))  \
  X("prmt.b32", permuted(u32(a), u32(b), u32(c)))                              \
  X("shf.l.wrap.b32", funnel_left(u32(a), u32(b), u32(c)))                     \
  X("shf.r.wrap.b32", funnel_right(u32(a), u32(b), u32(c)))                    \
  X("dp2a.lo.u32.s32", dot2(u32(a), u32(b), u32(c)))

}  // namespace ptx
