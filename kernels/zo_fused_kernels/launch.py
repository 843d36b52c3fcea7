"""How kernels are launched: block sizes, warps, grids, options. The only tuning table. Floor 0."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Decided when the kernels are, by the switch that ``triton.jit`` itself reads.
INTERPRETING = tl.constexpr(bool(knobs.runtime.interpret))

# Noise belongs to elements, not to blocks: no number here changes a bit of any result.

# Elements of a block of noise. A block is an aligned run of the *full* parameter, so that all its
# counters share their high word. 4096 over 128 threads is 32 a thread: four 128-bit loads of
# 16-bit weights in flight; key schedule and addresses, about 100 instructions, spread over enough
# elements (half as many cost 2.7 instructions more each); 80 registers, six blocks on an SM.
NOISE_BLOCK = 4096
NOISE_WARPS = 4

# Rows and columns of a tile of a low-rank sweep. A thread of the 128 gets eight columns (one
# 128-bit access of 16-bit weights) of four rows. Fewer rows and columns than threads: only then
# does Triton let every thread load its own entries of the factors, instead of passing them round
# through shared memory, with barriers.
TILE_ROWS = 64
TILE_COLUMNS = 64
TILE_WARPS = 4

# Ranks up to here are straight-line code, larger ones end in a loop.
UNROLL = 32

# Elements of a factor that a momentum update takes at once.
FACTOR_BLOCK = 1024
FACTOR_WARPS = 4

# Without contraction ``a * b + c`` stays two roundings, as the specification has it.
OPTIONS = {"enable_fp_fusion": False}


def noise_grid(numel: int, offset: int) -> tuple[int]:
    """Blocks that hold elements ``offset .. offset + numel``."""
    return (triton.cdiv(offset % NOISE_BLOCK + numel, NOISE_BLOCK),)


def vectorizes(address: int, offset: int, itemsize: int) -> bool:
    """Whether eight-element groups of the full parameter lie on 16-byte boundaries in memory."""
    return (address - offset % 8 * itemsize) % 16 == 0


def tile_grid(m: int, n: int) -> tuple[int]:
    """Tiles that cover an m x n matrix, row by row."""
    return (triton.cdiv(m, TILE_ROWS) * triton.cdiv(n, TILE_COLUMNS),)
