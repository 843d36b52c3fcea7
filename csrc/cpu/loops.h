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

// ---- noise: blocks of counters -----------------------------------------------------------------

// A counter has 4 elements, `lanes` of them make a block. With `hadamard` it has 16, with `signs`
// 128, and 8 make a tile: counter n has 8 elements from element 8 n, 8 from element 64 + 8 n, ..
template <class L>
constexpr int64_t at_least_8 = L::lanes < 8 ? 8 : L::lanes;
template <class L, Transform transform = Transform::portable>
constexpr int64_t block_elements = transform == Transform::hadamard ? 16 * at_least_8<L>
                                   : transform == Transform::signs ? 128 * at_least_8<typename L::One>
                                                                   : 4 * L::lanes;

// The numbers of a block, in element order.
template <class L, Transform transform>
constexpr int64_t vectors = block_elements<L, transform> / L::lanes;
template <class L, Transform transform>
struct Block {
  typename L::F32 z[vectors<L, transform>];
  ZO_HD typename L::F32& operator[](int i) { return z[i]; }
};
// Signs stay bits until they are used.
template <class L>
struct Block<L, Transform::signs> {
  uint8_t runs[block_elements<L, Transform::signs> / 8];
  ZO_HD typename L::F32 operator[](int i) const {
    const int64_t at = i * L::lanes;
    uint32_t bits = 0;
    __builtin_memcpy(&bits, runs + at / 8, L::lanes < 8 ? 1 : L::lanes / 8);
    return L::ones(bits >> at % 8);
  }
};

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

// The same in element order. (They are integers: `interleave` moves bits.)
template <class L>
ZO_HD void ordered_words(typename L::F32 (&words)[4], uint64_t first, uint64_t id,
                         const RoundKeys& keys) {
  typename L::U32 w[4];
  random_words<L>(w, first, id, keys);
  for (int i = 0; i < 4; ++i) words[i] = L::as_float(w[i]);
  L::interleave(words);
}

// Tiles of `lanes` counters of a vector type, from their words.
template <class L>
ZO_HD void hadamard_tiles(typename L::F32 (&z)[16], const typename L::U32 (&words)[4]) {
  typename L::U32 packed[8];
  hadamard_halves<L>(packed, words);
  typename L::F32 low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    low[i] = L::as_float(packed[i]);
    high[i] = L::as_float(packed[4 + i]);
  }
  L::interleave(low);
  L::interleave(high);
  constexpr int run = 64 / L::lanes;  // vectors of half a tile
  for (int j = 0; j < 4; ++j) {
    L::zip_quads(low[j], high[j]);
    for (int part = 0; part < 2; ++part) {
      const auto pairs = L::bits(part ? high[j] : low[j]);
      const int vector = 2 * j + part, at = vector / run * 2 * run + vector % run;
      z[at] = near_normal<L>(L::sum(pairs));
      z[at + run] = near_normal<L>(L::difference(pairs));
    }
  }
}

// The near-normals of the block that starts with element 16 * first.
template <class L>
ZO_HD void hadamard_block(Block<L, Transform::hadamard>& z, uint64_t first, uint64_t id,
                          const RoundKeys& keys) {
  using One = typename L::One;
  if constexpr (One::lanes >= 8) {
    typename L::U32 words[4];
    random_words<L>(words, first, id, keys);
    typename One::U32 words_of_a[4], words_of_b[4];
    for (int i = 0; i < 4; ++i) words_of_a[i] = words[i].a, words_of_b[i] = words[i].b;
    typename One::F32 a[16], b[16];
    hadamard_tiles<One>(a, words_of_a);
    hadamard_tiles<One>(b, words_of_b);
    for (int i = 0; i < 8; ++i) {
      z[i] = {a[2 * i], a[2 * i + 1]};
      z[8 + i] = {b[2 * i], b[2 * i + 1]};
    }
  } else {
    float tile[128];
    for (int n = 0; n < 8; ++n) {
      uint32_t words[4], packed[8];
      random_words<One>(words, first + n, id, keys);
      hadamard_halves<One>(packed, words);
      for (int i = 0; i < 8; ++i) {
        tile[8 * n + i] = near_normal<One>(One::sum(packed[i]));
        tile[64 + 8 * n + i] = near_normal<One>(One::difference(packed[i]));
      }
    }
    for (int i = 0; i < 128 / L::lanes; ++i) z[i] = L::load(tile + i * L::lanes);
  }
}

// The signs of the block that starts with element 128 * first.
template <class L>
ZO_HD void signs_block(Block<L, Transform::signs>& z, uint64_t first, uint64_t id,
                       const RoundKeys& keys) {
  using One = typename L::One;
  constexpr int counters = static_cast<int>(at_least_8<One>);
  float ordered[4 * counters];
  for (int n = 0; n < counters; n += One::lanes) {
    typename One::F32 words[4];
    ordered_words<One>(words, first + n, id, keys);
    for (int i = 0; i < 4; ++i) One::store(ordered + 4 * n + i * One::lanes, words[i]);
  }
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(ordered);
  for (int tile = 0; tile < counters / 8; ++tile) {
    for (int i = 0; i < 16; ++i) {
      for (int n = 0; n < 8; ++n) z.runs[128 * tile + 8 * i + n] = bytes[128 * tile + 16 * n + i];
    }
  }
}

// Two normals from each of two pairs of words.
template <class L>
ZO_HD void portable_block(typename L::F32 (&z)[4], uint64_t first, uint64_t id,
                          const RoundKeys& keys) {
  typename L::U32 words[4];
  random_words<L>(words, first, id, keys);
  normal_pair<L>(words[0], words[1], z[0], z[1]);
  normal_pair<L>(words[2], words[3], z[2], z[3]);
  L::interleave(z);
}

// The normals or signs of the block that starts with element 4 * first, in element order.
template <class L, Transform transform>
ZO_HD void block_normals(Block<L, transform>& z, uint64_t first, uint64_t id,
                         const RoundKeys& keys) {
  if constexpr (transform == Transform::hadamard) {
    hadamard_block<L>(z, first / 4, id, keys);
  } else if constexpr (transform == Transform::signs) {
    signs_block<L>(z, first / 32, id, keys);
  } else {
    portable_block<L>(z.z, first, id, keys);
  }
}

// The random numbers of 8 * lanes elements from element 8 * first, in element order.
template <class L>
ZO_HD void random_numbers(uint16_t* random, uint64_t first, uint64_t id, const RoundKeys& keys) {
  typename L::F32 words[4];
  ordered_words<L>(words, first, id, keys);
  for (int i = 0; i < 4; ++i) L::store_words(random + 2 * i * L::lanes, L::bits(words[i]));
}

// ---- blocks ------------------------------------------------------------------------------------

template <class T, int64_t size>
struct Buffer {
  T x[size] = {};
};

template <class T>
ZO_HD void copy(T* to, const T* from, int64_t count) {
  if (to && from) __builtin_memcpy(to, from, count * sizeof(T));
}

// The same on the way back; what is only read stays.
template <class T>
ZO_HD void copy_back(T* to, const T* from, int64_t count) {
  copy(to, from, count);
}
template <class T>
ZO_HD void copy_back(const T*, const T*, int64_t) {}

template <class T>
struct Mutable {
  using type = T;
};
template <class T>
struct Mutable<const T> {
  using type = T;
};

// body(counter, data...) for a block of which only `count` elements from element `skip` exist. It
// goes through buffers, so that one code path computes all elements.
template <int64_t size, class Body, class... T>
ZO_HD void partial_block(int64_t skip, int64_t count, uint64_t counter, const Body& body,
                         T*... data) {
  const auto run = [&](auto... buffer) ZO_LAMBDA {
    (copy(buffer.x + skip, data, count), ...);
    body(counter, (data ? buffer.x : nullptr)...);
    (copy_back(data, buffer.x + skip, count), ...);
  };
  run(Buffer<typename Mutable<T>::type, size>{}...);
}

// body(first element / 4, data...) for every block of the span, `data` moved to the block. Null
// stays.
template <int64_t size, class Body, class... T>
ZO_HD void for_blocks(const Span& span, const Body& body, T*... data) {
  // The high word is constant in a chunk, so all that hangs on it leaves the loop.
  const uint64_t high = static_cast<uint64_t>(span.first) / 4 & 0xFFFFFFFF00000000u;
  uint32_t low = static_cast<uint32_t>(span.first / size * (size / 4));
  int64_t skip = span.first % size;
  for (int64_t left = span.count; left > 0; low += size / 4) {
    const int64_t here = size - skip < left ? size - skip : left;
    if (here == size) {
      body(high | low, data...);
    } else {
      partial_block<size>(skip, here, high | low, body, data...);
    }
    ((data = data ? data + here : nullptr), ...);
    left -= here;
    skip = 0;
  }
}

// The end of a sweep over weights: rounds them to nearest, or stochastically.
template <class L, int count, class T>
ZO_HD void store_block(T* block, const typename L::F32 (&acc)[count], uint64_t first, uint64_t id,
                       const RoundKeys* rounding) {
  if (rounds<T> && rounding) {
    // Half of the lanes of L make the numbers of four vectors.
    constexpr int64_t size = count * L::lanes, step = 4 * L::lanes;
    alignas(64) uint16_t random[size];
    for (int64_t i = 0; i < size; i += step) {
      random_numbers<typename L::One>(random + i, first / 2 + i / 8, id, *rounding);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t at = i * L::lanes;
      store_stochastic<L>(block + at, acc[i], L::load_bits(random + at));
    }
  } else {
    for (int i = 0; i < count; ++i) L::store(block + i * L::lanes, acc[i]);
  }
}

template <class L>
void bits(int64_t* out, const Span& span, const RoundKeys& keys) {
  const auto body = [&](uint64_t first, int64_t* block) ZO_LAMBDA {
    typename L::F32 words[4];
    ordered_words<L>(words, first, span.id, keys);
    float ordered[block_elements<L>];
    for (int i = 0; i < 4; ++i) L::store(ordered + i * L::lanes, words[i]);
    for (int i = 0; i < block_elements<L>; ++i) block[i] = bits_of(ordered[i]);
  };
  for_blocks<block_elements<L>>(span, body, out);
}

template <class L, Transform transform>
void normal(float* out, const Span& span, const RoundKeys& keys) {
  const auto body = [&](uint64_t first, float* block) ZO_LAMBDA {
    Block<L, transform> z;
    block_normals<L, transform>(z, first, span.id, keys);
    for (int i = 0; i < vectors<L, transform>; ++i) L::store(block + i * L::lanes, z[i]);
  };
  for_blocks<block_elements<L, transform>>(span, body, out);
}

template <class L, Transform transform, class T>
void dense(void* weights, const Span& span, const Update& u) {
  const auto body = [&](uint64_t first, T* block) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    typename L::F32 acc[count];
    Block<L, transform> z;
    // The first direction before the weights: they needn't wait in registers for it.
    if (u.directions > 0) block_normals<L, transform>(z, first, span.id, u.keys[0]);
    for (int i = 0; i < count; ++i) {
      acc[i] = decayed<L>(L::load(block + i * L::lanes), u.decay);
      if (u.directions > 0) acc[i] = step<L>(acc[i], u.coeffs[0], z[i]);
    }
    for (int64_t k = 1; k < u.directions; ++k) {
      block_normals<L, transform>(z, first, span.id, u.keys[k]);
      for (int i = 0; i < count; ++i) acc[i] = step<L>(acc[i], u.coeffs[k], z[i]);
    }
    store_block<L>(block, acc, first, span.id, u.rounding);
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights));
}

// acc + sum_k coeffs[k] * z_k of a block, with z made `of` it.
template <class L, Transform transform, int count, class Of>
ZO_HD void add_directions(typename L::F32 (&acc)[count], uint64_t first, const Span& span,
                          const Update& u, const Of& of) {
  for (int64_t k = 0; k < u.directions; ++k) {
    Block<L, transform> z;
    block_normals<L, transform>(z, first, span.id, u.keys[k]);
    for (int i = 0; i < count; ++i) acc[i] = step<L>(acc[i], u.coeffs[k], of(z[i], i));
  }
}

template <class L, Transform transform, class T>
void masked(void* weights, const uint8_t* mask, const Span& span, const Update& u) {
  // Of the whole chunk, so that partial blocks find bits for all of their elements.
  Buffer<uint8_t, chunk_elements / 8> bytes;
  const int64_t start = span.first % chunk_elements;
  copy(bytes.x + start / 8, mask, (start + span.count + 7) / 8 - start / 8);
  const auto body = [&](uint64_t first, T* block) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    typename L::F32 acc[count], w[count];
    for (int i = 0; i < count; ++i) {
      w[i] = L::load(block + i * L::lanes);
      acc[i] = decayed<L>(w[i], u.decay);
    }
    add_directions<L, transform>(acc, first, span, u, [](auto z, int) ZO_LAMBDA { return z; });
    const uint8_t* const own = bytes.x + first % (chunk_elements / 4) / 2;
    for (int i = 0; i < count; ++i) {
      const int64_t at = i * L::lanes;
      uint32_t bits = 0;
      __builtin_memcpy(&bits, own + at / 8, L::lanes < 8 ? 1 : L::lanes / 8);
      acc[i] = L::choose(bits >> at % 8, acc[i], w[i]);
    }
    store_block<L>(block, acc, first, span.id, u.rounding);
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights));
}

template <class L, Transform transform, class T>
void scaled(void* weights, const float* scales, const Span& span, const Update& u) {
  const auto body = [&](uint64_t first, T* block, const float* scale) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    typename L::F32 acc[count], root[count];
    for (int i = 0; i < count; ++i) {
      acc[i] = decayed<L>(L::load(block + i * L::lanes), u.decay);
      root[i] = L::sqrt(L::load(scale + i * L::lanes));
    }
    add_directions<L, transform>(acc, first, span, u, [&](auto z, int i) ZO_LAMBDA { return L::div(z, root[i]); });
    store_block<L>(block, acc, first, span.id, u.rounding);
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights), scales);
}

// Sweep after sweep over a block, which stays in the first-level cache. Neighbouring sweeps share
// directions, and noise is what takes the time: the last direction's stays in registers.
template <class L, Transform transform, class T>
void dense_steps(void* weights, const Span& span, const Script& s) {
  const auto body = [&](uint64_t first, T* block) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    Block<L, transform> z = {};
    int64_t held = -1;  // whose normals are in z
    const int64_t* row = s.script;
    for (int64_t sweep = 0; sweep < s.sweeps; ++sweep, row += 3) {
      typename L::F32 acc[count];
      for (int i = 0; i < count; ++i) {
        acc[i] = decayed<L>(L::load(block + i * L::lanes), s.decay[sweep]);
      }
      for (int term = 0; term < 2 && row[term] >= 0; ++term) {
        if (row[term] != held) {
          held = row[term];
          block_normals<L, transform>(z, first, span.id, s.keys[held]);
        }
        for (int i = 0; i < count; ++i) {
          acc[i] = step<L>(acc[i], s.coeffs[2 * sweep + term], z[i]);
        }
      }
      store_block<L>(block, acc, first, span.id, row[2] < 0 ? nullptr : s.keys + row[2]);
    }
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights));
}

// ---- moments -----------------------------------------------------------------------------------

// The block's estimate g goes into its moments and they into acc.
template <class L, Rule rule, bool kept, int count, class M>
ZO_HD void update_moments(typename L::F32 (&acc)[count], const typename L::F32 (&g)[count],
                          M* firsts, float* seconds, const MomentCoeffs& coeffs) {
  for (int i = 0; i < count; ++i) {
    const int64_t at = i * L::lanes;
    typename L::F32 first{}, second{};
    if constexpr (kept) first = L::load(firsts + at);
    if constexpr (rule == Rule::adam) second = L::load(seconds + at);
    acc[i] = step<L>(acc[i], coeffs.step, moments<L, rule, kept>(g[i], first, second, coeffs));
    if constexpr (kept) L::store(firsts + at, first);
    if constexpr (rule == Rule::adam) L::store(seconds + at, second);
  }
}

template <class L, Rule rule, int count, class M>
ZO_HD void update_moments(typename L::F32 (&acc)[count], const typename L::F32 (&g)[count],
                          M* firsts, float* seconds, const MomentCoeffs& coeffs) {
  if (rule == Rule::adam || firsts) {
    update_moments<L, rule, true>(acc, g, firsts, seconds, coeffs);
  } else {
    update_moments<L, rule, false>(acc, g, firsts, seconds, coeffs);
  }
}

// M: the type of the first moments.
template <class L, Transform transform, class T, class M>
void moment_sweep(void* weights, void* firsts, float* seconds, const Span& span, const Update& u,
                  const Moments& m) {
  const auto body = [&](uint64_t first, T* block, M* firsts, float* seconds) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    typename L::F32 acc[count], g[count];
    for (int i = 0; i < count; ++i) {
      acc[i] = decayed<L>(L::load(block + i * L::lanes), u.decay);
      g[i] = L::splat(0.0f);
    }
    for (int64_t k = 0; k < u.directions; ++k) {
      Block<L, transform> z;
      block_normals<L, transform>(z, first, span.id, u.keys[k]);
      for (int i = 0; i < count; ++i) {
        g[i] = step<L>(g[i], m.grads[k], z[i]);
        acc[i] = step<L>(acc[i], u.coeffs[k], z[i]);
      }
    }
    switch (m.rule) {
      case Rule::momentum:
        update_moments<L, Rule::momentum>(acc, g, firsts, seconds, m.coeffs);
        break;
      case Rule::sign:
        update_moments<L, Rule::sign>(acc, g, firsts, seconds, m.coeffs);
        break;
      case Rule::adam:
        update_moments<L, Rule::adam>(acc, g, firsts, seconds, m.coeffs);
        break;
      case Rule::hizoo:  // is a sweep of its own
        break;
    }
    store_block<L>(block, acc, first, span.id, u.rounding);
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights), static_cast<M*>(firsts), seconds);
}

// Adam with the moments of these directions alone, which are in registers only.
template <class L, Transform transform, class T>
void adam_of_squares(void* weights, const Span& span, const Update& u, const Moments& m) {
  const auto body = [&](uint64_t first, T* block) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    typename L::F32 acc[count], g[count], second[count];
    for (int i = 0; i < count; ++i) {
      acc[i] = decayed<L>(L::load(block + i * L::lanes), u.decay);
      g[i] = second[i] = L::splat(0.0f);
    }
    for (int64_t k = 0; k < u.directions; ++k) {
      Block<L, transform> z;
      block_normals<L, transform>(z, first, span.id, u.keys[k]);
      for (int i = 0; i < count; ++i) {
        g[i] = step<L>(g[i], m.grads[k], z[i]);
        acc[i] = step<L>(acc[i], u.coeffs[k], z[i]);
        second[i] = add_square<L>(second[i], m.squares[k], z[i]);
      }
    }
    for (int i = 0; i < count; ++i) {
      const auto mean = L::mul(g[i], L::splat(m.coeffs.gain));
      acc[i] = step<L>(acc[i], m.coeffs.step, adam<L>(mean, second[i], m.coeffs.eps));
    }
    store_block<L>(block, acc, first, span.id, u.rounding);
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights));
}

// HiZOO: back with the old Hessian, on with the new one.
template <class L, Transform transform, class T>
void hizoo(void* weights, float* hessian, const Span& span, const Update& u, const Moments& m) {
  const auto body = [&](uint64_t first, T* block, float* scale) ZO_LAMBDA {
    constexpr int count = vectors<L, transform>;
    typename L::F32 acc[count], g[count], v[count];
    for (int i = 0; i < count; ++i) {
      acc[i] = decayed<L>(L::load(block + i * L::lanes), u.decay);
      g[i] = v[i] = L::splat(0.0f);
    }
    for (int64_t k = 0; k < u.directions; ++k) {
      Block<L, transform> z;
      block_normals<L, transform>(z, first, span.id, u.keys[k]);
      for (int i = 0; i < count; ++i) {
        const auto root = L::sqrt(L::load(scale + i * L::lanes));
        g[i] = step<L>(g[i], m.grads[k], z[i]);
        acc[i] = step<L>(acc[i], u.coeffs[k], L::div(z[i], root));
        v[i] = add_square<L>(v[i], m.squares[k], z[i]);
      }
    }
    for (int i = 0; i < count; ++i) {
      float* const at = scale + i * L::lanes;
      const auto made = new_hessian<L>(L::load(at), v[i], m.coeffs);
      L::store(at, made);
      const auto mean = L::mul(g[i], L::splat(m.coeffs.gain));
      acc[i] = step<L>(acc[i], m.coeffs.step, L::div(mean, L::sqrt(made)));
    }
    store_block<L>(block, acc, first, span.id, u.rounding);
  };
  for_blocks<block_elements<L, transform>>(span, body, static_cast<T*>(weights), hessian);
}

// ---- low rank ---------------------------------------------------------------------------------

// The random numbers of a strip: R rows, so many columns that the lanes of two vectors are enough
// for a row, wherever it starts.
template <class L, int R>
struct RandomStrip {
  using N = Twice<L>;
  static constexpr int64_t capacity = 8 * N::lanes;
  static constexpr int64_t margin = 32, pitch = margin + 2 * capacity;
  alignas(64) uint16_t numbers[R * pitch];

  // The number of row 0, column 0.
  ZO_HD uint16_t* begin() { return numbers + margin; }

  // Rows start with elements first, first + stride, ...
  ZO_HD void fill(uint64_t first, int64_t stride, uint64_t id, const RoundKeys& keys) {
    for (int i = 0; i < R; ++i, first += stride) {
      uint16_t* const out = begin() + i * pitch - first % 8;
      const uint64_t counter = first / 8;
      random_numbers<N>(out, counter, id, keys);
      // A vector of counters has one high word. Where it changes, a second vector goes on.
      const uint64_t end = (counter | 0xFFFFFFFFu) + 1;
      if (end - counter < N::lanes) random_numbers<N>(out + 8 * (end - counter), end, id, keys);
    }
  }
};

// R rows x C vectors: weight = decay * weight + coeff * (u @ vt). `random` is null, or a number
// for each weight, with rows `pitch` apart.
template <class L, int R, int C, class T>
ZO_HD void lowrank_block(T* weights, int64_t stride, const float* u, const float* vt,
                         const uint16_t* random, int64_t pitch, const Tile& t) {
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
      const auto acc = step<L>(decayed<L>(L::load(p), t.decay), t.coeff, dot[i][j]);
      if (rounds<T> && random) {
        store_stochastic<L>(p, acc, L::load_bits(random + i * pitch + j * L::lanes));
      } else {
        L::store(p, acc);
      }
    }
  }
}

// Columns [column, end) of R rows. `random` begins with that column.
template <class L, int R, int C, class T>
ZO_HD void lowrank_columns(T* weights, const float* u, int64_t column, int64_t end,
                           const uint16_t* random, int64_t pitch, const Tile& t) {
  const auto advance = [&](int64_t columns) ZO_LAMBDA {
    column += columns;
    if (random) random += columns;
  };
  while (column + C * L::lanes <= end) {
    // The R rows are R short streams, too short for the hardware to run ahead in them: name what
    // the next R rows need. (Past the last row that is nothing; prefetches don't fault.)
    for (int i = 0; i < R; ++i) {
      const char* const next = reinterpret_cast<const char*>(weights + (R + i) * t.stride + column);
      for (int64_t byte = 0; byte < C * L::lanes * int64_t{sizeof(T)}; byte += 64) {
        __builtin_prefetch(next + byte);
      }
    }
    lowrank_block<L, R, C>(weights + column, t.stride, u, t.vt + column, random, pitch, t);
    advance(C * L::lanes);
  }
  while (column < end) {
    const int64_t left = end - column;
    const int64_t here = left < L::lanes ? left : L::lanes;
    T buffer[R * L::lanes] = {};
    for (int i = 0; i < R; ++i) {
      __builtin_memcpy(buffer + i * L::lanes, weights + i * t.stride + column, here * sizeof(T));
    }
    lowrank_block<L, R, 1>(buffer, L::lanes, u, t.vt + column, random, pitch, t);
    for (int i = 0; i < R; ++i) {
      __builtin_memcpy(weights + i * t.stride + column, buffer + i * L::lanes, here * sizeof(T));
    }
    advance(here);
  }
}

template <class L, int R, class T>
ZO_HD void lowrank_rows(T* weights, int64_t row, const Tile& t) {
  constexpr int C = 2;
  T* const w = weights + row * t.stride;
  const float* const u = t.u + row * t.rank;
  if (rounds<T> && t.rounding) {
    RandomStrip<L, R> random;
    // Where rows do not start with a counter's first number, up to 7 of the strip's are not used.
    constexpr int64_t block = C * L::lanes, loss = (7 + block - 1) / block * block;
    const int64_t width = random.capacity - ((t.first | t.stride) % 8 ? loss : 0);
    for (int64_t column = 0; column < t.columns; column += width) {
      const int64_t end = column + width < t.columns ? column + width : t.columns;
      random.fill(t.first + row * t.stride + column, t.stride, t.id, *t.rounding);
      lowrank_columns<L, R, C>(w, u, column, end, random.begin(), random.pitch, t);
    }
  } else {
    lowrank_columns<L, R, C>(w, u, 0, t.columns, nullptr, 0, t);
  }
}

template <class L, class T>
void lowrank(void* weights, const Tile& t) {
  constexpr int R = 4;  // rows that share a load of vt
  T* const w = static_cast<T*>(weights);
  int64_t row = 0;
  for (; row + R <= t.rows; row += R) lowrank_rows<L, R>(w, row, t);
  for (; row < t.rows; ++row) lowrank_rows<L, 1>(w, row, t);
}

template <class L>
void factor_momentum(float* moment, const float* u, int64_t count, float coeff, float decay) {
  const auto update = [=](float* m, const float* x) ZO_LAMBDA {
    L::store(m, momentum<L>(L::load(m), L::load(x), coeff, decay));
  };
  int64_t i = 0;
  for (; i + L::lanes <= count; i += L::lanes) update(moment + i, u + i);
  if (const int64_t left = count - i; left > 0) {
    float m[L::lanes] = {}, x[L::lanes] = {};
    __builtin_memcpy(m, moment + i, left * sizeof(float));
    __builtin_memcpy(x, u + i, left * sizeof(float));
    update(m, x);
    __builtin_memcpy(moment + i, m, left * sizeof(float));
  }
}

template <class N, Transform t>
constexpr NoiseSweeps noise_sweeps_of = {
    normal<N, t>,
    {dense<N, t, Half>, dense<N, t, BFloat16>, dense<N, t, float>},
    {masked<N, t, Half>, masked<N, t, BFloat16>, masked<N, t, float>},
    {scaled<N, t, Half>, scaled<N, t, BFloat16>, scaled<N, t, float>},
    {dense_steps<N, t, Half>, dense_steps<N, t, BFloat16>, dense_steps<N, t, float>},
    {{moment_sweep<N, t, Half, Half>, moment_sweep<N, t, Half, float>},
     {moment_sweep<N, t, BFloat16, BFloat16>, moment_sweep<N, t, BFloat16, float>},
     {moment_sweep<N, t, float, float>, moment_sweep<N, t, float, float>}},
    {adam_of_squares<N, t, Half>, adam_of_squares<N, t, BFloat16>, adam_of_squares<N, t, float>},
    {hizoo<N, t, Half>, hizoo<N, t, BFloat16>, hizoo<N, t, float>},
};

// Noise over two vectors at a time.
template <class L, class N = Twice<L>>
constexpr Sweeps sweeps_of = {
    bits<N>,
    {noise_sweeps_of<N, Transform::portable>, noise_sweeps_of<N, Transform::signs>,
     noise_sweeps_of<N, Transform::hadamard>},
    {lowrank<L, Half>, lowrank<L, BFloat16>, lowrank<L, float>},
    factor_momentum<L>,
};

}  // namespace
}  // namespace zo_fused
