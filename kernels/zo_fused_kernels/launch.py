"""How kernels are launched: block sizes, warps, options. The only tuning table."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from triton import knobs, runtime

# Decided when the kernels are, by the switch that ``triton.jit`` itself reads.
INTERPRETING = tl.constexpr(bool(knobs.runtime.interpret))

# Noise belongs to elements, not to blocks: no number here changes a bit of any result.

# Elements of a block of noise. A block is an aligned run of the *full* parameter, so that all its
# counters share their high word. 4096 over 128 threads is 32 a thread: four 128-bit loads of
# 16-bit weights in flight; addresses spread over enough elements; 88 registers, five blocks on an
# SM.
NOISE_BLOCK = 4096
NOISE_WARPS = 4

# Elements that a thread owns from which on they are runs of eight, 64 apart: tiles, of which every
# eighth run has the same counter.
TILED = tl.constexpr(16)

IN_TILES = ("hadamard", "signs")  # transforms

# With moments there is more to hold, and memory moves five times as much.
MOMENTS_BLOCK = 2048

# Elements that a program takes, block after block. Finding the parameter in the table (ten steps
# of ten instructions for a thousand parameters) and the key schedule are paid once in 512 elements
# of a thread.
CHUNK = 16 * NOISE_BLOCK

# Where that makes few programs for the places that they run in, the last wave is a good part of
# all: 125 M elements are 2.4 waves of an H100. Smaller chunks then cost a percent, and make 9.6.
SMALL_CHUNK = 4 * NOISE_BLOCK
FEW_WAVES = 16
PLACES = 6  # programs on a multiprocessor


def chunk(elements: int, units: int) -> int:
    """Elements that a program takes in a sweep over so many, on a GPU of so many multiprocessors.
    There are two sizes, and so at most two kernels of a form."""
    return CHUNK if elements >= FEW_WAVES * PLACES * units * CHUNK else SMALL_CHUNK


# Elements that a program takes at once where wide accesses are impossible: four a thread.
STRAY = 4 * 32 * NOISE_WARPS

# Directions up to here are straight-line code, more are a loop.
UNROLLED_DIRECTIONS = 2


def threads() -> int:
    """Of a program of noise."""
    if INTERPRETING.value:
        return 32 * NOISE_WARPS
    return int(runtime.driver.active.get_current_target().warp_size) * NOISE_WARPS


def noise_block(directions: int, itemsize: int, transform: str) -> int:
    """Elements of a block of a dense sweep. More directions in blocks of the full size take more
    registers: 160 in a loop, and two in float32 spill on sm_80. Tiles take few, and what is paid
    once a block, half an instruction an element, then counts; all threads need a counter."""
    block = NOISE_BLOCK if directions * itemsize <= 4 else NOISE_BLOCK // 2
    if transform not in IN_TILES:
        return block
    return max(2 * block if directions * itemsize <= 2 else block, 16 * threads())


def moments_block(transform: str) -> int:
    """Elements of a block of a sweep over moments."""
    return max(MOMENTS_BLOCK, 16 * threads()) if transform in IN_TILES else MOMENTS_BLOCK


def width(transform: str, itemsize: int, block: int) -> int:
    """Elements that a thread owns in a row in blocks of noise: 128 bits of the weights; in tiles,
    those of a counter."""
    if transform == "signs":
        return min(max(block // threads(), TILED.value), 64)
    return TILED.value if transform == "hadamard" else 16 // itemsize


# Rows and columns of a matrix that a program of a low-rank sweep takes, GROUP rows at a time. With
# 128 bits a thread a warp takes all the columns in 16 bits, half of them in 32, so a program has
# four or eight warps and a thread 256 or 128 weights: enough to pay for finding the parameter, in
# tiles of which a matrix of 768 x 768 has 18. In 16 bits four loads of weights are in flight.
TILE = (128, 256)
GROUP = 16

# Up to this rank a thread holds its columns of v in registers: 64 of them at most.
HELD_RANK = 8

# Two weights a thread where wide accesses are impossible, lest that code take the most registers.
STRAY_TILE = (2, 64)

# Elements of factors that a program of a sweep over momentum takes at a time.
MOMENTUM_BLOCK = 1024

# Without contraction ``a * b + c`` stays two roundings, as the specification has it. One stage:
# there is no loop to pipeline through shared memory.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_stages": 1}

DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.int64: tl.int64,
}
