// Just enough of CUDA to run kernels whose threads never meet: block after block, thread after
// thread, on the CPU.
#pragma once

#define __global__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x, y, z;
};

inline Dim3 threadIdx, blockIdx, gridDim;
