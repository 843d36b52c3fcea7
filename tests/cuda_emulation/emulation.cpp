// The CUDA kernels and their launchers, compiled for the CPU.

#include "emulation.h"

#include <dlfcn.h>

#include <tuple>

#include "../../csrc/cuda/kernels.h"

static int64_t emulated_launches = 0;
static constexpr int64_t places = 3 * 132;  // of an H100

// What runs a launch instead, given the kernel's name to a linker, blocks, threads of a block and
// `count` arguments: where each is, and its size.
using Launcher = void (*)(const char* kernel, uint32_t blocks, uint32_t threads, int32_t count,
                          const void* const* arguments, const size_t* sizes);
static Launcher launcher = nullptr;

namespace zo_fused {

template <class... Parameters, class... Arguments>
void hand_over(void (*kernel)(Table, Parameters...), unsigned blocks, const Table& table,
               Arguments... arguments) {
  Dl_info symbol{};
  dladdr(reinterpret_cast<void*>(kernel), &symbol);
  const std::tuple<Table, Parameters...> passed(table, arguments...);
  std::apply(
      [&](const auto&... each) {
        const void* const arguments_at[] = {&each...};
        const size_t sizes[] = {sizeof(each)...};
        launcher(symbol.dli_sname, blocks, threads, sizeof...(each), arguments_at, sizes);
      },
      passed);
}

template <class... Parameters, class... Arguments>
Error launch(void (*kernel)(Table, Parameters...), void*, const Table& table,
             Arguments... arguments) {
  ++emulated_launches;
  const auto blocks = static_cast<unsigned>(zo_fused::blocks_of(table.programs, places));
  if (launcher != nullptr) {
    hand_over(kernel, blocks, table, arguments...);
    return nullptr;
  }
  gridDim = {blocks, 1, 1};
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

extern "C" void zo_fused_emulate_with(Launcher chosen) { launcher = chosen; }
