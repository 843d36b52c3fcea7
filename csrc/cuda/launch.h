// The launchers of the CUDA kernels. What each computes is told in zo_fused/sweeps/backends/multi_tensor.py; all
// pointers are to memory of the device. They return the reason why a launch failed, or null.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../element.h"

namespace zo_fused {

// Elements that a program of a sweep over noise takes. A power of two: the counters of a chunk
// share their high word.
constexpr int64_t chunk_elements = 1 << 15;

// Rows and columns that a program of a low-rank sweep takes. A warp has a whole row of 16-bit
// weights, and a thread 8 rows.
constexpr int64_t tile_rows = 64;
constexpr int64_t tile_columns = 256;

enum class Dtype { float16, bfloat16, float32 };

// What is kept of the first moment from step to step.
enum class First { nothing, float32, like_weights };

// zo_fused/sweeps/backends/table.py
struct Table {
  const int64_t* rows;
  int64_t count, programs;
};

// Stream keys of K directions.
struct Directions {
  const int64_t* keys;
  int count;
};

// How weights are written: nearest if there is no key.
struct Writing {
  const float* decays;      // [P]
  const int64_t* rounding;  // [1] or null
};

// What a stream key is made of besides the counter of steps.
struct StreamName {
  int64_t ahead, interval;  // the step, or window, is (counter + ahead) / interval
  uint64_t query_and_purpose, seed;
};

using Error = const char*;

std::vector<int64_t> architectures();  // 10 * compute capability

Error launch_key(int64_t* out, const int64_t* counter, const StreamName&, void* stream);
Error launch_bits(const Table&, const int64_t* keys, void* stream);
Error launch_normal(const Table&, const int64_t* keys, Transform, void* stream);
Error launch_dense(const Table&, Dtype, const Directions&, const float* coeffs, const Writing&,
                   Transform, void* stream);
// All rows have scales, or all have masks.
Error launch_shaped(const Table&, Dtype, bool masked, const Directions&, const float* coeffs,
                    const Writing&, Transform, void* stream);
// With `squares` (of no directions, a null pointer) the rule is Adam and nothing is kept, or it is
// that of HiZOO.
Error launch_moments(const Table&, Dtype, First, Rule, const Directions&, const float* grads,
                     const float* restores, std::optional<const float*> squares,
                     const float* coeffs, const Writing&, Transform, void* stream);
Error launch_lowrank(const Table&, Dtype, int64_t rank, const float* coeffs, const Writing&,
                     void* stream);
Error launch_factor_momentum(const Table&, const float* coeffs, const float* decays, void* stream);

}  // namespace zo_fused
