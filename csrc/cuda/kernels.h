// The CUDA kernels, in C++ that a CPU compiler understands too (tests/cuda_emulation): threads
// share no memory, and nothing depends on the order in which they run.
//
// One launch serves all rows of a table (zo_fused/sweeps/backends/table.py). Blocks take programs; a thread takes
// groups of neighbouring elements that fill 128 bits, and makes all noise that they need.
#pragma once

#include "launch.h"
#include "memory.h"

namespace zo_fused {

constexpr int threads = 256;

// Blocks of a launch over so many programs, on a device that has `places` for blocks at a time. Each
// takes every `blocks`-th program. Whole waves, so that none is nearly empty; several only where
// there is so much to do that differences in the blocks' speed count for more than their number.
inline int64_t blocks_of(int64_t programs, int64_t places) {
  const int64_t most = programs < 64 * places ? places : 4 * places;
  return programs < most ? programs : most;
}

// Elements that a thread takes at once: 128 bits, and a whole number of counters; or a run of eight
// of one.
constexpr bool in_runs(Transform transform) {
  return transform == Transform::hadamard || transform == Transform::signs;
}
template <class T, Transform transform = Transform::portable>
constexpr int group = sizeof(T) == 2 || in_runs(transform) ? 8 : 4;

// Columns of a table, as in zo_fused/sweeps/backends/table.py.
enum Column { first_, address_, index_, id_, offset_, aligned_, table_width = 12 };
enum NoiseColumn { numel_ = 6, states_ };
enum LowrankColumn { rows_ = 6, columns_, rank_, u_, v_ };

ZO_HD int at_most(int64_t most, int64_t x) { return static_cast<int>(x < most ? x : most); }

// work(row, program, counted from the row's first) for the programs of this block.
template <class Work>
ZO_HD void for_programs(const Table& table, const Work& work) {
  for (int64_t program = blockIdx.x; program < table.programs; program += gridDim.x) {
    int64_t low = 0, high = table.count;  // the row is in low .. high
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (table.rows[middle * table_width + first_] <= program ? low : high) = middle;
    }
    const int64_t* const row = table.rows + low * table_width;
    work(row, program - row[first_]);
  }
}

// ---- noise -------------------------------------------------------------------------------------

// The elements of a parameter that a program takes.
struct Chunk {
  int64_t start;  // a multiple of chunk_elements; others are counted from it
  int first, last;
  bool aligned;
  uint64_t id;
  int64_t index;      // row of coefficients
  int64_t in_tensor;  // what the tensor has at `start`; negative if it begins behind it
};

ZO_HD Chunk chunk_of(const int64_t* row, int64_t program) {
  const int64_t offset = row[offset_], end = offset + row[numel_];
  const int64_t start = (offset / chunk_elements + program) * chunk_elements;
  return {start,
          static_cast<int>(offset > start ? offset - start : 0),
          at_most(chunk_elements, end - start),
          row[aligned_] != 0,
          static_cast<uint64_t>(row[id_]),
          row[index_],
          start - offset};
}

// Where a tensor has, or would have, the chunk's first element.
template <class T>
ZO_HD T* base(int64_t address, const Chunk& chunk) {
  return reinterpret_cast<T*>(address + chunk.in_tensor * static_cast<int64_t>(sizeof(T)));
}

// work(i, part) for this thread's groups of N elements, which begin at element i of the chunk.
// Groups that are whole have code of their own, free of comparisons.
template <int N, class Work>
ZO_HD void for_groups(const Chunk& chunk, const Work& work) {
  const int thread = static_cast<int>(threadIdx.x);
  const int from = (chunk.first + N - 1) / N * N, to = chunk.aligned ? chunk.last / N * N : from;
  ZO_LOOP
  for (int i = from + thread * N; i < to; i += threads * N) work(i, Whole{});
  if (from == chunk.first && to == chunk.last) return;
  ZO_LOOP
  for (int i = chunk.first / N * N + thread * N; i < chunk.last; i += threads * N) {
    if (i < from || i >= to) work(i, Part{chunk.first - i, chunk.last - i});
  }
}

// The four words of counter n.
ZO_HD void random_words(uint32_t (&c)[4], uint32_t low, uint32_t high, uint64_t id,
                        const RoundKeys& keys) {
  c[0] = low;
  c[1] = high;
  c[2] = static_cast<uint32_t>(id);
  c[3] = static_cast<uint32_t>(id >> 32);
  philox<Lane>(c, keys);
}

// The words of element i of a chunk and those behind it, `per_counter` elements a counter.
template <int per_counter>
ZO_HD void words_at(uint32_t (&c)[4], const Chunk& chunk, int i, const RoundKeys& keys) {
  const uint64_t n = static_cast<uint64_t>(chunk.start) / per_counter;
  random_words(c, static_cast<uint32_t>(n) + static_cast<uint32_t>(i) / per_counter,
               static_cast<uint32_t>(n >> 32), chunk.id, keys);
}

// Near-normals of the eight elements of a counter that have element i of a chunk among them.
ZO_HD void hadamard_run(float (&z)[8], const Chunk& chunk, int i, const RoundKeys& keys) {
  const uint64_t n = static_cast<uint64_t>(chunk.start) / 16;
  const uint32_t in_tile = static_cast<uint32_t>(i) % 64 / 8;
  uint32_t words[4], packed[8];
  random_words(words, static_cast<uint32_t>(n) + static_cast<uint32_t>(i) / 128 * 8 + in_tile,
               static_cast<uint32_t>(n >> 32), chunk.id, keys);
  hadamard_halves<Lane>(packed, words);
  const bool second = i & 64;
  ZO_UNROLL
  for (int j = 0; j < 8; ++j) {
    z[j] = near_normal<Lane>(second ? Lane::difference(packed[j]) : Lane::sum(packed[j]));
  }
}

// Signs of element i of a chunk and those behind it, up to eight that begin at a multiple of N.
template <int N>
ZO_HD void signs_run(float (&z)[N], const Chunk& chunk, int i, const RoundKeys& keys) {
  const uint64_t n = static_cast<uint64_t>(chunk.start) / 128;
  const uint32_t at = static_cast<uint32_t>(i), byte = at % 1024 / 64;
  uint32_t words[4];
  random_words(words, static_cast<uint32_t>(n) + at / 1024 * 8 + at % 64 / 8,
               static_cast<uint32_t>(n >> 32), chunk.id, keys);
  const uint32_t low = byte & 4 ? words[1] : words[0], high = byte & 4 ? words[3] : words[2];
  const uint32_t bits = (byte & 8 ? high : low) >> (byte % 4 * 8 + at % 8);
  ZO_UNROLL
  for (int j = 0; j < N; ++j) z[j] = Lane::ones(bits >> j);
}

// Normals, or signs, of element i of a chunk and those behind it.
template <Transform transform, int N>
ZO_HD void normals(float (&z)[N], const Chunk& chunk, int i, const RoundKeys& keys) {
  if constexpr (transform == Transform::hadamard) {
    float run[8];
    hadamard_run(run, chunk, i, keys);
    ZO_UNROLL
    for (int j = 0; j < N; ++j) z[j] = N == 4 && (i & 4) ? run[j + 4] : run[j];
  } else if constexpr (transform == Transform::signs) {
    signs_run(z, chunk, i, keys);
  } else {
    ZO_UNROLL
    for (int j = 0; j < N; j += 4) {
      uint32_t c[4];
      words_at<4>(c, chunk, i + j, keys);
      if constexpr (transform == Transform::fast) {
        fast_normal_pair(c[0], c[1], z[j], z[j + 1]);
        fast_normal_pair(c[2], c[3], z[j + 2], z[j + 3]);
      } else {
        normal_pair<Lane>(c[0], c[1], z[j], z[j + 1]);
        normal_pair<Lane>(c[2], c[3], z[j + 2], z[j + 3]);
      }
    }
  }
}

ZO_HD RoundKeys keys_of(const int64_t* key) { return round_keys(static_cast<uint64_t>(*key)); }

// For a loop over groups. Left to itself the compiler adds the constants of the key schedule again
// for every group, to save registers: one instruction in 15.
ZO_HD RoundKeys kept_keys_of(const int64_t* key) {
  RoundKeys keys = keys_of(key);
  ZO_UNROLL
  for (int round = 0; round < 10; ++round) {
    keys.k0[round] = Lane::kept(keys.k0[round]);
    keys.k1[round] = Lane::kept(keys.k1[round]);
  }
  return keys;
}

// x rounded to the dtype of weights. A group of eight has one counter of the rounding stream.
template <class T, bool stochastically, int N>
ZO_HD Raw<T, N> rounded(const float (&x)[N], const Chunk& chunk, int i, const RoundKeys& keys) {
  if constexpr (stochastically) {
    uint32_t random[4];
    words_at<8>(random, chunk, i, keys);
    return narrow<T>(x, random);
  } else {
    return narrow<T>(x);
  }
}

// The key of a stream, of a step that only the device knows. Of one thread; the table is empty.
__global__ void __launch_bounds__(threads)
    stream_key(Table, int64_t* out, const int64_t* counter, StreamName name) {
  if (threadIdx.x != 0) return;
  const uint64_t n = static_cast<uint64_t>((*counter + name.ahead) / name.interval);
  uint32_t c[4] = {static_cast<uint32_t>(n), static_cast<uint32_t>(n >> 32),
                   static_cast<uint32_t>(name.query_and_purpose),
                   static_cast<uint32_t>(name.query_and_purpose >> 32)};
  philox<Lane>(c, round_keys(name.seed));
  *out = static_cast<int64_t>(c[0] | static_cast<uint64_t>(c[1]) << 32);
}

__global__ void __launch_bounds__(threads) bits(Table table, const int64_t* keys) {
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    const RoundKeys key = kept_keys_of(keys + chunk.index);
    int64_t* const out = base<int64_t>(row[address_], chunk);
    for_groups<4>(chunk, [&](int i, auto part) {
      uint32_t c[4];
      words_at<4>(c, chunk, i, key);
      store(out + i, part, Raw<int64_t, 4>{{c[0], 0, c[1], 0, c[2], 0, c[3], 0}});
    });
  });
}

template <Transform transform>
__global__ void __launch_bounds__(threads) normal(Table table, const int64_t* keys) {
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    const RoundKeys key = kept_keys_of(keys + chunk.index);
    float* const out = base<float>(row[address_], chunk);
    constexpr int N = group<float, transform>;
    for_groups<N>(chunk, [&](int i, auto part) {
      float z[N];
      normals<transform>(z, chunk, i, key);
      store(out + i, part, narrow<float>(z));
    });
  });
}

// weight = round(decay * weight + sum_k coeffs[k] * z_k)
template <class T, bool one, bool stochastically, Transform transform>
__global__ void __launch_bounds__(threads, 3)
    dense(Table table, const int64_t* keys, int directions, const float* coeffs,
          const float* decays, const int64_t* rounding) {
  constexpr int N = group<T, transform>;
  const RoundKeys key = one ? kept_keys_of(keys) : RoundKeys{};
  const RoundKeys rounding_key = stochastically ? kept_keys_of(rounding) : RoundKeys{};
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    T* const weights = base<T>(row[address_], chunk);
    const float* const coeff = coeffs + chunk.index * directions;
    const float only_coeff = one ? *coeff : 0;
    const float decay = decays[chunk.index];
    for_groups<N>(chunk, [&](int i, auto part) {
      const Raw<T, N> raw = load<T, N>(weights + i, part);
      float acc[N];
      widen(raw, acc);
      ZO_UNROLL
      for (float& x : acc) x = decayed<Lane>(x, decay);
      float z[N];
      if constexpr (one) {
        normals<transform>(z, chunk, i, key);
        ZO_UNROLL
        for (int j = 0; j < N; ++j) acc[j] = step<Lane>(acc[j], only_coeff, z[j]);
      } else {
        ZO_LOOP
        for (int k = 0; k < directions; ++k) {
          normals<transform>(z, chunk, i, keys_of(keys + k));
          ZO_UNROLL
          for (int j = 0; j < N; ++j) acc[j] = step<Lane>(acc[j], coeff[k], z[j]);
        }
      }
      store(weights + i, part, rounded<T, stochastically>(acc, chunk, i, rounding_key));
    });
  });
}

// The same by a transform that is known when the kernel runs.
template <int N>
ZO_HD void normals(Transform transform, float (&z)[N], const Chunk& chunk, int i,
                   const RoundKeys& keys) {
  if (transform == Transform::portable) {
    normals<Transform::portable>(z, chunk, i, keys);
  } else if (transform == Transform::signs) {
    normals<Transform::signs>(z, chunk, i, keys);
  } else if (transform == Transform::hadamard) {
    normals<Transform::hadamard>(z, chunk, i, keys);
  } else {
    normals<Transform::fast>(z, chunk, i, keys);
  }
}

// `dense` of the weights whose bits are set, or with z divided by the roots of scales.
template <class T, bool masked, bool stochastically>
__global__ void __launch_bounds__(threads, 2)
    shaped(Table table, const int64_t* keys, int directions, const float* coeffs,
           const float* decays, const int64_t* rounding, Transform transform) {
  constexpr int N = group<T>;
  const RoundKeys rounding_key = stochastically ? kept_keys_of(rounding) : RoundKeys{};
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    T* const weights = base<T>(row[address_], chunk);
    const float* const scales = base<float>(row[states_], chunk);
    // The byte of the chunk's first element; the tensor's may begin behind it.
    const uint8_t* const mask =
        reinterpret_cast<const uint8_t*>(row[states_]) + chunk.start / 8 - row[offset_] / 8;
    const float* const coeff = coeffs + chunk.index * directions;
    const float decay = decays[chunk.index];
    for_groups<N>(chunk, [&](int i, auto part) {
      float before[N], acc[N], root[N] = {};
      widen(load<T, N>(weights + i, part), before);
      if constexpr (!masked) widen(load<float, N>(scales + i, part), root);
      ZO_UNROLL
      for (int j = 0; j < N; ++j) {
        acc[j] = decayed<Lane>(before[j], decay);
        root[j] = Lane::sqrt(root[j]);
      }
      ZO_LOOP
      for (int k = 0; k < directions; ++k) {
        float z[N];
        normals(transform, z, chunk, i, keys_of(keys + k));
        ZO_UNROLL
        for (int j = 0; j < N; ++j) {
          acc[j] = step<Lane>(acc[j], coeff[k], masked ? z[j] : Lane::div(z[j], root[j]));
        }
      }
      if constexpr (masked) {  // a group lies within a byte
        const uint32_t bits = static_cast<uint32_t>(global(mask)[i / 8]) >> i % 8;
        ZO_UNROLL
        for (int j = 0; j < N; ++j) acc[j] = Lane::choose(bits >> j, acc[j], before[j]);
      }
      store(weights + i, part, rounded<T, stochastically>(acc, chunk, i, rounding_key));
    });
  });
}

template <class T, int N, class Some>
ZO_HD void load_first(float (&x)[N], First first, int64_t address, const Chunk& chunk, int i,
                      Some part) {
  if (first == First::nothing) return;
  if (first == First::float32) {
    widen(load<float, N>(base<float>(address, chunk) + i, part), x);
  } else {
    widen(load<T, N>(base<T>(address, chunk) + i, part), x);
  }
}

template <class T, int N, class Some>
ZO_HD void store_first(const float (&x)[N], First first, int64_t address, const Chunk& chunk,
                       int i, Some part) {
  if (first == First::nothing) return;
  if (first == First::float32) {
    store(base<float>(address, chunk) + i, part, narrow<float>(x));
  } else {
    store(base<T>(address, chunk) + i, part, narrow<T>(x));
  }
}

// g goes in, what the weight is moved by comes out.
template <Rule rule, bool kept, int N>
ZO_HD void all_moments(float (&g)[N], float (&first)[N], float (&second)[N],
                       const MomentCoeffs& c) {
  ZO_UNROLL
  for (int j = 0; j < N; ++j) g[j] = moments<Lane, rule, kept>(g[j], first[j], second[j], c);
}

// The estimate g = sum_k grads[k] * z_k goes into the moments, the moments into the weight. Where it
// is `squared`, the rule is Adam: its second moment is sum_k squares[k] * z_k^2, and none are kept.
template <class T, bool stochastically, bool squared>
__global__ void __launch_bounds__(threads, 2)
    moments(Table table, const int64_t* keys, int directions, const float* grads,
            const float* restores, const float* squares, const float* coeffs,
            const float* decays, Rule rule, First kept, const int64_t* rounding,
            Transform transform) {
  constexpr int N = group<T>;
  if (squared) kept = First::nothing;  // the compiler then knows it
  const RoundKeys rounding_key = stochastically ? kept_keys_of(rounding) : RoundKeys{};
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    T* const weights = base<T>(row[address_], chunk);
    const int64_t firsts = row[states_];
    float* const seconds = base<float>(row[states_ + 1], chunk);
    const float* const grad = grads + chunk.index * directions;
    const float* const restore = restores + chunk.index * directions;
    const float* const square = squared ? squares + chunk.index * directions : nullptr;
    const float* const own = coeffs + chunk.index * 6;
    const MomentCoeffs c = {own[0], own[1], own[2], own[3], own[4], own[5]};
    const float decay = decays[chunk.index];
    for_groups<N>(chunk, [&](int i, auto part) {
      const Raw<T, N> raw = load<T, N>(weights + i, part);
      float acc[N], g[N] = {}, first[N] = {}, second[N] = {};
      load_first<T>(first, kept, firsts, chunk, i, part);
      widen(raw, acc);
      ZO_UNROLL
      for (float& x : acc) x = decayed<Lane>(x, decay);
      ZO_LOOP
      for (int k = 0; k < directions; ++k) {
        float z[N];
        const RoundKeys key = keys_of(keys + k);
        if (transform == Transform::portable) {
          normals<Transform::portable>(z, chunk, i, key);
        } else if (transform == Transform::signs) {
          normals<Transform::signs>(z, chunk, i, key);
        } else if (transform == Transform::hadamard) {
          normals<Transform::hadamard>(z, chunk, i, key);
        } else {
          normals<Transform::fast>(z, chunk, i, key);
        }
        ZO_UNROLL
        for (int j = 0; j < N; ++j) {
          g[j] = step<Lane>(g[j], grad[k], z[j]);
          acc[j] = step<Lane>(acc[j], restore[k], z[j]);
          if constexpr (squared) second[j] = add_square<Lane>(second[j], square[k], z[j]);
        }
      }
      if constexpr (squared) {
        ZO_UNROLL
        for (int j = 0; j < N; ++j) {
          g[j] = adam<Lane>(Lane::mul(g[j], c.gain), second[j], c.eps);
        }
      } else if (rule == Rule::adam) {
        widen(load<float, N>(seconds + i, part), second);
        all_moments<Rule::adam, true>(g, first, second, c);
        store(seconds + i, part, narrow<float>(second));
      } else if (rule == Rule::sign && kept == First::nothing) {
        all_moments<Rule::sign, false>(g, first, second, c);
      } else if (rule == Rule::sign) {
        all_moments<Rule::sign, true>(g, first, second, c);
      } else if (kept == First::nothing) {
        all_moments<Rule::momentum, false>(g, first, second, c);
      } else {
        all_moments<Rule::momentum, true>(g, first, second, c);
      }
      store_first<T>(first, kept, firsts, chunk, i, part);
      ZO_UNROLL
      for (int j = 0; j < N; ++j) acc[j] = step<Lane>(acc[j], c.step, g[j]);
      store(weights + i, part, rounded<T, stochastically>(acc, chunk, i, rounding_key));
    });
  });
}

// HiZOO: back with the old Hessian, on with the new one.
template <class T, bool stochastically>
__global__ void __launch_bounds__(threads, 2)
    hizoo(Table table, const int64_t* keys, int directions, const float* grads,
          const float* restores, const float* squares, const float* coeffs, const float* decays,
          const int64_t* rounding, Transform transform) {
  constexpr int N = group<T>;
  const RoundKeys rounding_key = stochastically ? kept_keys_of(rounding) : RoundKeys{};
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    T* const weights = base<T>(row[address_], chunk);
    float* const hessians = base<float>(row[states_], chunk);
    const float* const grad = grads + chunk.index * directions;
    const float* const restore = restores + chunk.index * directions;
    const float* const square = squares + chunk.index * directions;
    const float* const own = coeffs + chunk.index * 6;
    const MomentCoeffs c = {own[0], own[1], own[2], own[3], own[4], own[5]};
    const float decay = decays[chunk.index];
    for_groups<N>(chunk, [&](int i, auto part) {
      float acc[N], hessian[N], root[N], g[N] = {}, v[N] = {};
      widen(load<T, N>(weights + i, part), acc);
      widen(load<float, N>(hessians + i, part), hessian);
      ZO_UNROLL
      for (int j = 0; j < N; ++j) {
        acc[j] = decayed<Lane>(acc[j], decay);
        root[j] = Lane::sqrt(hessian[j]);
      }
      ZO_LOOP
      for (int k = 0; k < directions; ++k) {
        float z[N];
        normals(transform, z, chunk, i, keys_of(keys + k));
        ZO_UNROLL
        for (int j = 0; j < N; ++j) {
          g[j] = step<Lane>(g[j], grad[k], z[j]);
          acc[j] = step<Lane>(acc[j], restore[k], Lane::div(z[j], root[j]));
          v[j] = add_square<Lane>(v[j], square[k], z[j]);
        }
      }
      ZO_UNROLL
      for (int j = 0; j < N; ++j) {
        hessian[j] = new_hessian<Lane>(hessian[j], v[j], c);
        const float moved = Lane::div(Lane::mul(g[j], c.gain), Lane::sqrt(hessian[j]));
        acc[j] = step<Lane>(acc[j], c.step, moved);
      }
      store(hessians + i, part, narrow<float>(hessian));
      store(weights + i, part, rounded<T, stochastically>(acc, chunk, i, rounding_key));
    });
  });
}

// Factors: moment = decay * moment + coeff * u
__global__ void __launch_bounds__(threads)
    factor_momentum(Table table, const float* coeffs, const float* decays) {
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const Chunk chunk = chunk_of(row, program);
    float* const moment = base<float>(row[address_], chunk);
    const float* const u = base<float>(row[states_], chunk);
    const float coeff = coeffs[chunk.index], decay = decays[chunk.index];
    for_groups<4>(chunk, [&](int i, auto part) {
      float m[4], x[4];
      widen(load<float, 4>(moment + i, part), m);
      widen(load<float, 4>(u + i, part), x);
      ZO_UNROLL
      for (int j = 0; j < 4; ++j) m[j] = momentum<Lane>(m[j], x[j], coeff, decay);
      store(moment + i, part, narrow<float>(m));
    });
  });
}

// ---- low rank ----------------------------------------------------------------------------------

// What all rows of a matrix share.
struct Matrix {
  int64_t columns, rank;
  uint64_t id;
  float coeff, decay;
};

// The 16-bit numbers of eight elements from e: those of one counter, or of two.
ZO_HD void random_at(uint32_t (&random)[4], int64_t e, uint64_t id, const RoundKeys& keys) {
  const uint64_t n = static_cast<uint64_t>(e) / 8;
  const int skip = static_cast<int>(e % 8);
  uint32_t word[8] = {}, c[4];
  random_words(c, static_cast<uint32_t>(n), static_cast<uint32_t>(n >> 32), id, keys);
  ZO_UNROLL
  for (int j = 0; j < 4; ++j) word[j] = c[j];
  if (skip != 0) {
    random_words(c, static_cast<uint32_t>(n + 1), static_cast<uint32_t>((n + 1) >> 32), id, keys);
    ZO_UNROLL
    for (int j = 0; j < 4; ++j) word[j + 4] = c[j];
  }
  // Moves of fixed distances, as registers can't be indexed.
  ZO_UNROLL
  for (int j = 0; j < 6; ++j) word[j] = skip & 4 ? word[j + 2] : word[j];
  ZO_UNROLL
  for (int j = 0; j < 5; ++j) word[j] = skip & 2 ? word[j + 1] : word[j];
  ZO_UNROLL
  for (int j = 0; j < 4; ++j) {
    random[j] = skip & 1 ? word[j] >> 16 | word[j + 1] << 16 : word[j];
  }
}

// dot[j] += sum over `count` columns of u v[j].
template <int count, int N>
ZO_HD void add_products(float (&dot)[N], const float* us, const float (&v)[N][count]) {
  float u[count];
  widen(load<float, count>(us, all_of<count>()), u);
  ZO_UNROLL
  for (int q = 0; q < count; ++q) {
    ZO_UNROLL
    for (int j = 0; j < N; ++j) dot[j] = Lane::fma(u[q], v[j][q], dot[j]);
  }
}

// A group of columns of a matrix, in every `apart`-th row from the pointers on, `rows` of them in
// all with those between. `lines` rows at a time, so that as many loads are on their way. Takes
// `count` columns of the factors at a time; if these are `all`, v stays in registers.
template <class T, int count, bool all, int lines, bool stochastically, class Some>
ZO_HD void update_rows(T* weights, const float* us, const float* vs, int64_t e, int rows,
                       Some part, int columns, const Matrix& m, const RoundKeys& keys) {
  constexpr int N = group<T>;
  constexpr int apart = threads * N / tile_columns;
  const int64_t rank = all ? count : m.rank;
  float v[N][count];
  if constexpr (all) {
    float flat[N * count];
    widen(load<float, N * count>(vs, Whole{}), flat);
    ZO_UNROLL
    for (int j = 0; j < N * count; ++j) v[j / count][j % count] = flat[j];
  }
  ZO_LOOP
  for (int row = 0; row < rows; row += lines * apart) {
    T* here[lines];
    const float* u[lines];
    Raw<T, N> raw[lines];
    float dot[lines][N];
    ZO_UNROLL
    for (int k = 0; k < lines; ++k) {  // behind the last row, the first one again
      const bool exists = k == 0 || row + k * apart < rows;
      here[k] = exists ? weights + k * apart * m.columns : weights;
      u[k] = exists ? us + k * apart * rank : us;
      raw[k] = load<T, N>(here[k], part);
      ZO_UNROLL
      for (int j = 0; j < N; ++j) dot[k][j] = -0.0f;  // x + -0 is x, also where x is -0
    }
    weights += lines * apart * m.columns;
    us += lines * apart * rank;
    ZO_LOOP
    for (int64_t q = 0; q < rank; q += count) {
      if constexpr (!all) {
        ZO_UNROLL
        for (int j = 0; j < N; ++j) {  // behind the last column, it again
          const float* const own = vs + (j < columns ? j : columns - 1) * rank + q;
          widen(load<float, count>(own, all_of<count>()), v[j]);
        }
      }
      ZO_UNROLL
      for (int k = 0; k < lines; ++k) add_products(dot[k], u[k] + q, v);
    }
    ZO_UNROLL
    for (int k = 0; k < lines; ++k) {
      float acc[N];
      widen(raw[k], acc);
      ZO_UNROLL
      for (int j = 0; j < N; ++j) {
        acc[j] = step<Lane>(decayed<Lane>(acc[j], m.decay), m.coeff, dot[k][j]);
      }
      if (k > 0 && row + k * apart >= rows) break;
      if constexpr (stochastically) {
        uint32_t random[N / 2];
        random_at(random, e + (row + k * apart) * m.columns, m.id, keys);
        store(here[k], part, narrow<T>(acc, random));
      } else {
        store(here[k], part, narrow<T>(acc));
      }
    }
  }
}

// weight = round(decay * weight + coeff * (u v^T)). Rows of the table with another rank than the
// kernel's are served too, in a loop over their rank, as is what isn't aligned.
template <class T, int rank, bool stochastically>
__global__ void __launch_bounds__(threads, 2)
    lowrank(Table table, const float* coeffs, const float* decays, const int64_t* rounding) {
  constexpr int N = group<T>;
  constexpr int across = tile_columns / N;  // threads
  constexpr int lines = rank == 8 || stochastically ? 2 : 4;
  const RoundKeys key = stochastically ? kept_keys_of(rounding) : RoundKeys{};
  for_programs(table, [&](const int64_t* row, int64_t program) {
    const int64_t index = row[index_];
    const Matrix m = {row[columns_], row[rank_], static_cast<uint64_t>(row[id_]),
                      coeffs[index], decays[index]};
    const int64_t tiles = (m.columns + tile_columns - 1) / tile_columns;  // in a row of them
    const int64_t first = program / tiles * tile_rows + threadIdx.x / across;
    const int64_t column = program % tiles * tile_columns + threadIdx.x % across * N;
    const int rows = at_most(tile_rows - threadIdx.x / across, row[rows_] - first);
    const int columns = at_most(N, m.columns - column);
    if (columns <= 0) return;
    T* const weights = reinterpret_cast<T*>(row[address_]) + first * m.columns + column;
    const float* const u = reinterpret_cast<const float*>(row[u_]) + first * m.rank;
    const float* const v = reinterpret_cast<const float*>(row[v_]) + column * m.rank;
    const int64_t e = row[offset_] + first * m.columns + column;

    const bool whole = row[aligned_] != 0 && columns == N;
    const bool quads = whole && row[u_] % 16 == 0 && row[v_] % 16 == 0;
    constexpr int known = rank == 0 ? 4 : rank;
    constexpr bool all = rank != 0;
    if (quads && (all ? m.rank == known : m.rank % known == 0)) {
      update_rows<T, known, all, lines, stochastically>(weights, u, v, e, rows, Whole{}, N, m,
                                                        key);
      return;
    }
    if constexpr (rank == 0) {
      if (whole) {
        update_rows<T, 1, false, lines, stochastically>(weights, u, v, e, rows, Whole{}, N, m,
                                                        key);
        return;
      }
    }
    update_rows<T, 1, false, 1, stochastically>(weights, u, v, e, rows, Part{0, columns}, columns,
                                                m, key);
  });
}

}  // namespace zo_fused
