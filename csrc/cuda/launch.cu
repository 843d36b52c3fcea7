// Which kernel serves which arguments. Compiled by nvcc and, for tests on a CPU, with
// tests/cuda_emulation/emulation.h, which has its own `launch`.

#include "kernels.h"

#if defined(__CUDACC__)
#include <map>
#include <mutex>
#include <utility>
#endif

namespace zo_fused {
namespace {

#if defined(__CUDACC__)
// Blocks of a kernel that the current device runs at a time; asked once.
template <class Kernel>
cudaError_t places_of(Kernel* kernel, int64_t& places) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> known;
  int device = 0, units = 0, blocks = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& found = known[{reinterpret_cast<const void*>(kernel), device}];
  if (found == 0) {
    auto error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0);
    }
    if (error != cudaSuccess) return error;
    found = static_cast<int64_t>(units) * (blocks > 0 ? blocks : 1);
  }
  places = found;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Table, Parameters...), void* stream, const Table& table,
             Arguments... arguments) {
  int64_t places = 0;
  if (const auto error = places_of(kernel, places)) return cudaGetErrorString(error);
  const auto blocks = static_cast<unsigned>(blocks_of(table.programs, places));
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(table, arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

template <class Call>
Error with_dtype(Dtype dtype, const Call& call) {
  switch (dtype) {
    case Dtype::float16:
      return call(Half{});
    case Dtype::bfloat16:
      return call(BFloat16{});
    default:
      return call(float{});
  }
}

struct True {
  static constexpr bool value = true;
};

struct False {
  static constexpr bool value = false;
};

template <class Call>
Error with_flag(bool flag, const Call& call) {
  return flag ? call(True{}) : call(False{});
}

template <Transform t>
struct By {
  static constexpr Transform value = t;
};

template <class Call>
Error with_transform(Transform transform, const Call& call) {
  switch (transform) {
    case Transform::signs:
      return call(By<Transform::signs>{});
    case Transform::hadamard:
      return call(By<Transform::hadamard>{});
    case Transform::fast:
      return call(By<Transform::fast>{});
    default:
      return call(By<Transform::portable>{});
  }
}

// call(weight, whether it is rounded stochastically)
template <class Call>
Error with_writing(Dtype dtype, const Writing& writing, const Call& call) {
  return with_dtype(dtype, [&](auto weight) {
    if constexpr (rounds<decltype(weight)>) {
      return with_flag(writing.rounding != nullptr, [&](auto flag) { return call(weight, flag); });
    } else {
      return call(weight, False{});
    }
  });
}

}  // namespace

std::vector<int64_t> architectures() {
#if defined(__CUDA_ARCH_LIST__)
  return {__CUDA_ARCH_LIST__};
#else
  return {};
#endif
}

Error launch_key(int64_t* out, const int64_t* counter, const StreamName& name, void* stream) {
  return launch(stream_key, stream, Table{nullptr, 0, 1}, out, counter, name);
}

Error launch_bits(const Table& table, const int64_t* keys, void* stream) {
  return launch(bits, stream, table, keys);
}

Error launch_normal(const Table& table, const int64_t* keys, Transform transform, void* stream) {
  return with_transform(transform, [&](auto by) {
    return launch(normal<decltype(by)::value>, stream, table, keys);
  });
}

Error launch_dense(const Table& table, Dtype dtype, const Directions& directions,
                   const float* coeffs, const Writing& writing, Transform transform,
                   void* stream) {
  return with_writing(dtype, writing, [&](auto weight, auto stochastically) {
    return with_flag(directions.count == 1, [&](auto one) {
      return with_transform(transform, [&](auto by) {
        return launch(dense<decltype(weight), decltype(one)::value,
                            decltype(stochastically)::value, decltype(by)::value>,
                      stream, table, directions.keys, directions.count, coeffs, writing.decays,
                      writing.rounding);
      });
    });
  });
}

Error launch_shaped(const Table& table, Dtype dtype, bool masked, const Directions& directions,
                    const float* coeffs, const Writing& writing, Transform transform,
                    void* stream) {
  return with_writing(dtype, writing, [&](auto weight, auto stochastically) {
    return with_flag(masked, [&](auto flag) {
      return launch(
          shaped<decltype(weight), decltype(flag)::value, decltype(stochastically)::value>, stream,
          table, directions.keys, directions.count, coeffs, writing.decays, writing.rounding,
          transform);
    });
  });
}

Error launch_moments(const Table& table, Dtype dtype, First first, Rule rule,
                     const Directions& directions, const float* grads, const float* restores,
                     std::optional<const float*> squares, const float* coeffs,
                     const Writing& writing, Transform transform, void* stream) {
  if (rule == Rule::hizoo) {
    return with_writing(dtype, writing, [&](auto weight, auto stochastically) {
      return launch(hizoo<decltype(weight), decltype(stochastically)::value>, stream, table,
                    directions.keys, directions.count, grads, restores, squares.value_or(nullptr),
                    coeffs, writing.decays, writing.rounding, transform);
    });
  }
  return with_writing(dtype, writing, [&](auto weight, auto stochastically) {
    return with_flag(squares.has_value(), [&](auto squared) {
      return launch(moments<decltype(weight), decltype(stochastically)::value,
                            decltype(squared)::value>,
                    stream, table, directions.keys, directions.count, grads, restores,
                    squares.value_or(nullptr), coeffs, writing.decays, rule, first,
                    writing.rounding, transform);
    });
  });
}

Error launch_lowrank(const Table& table, Dtype dtype, int64_t rank, const float* coeffs,
                     const Writing& writing, void* stream) {
  return with_writing(dtype, writing, [&](auto weight, auto stochastically) {
    using T = decltype(weight);
    constexpr bool s = decltype(stochastically)::value;
    auto kernel = lowrank<T, 0, s>;
    if constexpr (!s) {  // random bits outweigh what a known rank saves
      kernel = rank == 1   ? lowrank<T, 1, s>
               : rank == 2 ? lowrank<T, 2, s>
               : rank == 4 ? lowrank<T, 4, s>
               : rank == 8 ? lowrank<T, 8, s>
                           : kernel;
    }
    return launch(kernel, stream, table, coeffs, writing.decays, writing.rounding);
  });
}

Error launch_factor_momentum(const Table& table, const float* coeffs, const float* decays,
                         void* stream) {
  return launch(factor_momentum, stream, table, coeffs, decays);
}

}  // namespace zo_fused
