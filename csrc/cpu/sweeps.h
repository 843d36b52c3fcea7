// What an instruction set must provide: one table of functions over plain memory.
#pragma once

#include "../element.h"

namespace zo_fused {

// A chunk of a parameter never crosses a multiple of this many elements, counted in the full
// parameter. So the high word of the Philox counter is constant in a chunk, the cut does not
// depend on the number of threads, and only a parameter's ends have partial blocks.
constexpr int64_t chunk_elements = int64_t{1} << 16;

enum Dtype { float16, bfloat16, float32 };

// Elements [first, first + count) of a parameter, within one chunk.
struct Span {
  int64_t first, count;
  uint64_t id;
};

// What becomes of the weights of one parameter: decay * weight + sum_k coeffs[k] * z_k, where z_k
// has keys[k]. `rounding` is the key of a rounding stream, or null for rounding to nearest.
struct Update {
  int64_t directions;
  const RoundKeys* keys;
  const float* coeffs;
  float decay;
  const RoundKeys* rounding;
};

// Sweeps over the weights of one parameter, to be made in one pass (zo_fused/sweeps/script.py). A row of
// `script` has the indices in `keys` of one or two directions and of the rounding stream; -1: none.
struct Script {
  int64_t sweeps;
  const int64_t* script;  // [sweeps][3]
  const RoundKeys* keys;
  const float* coeffs;  // [sweeps][2]
  const float* decay;  // [sweeps]
};

// What a sweep over moments does beside: the estimate is sum_k grads[k] * z_k. With `squares` Adam
// keeps nothing, and its second moment is sum_k squares[k] * z_k^2.
struct Moments {
  Rule rule;
  const float* grads;
  const float* squares;  // or null
  MomentCoeffs coeffs;
};

// rows x columns of a weight matrix whose rows are `stride` apart. u is (rows, rank); vt is
// (rank, columns), with rows `vt_stride` apart and padded to whole vectors. `first` is the index
// in the full parameter of the first weight. Without `rounding` it does not matter, nor does id.
struct Tile {
  int64_t rows, columns, stride;
  const float* u;
  const float* vt;
  int64_t vt_stride, rank;
  float coeff, decay;
  uint64_t first, id;
  const RoundKeys* rounding;
};

// Sweeps that make directions, by one transform. Indexed by the Dtype of the weights.
struct NoiseSweeps {
  void (*normal)(float* out, const Span& span, const RoundKeys& keys);
  void (*dense[3])(void* weights, const Span& span, const Update& update);
  // `dense` of the weights whose bits are set; the first byte has element span.first. And with z
  // divided by the roots of the scales.
  void (*masked[3])(void* weights, const uint8_t* mask, const Span& span, const Update& update);
  void (*scaled[3])(void* weights, const float* scales, const Span& span, const Update& update);
  void (*dense_steps[3])(void* weights, const Span& span, const Script& script);
  // The second index: whether `firsts` are float32, or of the weights' type. `firsts` may be null;
  // for all rules but Adam, `seconds` are.
  void (*moments[3][2])(void* weights, void* firsts, float* seconds, const Span& span,
                        const Update& update, const Moments& moments);
  void (*adam_of_squares[3])(void* weights, const Span& span, const Update& update,
                             const Moments& moments);
  void (*hizoo[3])(void* weights, float* hessian, const Span& span, const Update& update,
                   const Moments& moments);
};

struct Sweeps {
  void (*bits)(int64_t* out, const Span& span, const RoundKeys& keys);
  NoiseSweeps noise[3];  // indexed by the Transform
  void (*lowrank[3])(void* weights, const Tile& tile);
  // moment = decay * moment + coeff * u
  void (*factor_momentum)(float* moment, const float* u, int64_t count, float coeff, float decay);
};

extern const Sweeps sweeps_portable;
#if defined(__x86_64__)
extern const Sweeps sweeps_avx2;
extern const Sweeps sweeps_avx512;
#endif

}  // namespace zo_fused
