// The sweeps over a lane type L. Every instruction set's file includes this once; names are
// local to it, and std:: templates stay out, so that nothing compiled here is shared.
#pragma once

#include "../element.h"
#include "../normal.h"
#include "../philox.h"
#include "sweeps.h"
#include "twice.h"

namespace zo_fused {
namespace {

// ---- noise: blocks of `lanes` counters, 4 elements each ---------------------------------------

template <class L>
constexpr int64_t block_elements = 4 * L::lanes;

// Words 0..3 of counters first .. first + lanes; lanes are in the order of `L::counters`.
template <class L>
ZO_HD void random_words(typename L::U32 (&words)[4], uint64_t first, uint64_t id,
                        const RoundKeys& keys) {
  typename L::Word c[4] = {
      L::counters(static_cast<uint32_t>(first)), L::word(static_cast<uint32_t>(first >> 32)),
      L::word(static_cast<uint32_t>(id)), L::word(static_cast<uint32_t>(id >> 32))};
  philox<L>(c, keys);
  for (int i = 0; i < 4; ++i) words[i] = L::join(c[i]);
}

// The normals of the block that starts with counter `first`, in element order.
template <class L>
ZO_HD void block_normals(typename L::F32 (&z)[4], uint64_t first, uint64_t id,
                         const RoundKeys& keys) {
  typename L::U32 words[4];
  random_words<L>(words, first, id, keys);
  normal_pair<L>(words[0], words[1], z[0], z[1]);
  normal_pair<L>(words[2], words[3], z[2], z[3]);
  L::interleave(z);
}

// body(pointer to a whole block, its first counter) for every block of the span. The partial
// blocks at the ends go through a buffer, so that one code path computes all elements.
template <class L, class T, class Body>
ZO_HD void for_blocks(T* data, const Span& span, const Body& body) {
  constexpr int64_t size = block_elements<L>;
  // The high word is constant in a chunk, so all that hangs on it leaves the loop.
  const uint64_t high = static_cast<uint64_t>(span.first) / 4 & 0xFFFFFFFF00000000u;
  uint32_t low = static_cast<uint32_t>(span.first / size * L::lanes);
  int64_t skip = span.first % size;
  for (int64_t left = span.count; left > 0; low += L::lanes) {
    const int64_t here = size - skip < left ? size - skip : left;
    if (here == size) {
      body(data, high | low);
    } else {
      T buffer[size] = {};
      __builtin_memcpy(buffer + skip, data, here * sizeof(T));
      body(buffer, high | low);
      __builtin_memcpy(data, buffer + skip, here * sizeof(T));
    }
    data += here;
    left -= here;
    skip = 0;
  }
}

template <class L>
void bits(int64_t* out, const Span& span, const RoundKeys& keys) {
  for_blocks<L>(out, span, [&](int64_t* block, uint64_t first) ZO_LAMBDA {
    typename L::U32 words[4];
    random_words<L>(words, first, span.id, keys);
    typename L::F32 z[4];
    for (int i = 0; i < 4; ++i) z[i] = L::as_float(words[i]);
    L::interleave(z);
    float ordered[block_elements<L>];
    for (int i = 0; i < 4; ++i) L::store(ordered + i * L::lanes, z[i]);
    for (int i = 0; i < block_elements<L>; ++i) block[i] = bits_of(ordered[i]);
  });
}

template <class L>
void normal(float* out, const Span& span, const RoundKeys& keys) {
  for_blocks<L>(out, span, [&](float* block, uint64_t first) ZO_LAMBDA {
    typename L::F32 z[4];
    block_normals<L>(z, first, span.id, keys);
    for (int i = 0; i < 4; ++i) L::store(block + i * L::lanes, z[i]);
  });
}

// weight = decay * weight + sum_k coeffs[k] * z_k
template <class L, class T>
void dense(void* weights, const Span& span, int64_t directions, const RoundKeys* keys,
           const float* coeffs, float decay) {
  for_blocks<L>(static_cast<T*>(weights), span, [&](T* block, uint64_t first) ZO_LAMBDA {
    typename L::F32 acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = decayed<L>(L::load(block + i * L::lanes), decay);
    for (int64_t k = 0; k < directions; ++k) {
      typename L::F32 z[4];
      block_normals<L>(z, first, span.id, keys[k]);
      for (int i = 0; i < 4; ++i) acc[i] = step<L>(acc[i], coeffs[k], z[i]);
    }
    for (int i = 0; i < 4; ++i) L::store(block + i * L::lanes, acc[i]);
  });
}

// ---- low rank ---------------------------------------------------------------------------------

// R rows x C vectors: weight = decay * weight + coeff * (u @ vt).
template <class L, int R, int C, class T>
ZO_HD void lowrank_block(T* weights, int64_t stride, const float* u, const float* vt,
                         const Tile& t) {
  typename L::F32 dot[R][C];
  for (int j = 0; j < C; ++j) {
    const auto v = L::load(vt + j * L::lanes);
    for (int i = 0; i < R; ++i) dot[i][j] = L::mul(L::splat(u[i * t.rank]), v);
  }
  for (int64_t q = 1; q < t.rank; ++q) {
    for (int j = 0; j < C; ++j) {
      const auto v = L::load(vt + q * t.vt_stride + j * L::lanes);
      for (int i = 0; i < R; ++i) {
        dot[i][j] = L::fma(L::splat(u[i * t.rank + q]), v, dot[i][j]);
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < C; ++j) {
      T* const p = weights + i * stride + j * L::lanes;
      L::store(p, step<L>(decayed<L>(L::load(p), t.decay), t.coeff, dot[i][j]));
    }
  }
}

template <class L, int R, class T>
ZO_HD void lowrank_rows(T* weights, const float* u, const Tile& t) {
  constexpr int C = 2;
  int64_t column = 0;
  for (; column + C * L::lanes <= t.columns; column += C * L::lanes) {
    // The R rows are R short streams, too short for the hardware to run ahead in them: name what
    // the next R rows need. (Past the last row that is nothing; prefetches don't fault.)
    for (int i = 0; i < R; ++i) {
      const char* const next = reinterpret_cast<const char*>(weights + (R + i) * t.stride + column);
      for (int64_t byte = 0; byte < C * L::lanes * int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(next + byte);
      }
    }
    lowrank_block<L, R, C>(weights + column, t.stride, u, t.vt + column, t);
  }
  for (; column < t.columns; column += L::lanes) {
    const int64_t left = t.columns - column;
    const int64_t here = left < L::lanes ? left : L::lanes;
    T buffer[R * L::lanes] = {};
    for (int i = 0; i < R; ++i) {
      __builtin_memcpy(buffer + i * L::lanes, weights + i * t.stride + column, here * sizeof(T));
    }
    lowrank_block<L, R, 1>(buffer, L::lanes, u, t.vt + column, t);
    for (int i = 0; i < R; ++i) {
      __builtin_memcpy(weights + i * t.stride + column, buffer + i * L::lanes, here * sizeof(T));
    }
  }
}

template <class L, class T>
void lowrank(void* weights, const Tile& t) {
  constexpr int R = 4;  // rows that share a load of vt
  T* const w = static_cast<T*>(weights);
  int64_t row = 0;
  for (; row + R <= t.rows; row += R) {
    lowrank_rows<L, R>(w + row * t.stride, t.u + row * t.rank, t);
  }
  for (; row < t.rows; ++row) lowrank_rows<L, 1>(w + row * t.stride, t.u + row * t.rank, t);
}

template <class L>
void momentum_factor(float* moment, const float* u, float* a, int64_t count, const float* c) {
  const auto update = [=](float* m, const float* x, float* y) ZO_LAMBDA {
    auto next = L::load(m);
    L::store(y, momentum<L>(next, L::load(x), c[0], c[1], c[2], c[3]));
    L::store(m, next);
  };
  int64_t i = 0;
  for (; i + L::lanes <= count; i += L::lanes) update(moment + i, u + i, a + i);
  if (const int64_t left = count - i; left > 0) {
    float m[L::lanes] = {}, x[L::lanes] = {}, y[L::lanes];
    __builtin_memcpy(m, moment + i, left * sizeof(float));
    __builtin_memcpy(x, u + i, left * sizeof(float));
    update(m, x, y);
    __builtin_memcpy(moment + i, m, left * sizeof(float));
    __builtin_memcpy(a + i, y, left * sizeof(float));
  }
}

// Noise over N, the rest over L.
template <class L, class N = L>
constexpr Sweeps sweeps_of = {
    bits<N>,
    normal<N>,
    {dense<N, Half>, dense<N, BFloat16>, dense<N, float>},
    {lowrank<L, Half>, lowrank<L, BFloat16>, lowrank<L, float>},
    momentum_factor<L>,
};

}  // namespace
}  // namespace zo_fused
