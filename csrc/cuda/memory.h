// Runs of neighbouring numbers, moved 128 bits at a time where they are whole and aligned.
#pragma once

#include "lane.h"

// What is indexed in these loops lives in registers, so they must be straight-line code.
#if defined(__CUDA_ARCH__)
#define ZO_UNROLL _Pragma("unroll")
#define ZO_LOOP _Pragma("unroll 1")
#else
#define ZO_UNROLL
#define ZO_LOOP
#endif

namespace zo_fused {

// 128 bits.
#if defined(__CUDACC__)
using Quad = uint4;
#else
struct __attribute__((may_alias, aligned(16))) Quad {
  uint32_t x, y, z, w;
};
#endif

// N numbers of a type as they lie in memory.
template <class T, int N>
inline constexpr int words = N * static_cast<int>(sizeof(T)) / 4;

template <class T, int N>
struct Raw {
  uint32_t word[words<T, N>];
};

// Which elements of a run exist. All, and the first one is on a 16-byte boundary:
struct Whole {};

// Or those of first .. last that are in 0 .. N:
struct Part {
  int first, last;

  ZO_HD bool has(int i) const { return first <= i && i < last; }
};

// A run that exists, of numbers of 32 bits on a 16-byte boundary if they fill that.
template <int N>
ZO_HD auto all_of() {
  if constexpr (N % 4 == 0) {
    return Whole{};
  } else {
    return Part{0, N};
  }
}

// The same pointer. Tells the compiler, which can't know of an address from a table, that it is
// one of global memory: accesses cost less.
template <class T>
ZO_HD T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

template <class T, int N>
ZO_HD Raw<T, N> load(const T* p, Whole) {
  Raw<T, N> raw;
  ZO_UNROLL
  for (int i = 0; i < words<T, N>; i += 4) {
    const Quad q = *global(reinterpret_cast<const Quad*>(p) + i / 4);
    raw.word[i] = q.x, raw.word[i + 1] = q.y, raw.word[i + 2] = q.z, raw.word[i + 3] = q.w;
  }
  return raw;
}

template <class T, int N>
ZO_HD Raw<T, N> load(const T* p, const Part& part) {
  Raw<T, N> raw;
  ZO_UNROLL
  for (int i = 0; i < words<T, N>; ++i) raw.word[i] = 0;
  ZO_UNROLL
  for (int i = 0; i < N; ++i) {
    if (!part.has(i)) continue;
    if constexpr (sizeof(T) == 2) {
      raw.word[i / 2] |= static_cast<uint32_t>(global(p)[i].bits) << 16 * (i % 2);
    } else {
      raw.word[i] = bits_of(global(p)[i]);
    }
  }
  return raw;
}

template <class T, int N>
ZO_HD void store(T* p, Whole, const Raw<T, N>& raw) {
  ZO_UNROLL
  for (int i = 0; i < words<T, N>; i += 4) {
    const Quad q = {raw.word[i], raw.word[i + 1], raw.word[i + 2], raw.word[i + 3]};
    *global(reinterpret_cast<Quad*>(p) + i / 4) = q;
  }
}

template <class T, int N>
ZO_HD void store(T* p, const Part& part, const Raw<T, N>& raw) {
  ZO_UNROLL
  for (int i = 0; i < N; ++i) {
    if (!part.has(i)) continue;
    if constexpr (sizeof(T) == 2) {
      global(p)[i].bits = static_cast<uint16_t>(raw.word[i / 2] >> 16 * (i % 2));
    } else if constexpr (sizeof(T) == 4) {
      global(p)[i] = float_of(raw.word[i]);
    } else {
      global(p)[i] = static_cast<int64_t>(static_cast<uint64_t>(raw.word[2 * i + 1]) << 32 |
                                          raw.word[2 * i]);
    }
  }
}

template <class T, int N>
ZO_HD void widen(const Raw<T, N>& raw, float (&x)[N]) {
  if constexpr (rounds<T>) {
    ZO_UNROLL
    for (int i = 0; i < N; i += 2) Lane::widen(T{}, raw.word[i / 2], x[i], x[i + 1]);
  } else {
    ZO_UNROLL
    for (int i = 0; i < N; ++i) x[i] = float_of(raw.word[i]);
  }
}

// To nearest.
template <class T, int N>
ZO_HD Raw<T, N> narrow(const float (&x)[N]) {
  Raw<T, N> raw;
  if constexpr (rounds<T>) {
    ZO_UNROLL
    for (int i = 0; i < N; i += 2) raw.word[i / 2] = Lane::narrow(T{}, x[i], x[i + 1]);
  } else {
    ZO_UNROLL
    for (int i = 0; i < N; ++i) raw.word[i] = bits_of(x[i]);
  }
  return raw;
}

// Stochastically; the words have a random number of 16 bits for each element.
template <class T, int N>
ZO_HD Raw<T, N> narrow(const float (&x)[N], const uint32_t (&random)[N / 2]) {
  Raw<T, N> raw;
  ZO_UNROLL
  for (int i = 0; i < N; i += 2) {
    const uint32_t low = stochastic<Lane>(T{}, x[i], random[i / 2] & 0xFFFFu);
    const uint32_t high = stochastic<Lane>(T{}, x[i + 1], random[i / 2] >> 16);
    raw.word[i / 2] = low | high << 16;
  }
  return raw;
}

}  // namespace zo_fused
