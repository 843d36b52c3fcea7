// The sweeps in plain C++, for machines without a vector path of their own.
#include "../scalar.h"
#include "loops.h"

namespace zo_fused {

const Sweeps sweeps_portable = sweeps_of<Scalar>;

}  // namespace zo_fused
