// Philox4x32-10 (Salmon et al., SC'11) over a lane type.
//
// The formulas of this and the other arithmetic headers are templates over a lane type L: one
// number (`Scalar`), or a vector of them (`cpu/simd_*.h`). The text is one; so are the bits. These
// headers know no torch, no CUDA and no standard container.
#pragma once

#include <cstdint>

// always_inline is not only for speed: no copy of a function that was compiled for one
// instruction set may be linked into code for another.
#if defined(__CUDACC__)
#define ZO_HD __host__ __device__ __forceinline__
#else
#define ZO_HD inline __attribute__((always_inline))
#endif
#define ZO_LAMBDA __attribute__((always_inline))

namespace zo_fused {

// The key words of the ten rounds.
struct RoundKeys {
  uint32_t k0[10], k1[10];
};

ZO_HD RoundKeys round_keys(uint64_t key) {
  RoundKeys keys;
  for (int round = 0; round < 10; ++round) {
    keys.k0[round] = static_cast<uint32_t>(key) + round * 0x9E3779B9u;
    keys.k1[round] = static_cast<uint32_t>(key >> 32) + round * 0xBB67AE85u;
  }
  return keys;
}

// c = Philox of the counter words c. The words may stand in wider lanes than 32 bits, whose high
// parts `low` leaves undefined and `product` ignores.
template <class L>
ZO_HD void philox(typename L::Word (&c)[4], const RoundKeys& keys) {
  for (int round = 0; round < 10; ++round) {
    const auto p0 = L::product(c[0], 0xD2511F53u);
    const auto p1 = L::product(c[2], 0xCD9E8D57u);
    c[0] = L::xor3(L::high(p1), c[1], keys.k0[round]);
    c[2] = L::xor3(L::high(p0), c[3], keys.k1[round]);
    c[1] = L::low(p1);
    c[3] = L::low(p0);
  }
}

}  // namespace zo_fused
