// The operators of zo_fused_C: argument unpacking, choice of instruction set, threads.
// What they compute is explained in zo_fused/sweeps/reference.py, whose router has checked every shape and
// device. Parameters come as a table of addresses, made by zo_fused/sweeps/backends/cpu.py, whose callers
// keep them alive. Only PyTorch's stable ABI is used, so one binary serves many versions.

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
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sweeps.h"

namespace zo_fused::operators {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// A parameter in the table of a sweep over noise. Column by column as in `noise_table` of cpu.py.
struct Noise {
  char* data;  // float16, bfloat16 or float32 weights; of bits, int64; of normal, float32;
               // of factor_momentum, float32 moments, and `first` is u
  int64_t dtype, numel;
  uint64_t id;
  int64_t offset;
  char* first;  // null if not kept; of shaped, the shape: float32, or the bits of a mask
  int64_t first_dtype;
  float* second;
};

// A parameter in the table of a low-rank sweep. Column by column as in `lowrank_table` of cpu.py.
struct Product {
  char* data;
  int64_t dtype;
  uint64_t id;
  int64_t offset, rows, columns, rank;
  const float* u;
  const float* v;
};

template <class Row>
std::vector<Row> rows_of(const Tensor& table) {
  static_assert(sizeof(void*) == sizeof(int64_t) && sizeof(Row) % sizeof(int64_t) == 0);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && table.is_contiguous() &&
                      table.dim() == 2 && table.size(1) * sizeof(int64_t) == sizeof(Row),
                  "not a table of this sweep");
  std::vector<Row> rows(table.size(0));
  if (!rows.empty()) std::memcpy(rows.data(), table.const_data_ptr(), rows.size() * sizeof(Row));
  return rows;
}

int64_t item_size(int64_t dtype) { return dtype == float32 ? 4 : 2; }

// ---- sweeps over noise -------------------------------------------------------------------------

// The sweeps that make directions by a transform.
const NoiseSweeps& by(int64_t transform) {
  const auto& sweeps = chosen().sweeps->noise;
  STD_TORCH_CHECK(0 <= transform && transform < std::ssize(sweeps),
                  "zo_fused: the CPU has no transform number ", transform);
  return sweeps[transform];
}

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

// work(i, span, start) for the chunks of all parameters; `start` is the index in parameter i of the
// span's first element.
template <class Work>
void for_spans(const std::vector<Noise>& rows, const Work& work) {
  std::vector<int64_t> counts;
  int64_t elements = 0;
  for (const Noise& row : rows) {
    elements += row.numel;
    counts.push_back(
        row.numel ? ceil_div(row.offset % chunk_elements + row.numel, chunk_elements) : 0);
  }
  for_chunks(counts, elements, [&](size_t i, int64_t chunk) {
    const Noise& row = rows[i];
    const int64_t aligned = (row.offset / chunk_elements + chunk) * chunk_elements;
    const int64_t first = std::max(aligned, row.offset);
    const int64_t last = std::min(aligned + chunk_elements, row.offset + row.numel);
    const Span span = {first, last - first, row.id};
    work(i, span, first - row.offset);
  });
}

void bits(const Tensor& table, const Tensor& keys) {
  const Sweeps& sweeps = *chosen().sweeps;
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const std::vector<RoundKeys> key = expand(keys);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    sweeps.bits(reinterpret_cast<int64_t*>(rows[i].data) + start, span, key[i]);
  });
}

void normal(const Tensor& table, const Tensor& keys, int64_t transform) {
  const NoiseSweeps& sweeps = by(transform);
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const std::vector<RoundKeys> key = expand(keys);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    sweeps.normal(reinterpret_cast<float*>(rows[i].data) + start, span, key[i]);
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

void dense(const Tensor& table, const Tensor& keys, const Tensor& coeffs, const Tensor& decay,
           std::optional<Tensor> rounding, int64_t transform) {
  const NoiseSweeps& sweeps = by(transform);
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const Updates updates(keys, coeffs, decay, rounding);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    const Noise& row = rows[i];
    sweeps.dense[row.dtype](row.data + start * item_size(row.dtype), span, updates[i]);
  });
}

void shaped(const Tensor& table, const Tensor& keys, const Tensor& coeffs, const Tensor& decay,
            std::optional<Tensor> rounding, int64_t transform) {
  const NoiseSweeps& sweeps = by(transform);
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const Updates updates(keys, coeffs, decay, rounding);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    const Noise& row = rows[i];
    char* const weights = row.data + start * item_size(row.dtype);
    if (!row.first) {
      sweeps.dense[row.dtype](weights, span, updates[i]);
    } else if (row.first_dtype == float32) {
      const auto* const scales = reinterpret_cast<const float*>(row.first) + start;
      sweeps.scaled[row.dtype](weights, scales, span, updates[i]);
    } else {
      const auto* const mask = reinterpret_cast<const uint8_t*>(row.first);
      sweeps.masked[row.dtype](weights, mask + span.first / 8 - row.offset / 8, span, updates[i]);
    }
  });
}

void dense_steps(const Tensor& table, const Tensor& keys, const Tensor& script,
                 const Tensor& coeffs, const Tensor& decay, int64_t transform) {
  const NoiseSweeps& sweeps = by(transform);
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const std::vector<RoundKeys> key = expand(keys);
  const int64_t count = script.size(0);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    const Noise& row = rows[i];
    const Script part = {count, read<int64_t>(script), key.data(),
                         read<float>(coeffs) + 2 * i * count, read<float>(decay) + i * count};
    sweeps.dense_steps[row.dtype](row.data + start * item_size(row.dtype), span, part);
  });
}

void moments(const Tensor& table, const Tensor& keys, const Tensor& grads, const Tensor& restores,
             const Tensor& coeffs, const Tensor& decay, int64_t rule,
             std::optional<Tensor> rounding, int64_t transform, std::optional<Tensor> squares) {
  const NoiseSweeps& sweeps = by(transform);
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const Updates updates(keys, restores, decay, rounding);
  const float* const grad = read<float>(grads);
  const float* const square = squares ? read<float>(*squares) : nullptr;
  const auto* const c = read<MomentCoeffs>(coeffs);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    const Noise& row = rows[i];
    const Update update = updates[i];
    const int64_t at = i * update.directions;
    const Moments moments = {static_cast<Rule>(rule), grad + at, square ? square + at : nullptr,
                             c[i]};
    char* const weights = row.data + start * item_size(row.dtype);
    if (moments.rule == Rule::hizoo) {
      sweeps.hizoo[row.dtype](weights, row.second + start, span, update, moments);
      return;
    }
    if (squares) {  // of no directions, they have no address
      sweeps.adam_of_squares[row.dtype](weights, span, update, moments);
      return;
    }
    const bool wide = row.first && row.first_dtype == float32;
    char* const first = row.first ? row.first + start * item_size(row.first_dtype) : nullptr;
    float* const second = row.second ? row.second + start : nullptr;
    sweeps.moments[row.dtype][wide](weights, first, second, span, update, moments);
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

Matrix matrix(const Product& row) {
  Matrix m{};
  if (row.rows * row.columns == 0) return m;
  m.rows = row.rows;
  m.columns = row.columns;
  m.rank = row.rank;
  m.u = row.u;
  m.v = row.v;
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

void lowrank(const Tensor& table, const Tensor& coeffs, const Tensor& decay,
             std::optional<Tensor> rounding) {
  const Sweeps& sweeps = *chosen().sweeps;
  const std::vector<Product> rows = rows_of<Product>(table);
  const std::vector<RoundKeys> key = expand(rounding);
  const float* const coeff = read<float>(coeffs);
  const float* const decays = read<float>(decay);
  std::vector<Matrix> matrices;
  std::vector<int64_t> transposes, counts;
  int64_t floats = 0, elements = 0;
  for (const Product& row : rows) {
    const Matrix m = matrix(row);
    matrices.push_back(m);
    transposes.push_back(m.rows > 0 ? 1 : 0);
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
  for_chunks(transposes, floats, [&](size_t i, int64_t) { transpose(matrices[i]); });
  for_chunks(counts, elements, [&](size_t i, int64_t chunk) {
    const Matrix& m = matrices[i];
    const Product& row = rows[i];
    const int64_t top = chunk / m.chunks_across() * m.chunk_rows;
    const int64_t column = chunk % m.chunks_across() * m.chunk_columns;
    const int64_t start = top * m.columns + column;
    const Tile tile = {std::min(m.chunk_rows, m.rows - top),
                       std::min(m.chunk_columns, m.columns - column),
                       m.columns,
                       m.u + top * m.rank,
                       m.vt + column,
                       m.stride,
                       m.rank,
                       coeff[i],
                       decays[i],
                       static_cast<uint64_t>(row.offset + start),
                       row.id,
                       data_or_null(key)};
    sweeps.lowrank[row.dtype](row.data + start * item_size(row.dtype), tile);
  });
}

void factor_momentum(const Tensor& table, const Tensor& coeffs, const Tensor& decay) {
  const Sweeps& sweeps = *chosen().sweeps;
  const std::vector<Noise> rows = rows_of<Noise>(table);
  const float* const coeff = read<float>(coeffs);
  const float* const decays = read<float>(decay);
  for_spans(rows, [&](size_t i, const Span& span, int64_t start) {
    float* const moment = reinterpret_cast<float*>(rows[i].data) + start;
    const float* const u = reinterpret_cast<const float*>(rows[i].first) + start;
    sweeps.factor_momentum(moment, u, span.count, coeff[i], decays[i]);
  });
}

}  // namespace
}  // namespace zo_fused::operators

// Addresses of what is written stand in the table, so the schemas can't name it.
STABLE_TORCH_LIBRARY(zo_fused_C, m) {
  m.def("isa() -> int");
  m.def("bits(Tensor table, Tensor keys) -> ()");
  m.def("normal(Tensor table, Tensor keys, int transform) -> ()");
  m.def(
      "dense(Tensor table, Tensor keys, Tensor coeffs, Tensor decay, Tensor? rounding, "
      "int transform) -> ()");
  m.def(
      "shaped(Tensor table, Tensor keys, Tensor coeffs, Tensor decay, Tensor? rounding, "
      "int transform) -> ()");
  m.def(
      "dense_steps(Tensor table, Tensor keys, Tensor script, Tensor coeffs, Tensor decay, "
      "int transform) -> ()");
  m.def(
      "moments(Tensor table, Tensor keys, Tensor grads, Tensor restores, Tensor coeffs, "
      "Tensor decay, int rule, Tensor? rounding, int transform, Tensor? squares) -> ()");
  m.def("lowrank(Tensor table, Tensor coeffs, Tensor decay, Tensor? rounding) -> ()");
  m.def("factor_momentum(Tensor table, Tensor coeffs, Tensor decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(zo_fused_C, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&zo_fused::operators::isa));
}

STABLE_TORCH_LIBRARY_IMPL(zo_fused_C, CPU, m) {
  m.impl("bits", TORCH_BOX(&zo_fused::operators::bits));
  m.impl("normal", TORCH_BOX(&zo_fused::operators::normal));
  m.impl("dense", TORCH_BOX(&zo_fused::operators::dense));
  m.impl("shaped", TORCH_BOX(&zo_fused::operators::shaped));
  m.impl("dense_steps", TORCH_BOX(&zo_fused::operators::dense_steps));
  m.impl("moments", TORCH_BOX(&zo_fused::operators::moments));
  m.impl("lowrank", TORCH_BOX(&zo_fused::operators::lowrank));
  m.impl("factor_momentum", TORCH_BOX(&zo_fused::operators::factor_momentum));
}

// `import zo_fused._C` loads the library, which runs the registrations above. The module is empty.
extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
