// The CUDA kernels and their launchers, compiled for the CPU.

#include "emulation.h"

#include "../../csrc/cuda/kernels.h"

static int64_t emulated_launches = 0;
static constexpr int64_t places = 3 * 132;  // of an H100

namespace zo_fused {

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Table, Parameters...), void*, const Table& table,
             Arguments... arguments) {
  ++emulated_launches;
  gridDim = {static_cast<unsigned>(zo_fused::blocks_of(table.programs, places)), 1, 1};
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(table, arguments...);
  }
  return nullptr;
}

}  // namespace zo_fused

#include "../../csrc/cuda/launch.cu"

extern "C" int64_t zo_fused_emulated_launches() { return emulated_launches; }

extern "C" int64_t zo_fused_blocks_of(int64_t programs, int64_t places) {
  return zo_fused::blocks_of(programs, places);
}
