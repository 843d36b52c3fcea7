// The CUDA kernels and their launchers, compiled for the CPU.

#include "emulation.h"

#include <algorithm>

#include "../../csrc/cuda/kernels.h"

static int64_t emulated_launches = 0;

namespace zo_fused {

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Table, Parameters...), void*, const Table& table,
             Arguments... arguments) {
  ++emulated_launches;
  gridDim = {static_cast<unsigned>(std::min<int64_t>(table.programs, most_blocks)), 1, 1};
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(table, arguments...);
  }
  return nullptr;
}

}  // namespace zo_fused

#include "../../csrc/cuda/launch.cu"

extern "C" int64_t zo_fused_emulated_launches() { return emulated_launches; }
