#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

// Everything below, and nothing above, is compiled for AVX-512.
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// _mm512_undefined_ps() and others read an uninitialized variable on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "loops.h"
#include "simd_avx512.h"

namespace zo_fused {

const Sweeps sweeps_avx512 = sweeps_of<Avx512>;

}  // namespace zo_fused

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // x86_64
