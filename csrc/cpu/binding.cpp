// The operators of zo_fused_C: argument unpacking, choice of instruction set, threads.
// Schemas are explained in zo_fused/_ops.py, whose router has checked every shape and device.
// Only PyTorch's stable ABI is used, so one binary serves many versions.

#include <Python.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cfenv>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sweeps.h"

namespace zo_fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// ---- instruction set ---------------------------------------------------------------------------

struct Isa {
  const char* name;
  const Sweeps* sweeps;
  bool supported;
};

// The last supported one is the best; the index is what `isa()` returns.
std::vector<Isa> instruction_sets() {
  std::vector<Isa> all = {{"portable", &sweeps_portable, true}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  all.push_back({"avx2", &sweeps_avx2, avx2});
  all.push_back({"avx512", &sweeps_avx512, avx512});
#endif
  return all;
}

struct Choice {
  int64_t index;
  const Sweeps* sweeps;
};

// The best supported instruction set, or the one that ZO_FUSED_ISA asks for.
Choice choose() {
  const char* const variable = std::getenv("ZO_FUSED_ISA");
  const std::string wanted = variable ? variable : "";
  const std::vector<Isa> all = instruction_sets();
  for (size_t i = all.size(); i-- > 0;) {
    if (wanted.empty() ? all[i].supported : wanted == all[i].name) {
      STD_TORCH_CHECK(all[i].supported, "ZO_FUSED_ISA=", wanted, ": this CPU lacks it");
      return {static_cast<int64_t>(i), all[i].sweeps};
    }
  }
  STD_TORCH_CHECK(false, "ZO_FUSED_ISA=", wanted, ": choose portable, avx2 or avx512");
  return {};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

int64_t isa() { return chosen().index; }

// ---- threads -----------------------------------------------------------------------------------

// Round to nearest and keep subnormals, whatever the thread was set to
// (torch.set_flush_denormal), for the life of this object.
class DefaultRounding {
 public:
  DefaultRounding() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultRounding() { std::fesetenv(&saved_); }
  DefaultRounding(const DefaultRounding&) = delete;
  DefaultRounding& operator=(const DefaultRounding&) = delete;

 private:
  std::fenv_t saved_;
};

// Below this many elements a second thread costs more than it brings.
constexpr int64_t parallel_elements = int64_t{1} << 15;

// work(i, chunk) for every chunk of every parameter i, where parameter i has counts[i] chunks;
// `elements` in all. `work` must not throw.
template <class Work>
void for_chunks(const std::vector<int64_t>& counts, int64_t elements, const Work& work) {
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const int64_t count : counts) ends.push_back(total += count);
  const int64_t grain = elements < parallel_elements ? std::max<int64_t>(total, 1) : 1;
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    const DefaultRounding rounding;
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= ends[i]) ++i;
      work(i, chunk - (ends[i] - counts[i]));
    }
  });
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- arguments ---------------------------------------------------------------------------------

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Memory and dtype of the tensors that a sweep writes.
struct Written {
  std::vector<char*> data;
  std::vector<Dtype> dtype;
  std::vector<int64_t> item_size;

  // Element `start` of tensor i; null if there are no tensors.
  char* at(size_t i, int64_t start) const {
    return data.empty() ? nullptr : data[i] + start * item_size[i];
  }
};

Written weights(const Tensors& tensors) {
  Written written;
  for (const Tensor& tensor : tensors) {
    const ScalarType type = tensor.scalar_type();
    const bool half = type == ScalarType::Half, bfloat = type == ScalarType::BFloat16;
    STD_TORCH_CHECK(half || bfloat || type == ScalarType::Float,
                    "weights must be float16, bfloat16 or float32");
    written.dtype.push_back(half ? float16 : bfloat ? bfloat16 : float32);
    written.item_size.push_back(half || bfloat ? 2 : 4);
  }
  for (const Tensor& tensor : tensors) {
    written.data.push_back(static_cast<char*>(tensor.mutable_data_ptr()));
  }
  return written;
}

template <class T>
std::vector<T*> outputs(const Tensors& tensors, ScalarType type) {
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, "output of an unsupported dtype");
  }
  std::vector<T*> data;
  for (const Tensor& tensor : tensors) data.push_back(static_cast<T*>(tensor.mutable_data_ptr()));
  return data;
}

// ---- sweeps over noise -------------------------------------------------------------------------

std::vector<RoundKeys> expand(const Tensor& keys) {
  const int64_t* const key = read<int64_t>(keys);
  std::vector<RoundKeys> expanded;
  for (int64_t k = 0; k < keys.numel(); ++k) {
    expanded.push_back(round_keys(static_cast<uint64_t>(key[k])));
  }
  return expanded;
}

// The key of a rounding stream as the sweeps take it: null without one.
const RoundKeys* data_or_null(const std::vector<RoundKeys>& rounding) {
  return rounding.empty() ? nullptr : rounding.data();
}

std::vector<RoundKeys> expand(const std::optional<Tensor>& rounding) {
  return rounding ? expand(*rounding) : std::vector<RoundKeys>();
}

// work(i, span, start) for the chunks of all tensors; `start` is the index in tensor i of the
// span's first element.
template <class Work>
void for_spans(const Tensors& tensors, const Tensor& ids, const Tensor& offsets, const Work& work) {
  const int64_t* const id = read<int64_t>(ids);
  const int64_t* const offset = read<int64_t>(offsets);
  std::vector<int64_t> numels, counts;
  int64_t elements = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    numels.push_back(numel);
    elements += numel;
    counts.push_back(ceil_div(offset[i] % chunk_elements + numel, chunk_elements));
    if (numel == 0) counts.back() = 0;
  }
  for_chunks(counts, elements, [&](size_t i, int64_t chunk) {
    const int64_t aligned = offset[i] / chunk_elements * chunk_elements + chunk * chunk_elements;
    const int64_t first = std::max(aligned, offset[i]);
    const int64_t last = std::min(aligned + chunk_elements, offset[i] + numels[i]);
    const Span span = {first, last - first, static_cast<uint64_t>(id[i])};
    work(i, span, first - offset[i]);
  });
}

void bits_(Tensors outs, const Tensor& ids, const Tensor& offsets, const Tensor& keys) {
  const Sweeps& sweeps = *chosen().sweeps;
  const auto out = outputs<int64_t>(outs, ScalarType::Long);
  const std::vector<RoundKeys> key = expand(keys);
  for_spans(outs, ids, offsets, [&](size_t i, const Span& span, int64_t start) {
    sweeps.bits(out[i] + start, span, key[i]);
  });
}

void normal_(Tensors outs, const Tensor& ids, const Tensor& offsets, const Tensor& keys) {
  const Sweeps& sweeps = *chosen().sweeps;
  const auto out = outputs<float>(outs, ScalarType::Float);
  const std::vector<RoundKeys> key = expand(keys);
  for_spans(outs, ids, offsets, [&](size_t i, const Span& span, int64_t start) {
    sweeps.normal(out[i] + start, span, key[i]);
  });
}

// The rows of the arguments that say what becomes of each parameter's weights.
class Updates {
 public:
  Updates(const Tensor& keys, const Tensor& coeffs, const Tensor& decay,
          const std::optional<Tensor>& rounding)
      : keys_(expand(keys)),
        rounding_(expand(rounding)),
        coeffs_(read<float>(coeffs)),
        decay_(read<float>(decay)) {}

  Update operator[](size_t i) const {
    return {static_cast<int64_t>(keys_.size()), keys_.data(), coeffs_ + i * keys_.size(), decay_[i],
            data_or_null(rounding_)};
  }

 private:
  std::vector<RoundKeys> keys_, rounding_;
  const float* coeffs_;
  const float* decay_;
};

void dense_(Tensors params, const Tensor& ids, const Tensor& offsets, const Tensor& keys,
            const Tensor& coeffs, const Tensor& decay, std::optional<Tensor> rounding) {
  const Sweeps& sweeps = *chosen().sweeps;
  const Written w = weights(params);
  const Updates updates(keys, coeffs, decay, rounding);
  for_spans(params, ids, offsets, [&](size_t i, const Span& span, int64_t start) {
    sweeps.dense[w.dtype[i]](w.at(i, start), span, updates[i]);
  });
}

void moments_(Tensors params, Tensors firsts, Tensors seconds, const Tensor& ids,
              const Tensor& offsets, const Tensor& keys, const Tensor& grads,
              const Tensor& restores, const Tensor& coeffs, const Tensor& decay, int64_t rule,
              std::optional<Tensor> rounding) {
  const Sweeps& sweeps = *chosen().sweeps;
  const Written w = weights(params);
  const Written m = weights(firsts);
  const auto v = outputs<float>(seconds, ScalarType::Float);
  const Updates updates(keys, restores, decay, rounding);
  const float* const grad = read<float>(grads);
  const auto* const c = read<MomentCoeffs>(coeffs);
  for_spans(params, ids, offsets, [&](size_t i, const Span& span, int64_t start) {
    const Update update = updates[i];
    const Moments moments = {static_cast<Rule>(rule), grad + i * update.directions, c[i]};
    const bool wide = !m.data.empty() && m.dtype[i] == float32;
    float* const second = v.empty() ? nullptr : v[i] + start;
    sweeps.moments[w.dtype[i]][wide](w.at(i, start), m.at(i, start), second, span, update, moments);
  });
}

// ---- low-rank sweeps ---------------------------------------------------------------------------

constexpr int64_t padding = 16;            // vt is read in whole vectors of up to 16 floats
constexpr int64_t panel_floats = 1 << 16;  // of vt, which the rows of a chunk read again and again

// One parameter as a matrix, with the factor along its columns transposed.
struct Matrix {
  int64_t rows, columns, rank, stride;  // stride: of vt
  const float* u;
  const float* v;
  float* vt;
  int64_t chunk_rows, chunk_columns;

  int64_t chunks_across() const { return ceil_div(columns, chunk_columns); }
  int64_t chunks() const { return ceil_div(rows, chunk_rows) * chunks_across(); }
};

Matrix matrix(const Tensor& param, const float* u, const Tensor& v) {
  Matrix m{};
  if (param.numel() == 0) return m;
  m.rows = param.dim() ? param.size(0) : 1;
  m.columns = param.numel() / m.rows;
  m.rank = v.size(1);
  m.u = u;
  m.v = read<float>(v);
  if (m.columns == 1) {  // a column is a row with the factors exchanged: products commute
    std::swap(m.rows, m.columns);
    std::swap(m.u, m.v);
  }
  m.stride = ceil_div(m.columns, padding) * padding;
  m.chunk_columns =
      std::min(m.columns, std::max(panel_floats / m.rank / padding, int64_t{4}) * padding);
  m.chunk_rows = std::clamp(chunk_elements / m.chunk_columns, int64_t{1}, m.rows);
  return m;
}

void transpose(const Matrix& m) {
  constexpr int64_t block = 64;  // rows of v that stay in the first-level cache
  for (int64_t first = 0; first < m.columns; first += block) {
    const int64_t last = std::min(first + block, m.columns);
    for (int64_t q = 0; q < m.rank; ++q) {
      for (int64_t j = first; j < last; ++j) m.vt[q * m.stride + j] = m.v[j * m.rank + q];
    }
  }
  for (int64_t q = 0; q < m.rank; ++q) {
    std::fill(m.vt + q * m.stride + m.columns, m.vt + (q + 1) * m.stride, 0.0f);
  }
}

// What only stochastic rounding needs.
struct RoundingArguments {
  std::optional<Tensor> ids, offsets, rounding;
};

void lowrank(const Sweeps& sweeps, const Written& w, std::vector<Matrix>& matrices,
             const float* coeffs, const float* decay, const RoundingArguments& streams) {
  const std::vector<RoundKeys> rounding = expand(streams.rounding);
  STD_TORCH_CHECK(rounding.empty() || (streams.ids && streams.offsets),
                  "stochastic rounding needs ids and offsets");
  const int64_t* const id = rounding.empty() ? nullptr : read<int64_t>(*streams.ids);
  const int64_t* const offset = rounding.empty() ? nullptr : read<int64_t>(*streams.offsets);
  std::vector<int64_t> one_each, counts;
  int64_t floats = 0, elements = 0;
  for (const Matrix& m : matrices) {
    one_each.push_back(m.rows > 0);
    counts.push_back(m.rows > 0 ? m.chunks() : 0);
    floats += m.rank * m.stride;
    elements += m.rows * m.columns;
  }
  const std::unique_ptr<float[]> scratch(new float[floats]);
  float* next = scratch.get();
  for (Matrix& m : matrices) {
    m.vt = next;
    next += m.rank * m.stride;
  }
  for_chunks(one_each, floats, [&](size_t i, int64_t) { transpose(matrices[i]); });
  for_chunks(counts, elements, [&](size_t i, int64_t chunk) {
    const Matrix& m = matrices[i];
    const int64_t row = chunk / m.chunks_across() * m.chunk_rows;
    const int64_t column = chunk % m.chunks_across() * m.chunk_columns;
    const int64_t start = row * m.columns + column;
    const Tile tile = {std::min(m.chunk_rows, m.rows - row),
                       std::min(m.chunk_columns, m.columns - column),
                       m.columns,
                       m.u + row * m.rank,
                       m.vt + column,
                       m.stride,
                       m.rank,
                       coeffs ? coeffs[i] : 1.0f,
                       decay[i],
                       static_cast<uint64_t>(offset ? offset[i] + start : 0),
                       static_cast<uint64_t>(id ? id[i] : 0),
                       data_or_null(rounding)};
    sweeps.lowrank[w.dtype[i]](w.at(i, start), tile);
  });
}

void lowrank_(Tensors params, Tensors us, Tensors vs, const Tensor& coeffs, const Tensor& decay,
              std::optional<Tensor> ids, std::optional<Tensor> offsets,
              std::optional<Tensor> rounding) {
  const Sweeps& sweeps = *chosen().sweeps;
  const Written w = weights(params);
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < params.size(); ++i) {
    matrices.push_back(matrix(params[i], read<float>(us[i]), vs[i]));
  }
  lowrank(sweeps, w, matrices, read<float>(coeffs), read<float>(decay), {ids, offsets, rounding});
}

void lowrank_momentum_(Tensors params, Tensors moments, Tensors us, Tensors vs,
                       const Tensor& coeffs, const Tensor& decay, std::optional<Tensor> ids,
                       std::optional<Tensor> offsets, std::optional<Tensor> rounding) {
  const Sweeps& sweeps = *chosen().sweeps;
  const Written w = weights(params);
  const auto moment = outputs<float>(moments, ScalarType::Float);
  std::vector<const float*> u;
  std::vector<int64_t> starts, sizes, counts;
  int64_t floats = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    // An empty parameter's moment stays as it is.
    sizes.push_back(params[i].numel() ? us[i].numel() : 0);
    counts.push_back(ceil_div(sizes[i], chunk_elements));
    starts.push_back(floats);
    floats += sizes[i];
    u.push_back(read<float>(us[i]));
  }
  // The factor that multiplies v: a = restore * u + step * moment. The sweep itself is then
  // low-rank with coefficient 1, as fma(1, dot, acc) rounds like acc + dot.
  const std::unique_ptr<float[]> a(new float[floats]);
  const float* const c = read<float>(coeffs);
  for_chunks(counts, floats, [&](size_t i, int64_t chunk) {
    const int64_t start = chunk * chunk_elements;
    sweeps.momentum(moment[i] + start, u[i] + start, a.get() + starts[i] + start,
                    std::min(chunk_elements, sizes[i] - start), c + 4 * i);
  });
  std::vector<Matrix> matrices;
  for (size_t i = 0; i < params.size(); ++i) {
    matrices.push_back(matrix(params[i], a.get() + starts[i], vs[i]));
  }
  lowrank(sweeps, w, matrices, nullptr, read<float>(decay), {ids, offsets, rounding});
}

}  // namespace
}  // namespace zo_fused

STABLE_TORCH_LIBRARY(zo_fused_C, m) {
  m.def("isa() -> int");
  m.def("bits_(Tensor(a!)[] outs, Tensor ids, Tensor offsets, Tensor keys) -> ()");
  m.def("normal_(Tensor(a!)[] outs, Tensor ids, Tensor offsets, Tensor keys) -> ()");
  m.def(
      "dense_(Tensor(a!)[] params, Tensor ids, Tensor offsets, Tensor keys, Tensor coeffs, "
      "Tensor decay, Tensor? rounding=None) -> ()");
  m.def(
      "moments_(Tensor(a!)[] params, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor ids, "
      "Tensor offsets, Tensor keys, Tensor grads, Tensor restores, Tensor coeffs, Tensor decay, "
      "int rule, Tensor? rounding=None) -> ()");
  m.def(
      "lowrank_(Tensor(a!)[] params, Tensor[] us, Tensor[] vs, Tensor coeffs, Tensor decay, "
      "Tensor? ids=None, Tensor? offsets=None, Tensor? rounding=None) -> ()");
  m.def(
      "lowrank_momentum_(Tensor(a!)[] params, Tensor(b!)[] moments, Tensor[] us, Tensor[] vs, "
      "Tensor coeffs, Tensor decay, Tensor? ids=None, Tensor? offsets=None, "
      "Tensor? rounding=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zo_fused_C, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&zo_fused::isa));
}

STABLE_TORCH_LIBRARY_IMPL(zo_fused_C, CPU, m) {
  m.impl("bits_", TORCH_BOX(&zo_fused::bits_));
  m.impl("normal_", TORCH_BOX(&zo_fused::normal_));
  m.impl("dense_", TORCH_BOX(&zo_fused::dense_));
  m.impl("moments_", TORCH_BOX(&zo_fused::moments_));
  m.impl("lowrank_", TORCH_BOX(&zo_fused::lowrank_));
  m.impl("lowrank_momentum_", TORCH_BOX(&zo_fused::lowrank_momentum_));
}

// `import zo_fused._C` loads the library, which runs the registrations above. The module is empty.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
