#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

// Everything below, and nothing above, is compiled for AVX2.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "loops.h"
#include "simd_avx2.h"

namespace zo_fused {

const Sweeps sweeps_avx2 = sweeps_of<Avx2>;

}  // namespace zo_fused

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86_64
