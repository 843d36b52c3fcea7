// The operators of zo_fused_CUDA: one launch each, on the stream whose handle is given. Only
// PyTorch's stable ABI is used and nothing of its CUDA libraries, so the extension can be built
// and imported with any build of torch. Arguments are those of zo_fused/sweeps/backends/multi_tensor.py, checked.

#include <Python.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <optional>
#include <string>
#include <vector>

#include "launch.h"

// Tests on a CPU register the same operators, over emulated launches, under another name.
#if !defined(ZO_FUSED_CUDA_LIBRARY)
#define ZO_FUSED_CUDA_LIBRARY zo_fused_CUDA
#endif
#define ZO_STABLE_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define ZO_STABLE_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace zo_fused::operators {
namespace {

using torch::stable::Tensor;

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Table table_of(const Tensor& rows, int64_t programs) {
  return {read<int64_t>(rows), rows.size(0), programs};
}

Directions directions_of(const Tensor& keys) {
  return {read<int64_t>(keys), static_cast<int>(keys.numel())};
}

Writing writing_of(const Tensor& decay, const std::optional<Tensor>& rounding) {
  return {read<float>(decay), rounding ? read<int64_t>(*rounding) : nullptr};
}

Transform transform_of(int64_t number) {
  STD_TORCH_CHECK(0 <= number && number <= static_cast<int64_t>(Transform::fast),
                  "zo_fused: there is no transform number ", number);
  return static_cast<Transform>(number);
}

void check(Error error) {
  STD_TORCH_CHECK(error == nullptr, "zo_fused: a CUDA kernel could not be launched: ", error);
}

void* stream_of(int64_t handle) { return reinterpret_cast<void*>(handle); }

std::vector<int64_t> sizes() { return {chunk_elements, tile_rows, tile_columns}; }

void key(Tensor out, const Tensor& counter, int64_t ahead, int64_t interval, int64_t name,
         int64_t seed, int64_t stream) {
  const StreamName stream_name{ahead, interval, static_cast<uint64_t>(name),
                               static_cast<uint64_t>(seed)};
  check(launch_key(static_cast<int64_t*>(out.mutable_data_ptr()), read<int64_t>(counter),
                   stream_name, stream_of(stream)));
}

void bits(const Tensor& table, int64_t programs, const Tensor& keys, int64_t stream) {
  check(launch_bits(table_of(table, programs), read<int64_t>(keys), stream_of(stream)));
}

void normal(const Tensor& table, int64_t programs, const Tensor& keys, int64_t transform,
            int64_t stream) {
  check(launch_normal(table_of(table, programs), read<int64_t>(keys), transform_of(transform),
                      stream_of(stream)));
}

void dense(const Tensor& table, int64_t programs, int64_t dtype, const Tensor& keys,
           const Tensor& coeffs, const Tensor& decay, std::optional<Tensor> rounding,
           int64_t transform, int64_t stream) {
  check(launch_dense(table_of(table, programs), static_cast<Dtype>(dtype), directions_of(keys),
                     read<float>(coeffs), writing_of(decay, rounding), transform_of(transform),
                     stream_of(stream)));
}

// masked: 0, 1, or -1 for rows that have no shape.
void shaped(const Tensor& table, int64_t programs, int64_t dtype, int64_t masked,
            const Tensor& keys, const Tensor& coeffs, const Tensor& decay,
            std::optional<Tensor> rounding, int64_t transform, int64_t stream) {
  if (masked < 0) {
    dense(table, programs, dtype, keys, coeffs, decay, rounding, transform, stream);
    return;
  }
  check(launch_shaped(table_of(table, programs), static_cast<Dtype>(dtype), masked != 0,
                      directions_of(keys), read<float>(coeffs), writing_of(decay, rounding),
                      transform_of(transform), stream_of(stream)));
}

void moments(const Tensor& table, int64_t programs, int64_t dtype, int64_t first,
             const Tensor& keys, const Tensor& grads, const Tensor& restores,
             const Tensor& coeffs, const Tensor& decay, int64_t rule,
             std::optional<Tensor> rounding, int64_t transform, std::optional<Tensor> squares,
             int64_t stream) {
  check(launch_moments(table_of(table, programs), static_cast<Dtype>(dtype),
                       static_cast<First>(first), static_cast<Rule>(rule), directions_of(keys),
                       read<float>(grads), read<float>(restores),
                       squares ? std::optional(read<float>(*squares)) : std::nullopt,
                       read<float>(coeffs),
                       writing_of(decay, rounding), transform_of(transform), stream_of(stream)));
}

void lowrank(const Tensor& table, int64_t programs, int64_t dtype, int64_t rank,
             const Tensor& coeffs, const Tensor& decay, std::optional<Tensor> rounding,
             int64_t stream) {
  check(launch_lowrank(table_of(table, programs), static_cast<Dtype>(dtype), rank,
                       read<float>(coeffs), writing_of(decay, rounding), stream_of(stream)));
}

void factor_momentum(const Tensor& table, int64_t programs, const Tensor& coeffs,
                 const Tensor& decay, int64_t stream) {
  check(launch_factor_momentum(table_of(table, programs), read<float>(coeffs), read<float>(decay),
                           stream_of(stream)));
}

}  // namespace
}  // namespace zo_fused::operators

// Addresses of what is written stand in the table, so the schemas can't name it.
ZO_STABLE_LIBRARY(ZO_FUSED_CUDA_LIBRARY, m) {
  m.def("architectures() -> int[]");
  m.def("sizes() -> int[]");
  m.def(
      "key(Tensor(a!) out, Tensor counter, int ahead, int interval, int name, int seed, "
      "int stream) -> ()");
  m.def("bits(Tensor table, int programs, Tensor keys, int stream) -> ()");
  m.def("normal(Tensor table, int programs, Tensor keys, int transform, int stream) -> ()");
  m.def(
      "dense(Tensor table, int programs, int dtype, Tensor keys, Tensor coeffs, Tensor decay, "
      "Tensor? rounding, int transform, int stream) -> ()");
  m.def(
      "shaped(Tensor table, int programs, int dtype, int masked, Tensor keys, Tensor coeffs, "
      "Tensor decay, Tensor? rounding, int transform, int stream) -> ()");
  m.def(
      "moments(Tensor table, int programs, int dtype, int first, Tensor keys, Tensor grads, "
      "Tensor restores, Tensor coeffs, Tensor decay, int rule, Tensor? rounding, "
      "int transform, Tensor? squares, int stream) -> ()");
  m.def(
      "lowrank(Tensor table, int programs, int dtype, int rank, Tensor coeffs, Tensor decay, "
      "Tensor? rounding, int stream) -> ()");
  m.def(
      "factor_momentum(Tensor table, int programs, Tensor coeffs, Tensor decay, int stream) -> ()");
}

ZO_STABLE_LIBRARY_IMPL(ZO_FUSED_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("architectures", TORCH_BOX(&zo_fused::architectures));
  m.impl("sizes", TORCH_BOX(&zo_fused::operators::sizes));
  m.impl("key", TORCH_BOX(&zo_fused::operators::key));
  m.impl("bits", TORCH_BOX(&zo_fused::operators::bits));
  m.impl("normal", TORCH_BOX(&zo_fused::operators::normal));
  m.impl("dense", TORCH_BOX(&zo_fused::operators::dense));
  m.impl("shaped", TORCH_BOX(&zo_fused::operators::shaped));
  m.impl("moments", TORCH_BOX(&zo_fused::operators::moments));
  m.impl("lowrank", TORCH_BOX(&zo_fused::operators::lowrank));
  m.impl("factor_momentum", TORCH_BOX(&zo_fused::operators::factor_momentum));
}

// `import zo_fused._CUDA` loads the library, which runs the registrations above.
extern "C" PyMODINIT_FUNC PyInit__CUDA() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
