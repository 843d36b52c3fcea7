"""The walk of a program over its chunk of a parameter.

A chunk lies between two multiples of CHUNK in the *full* parameter, of which a tensor (it may be a
shard) has any part. Sweeps over noise take it block by block: aligned blocks that the tensor fills
by wide accesses, what is left at the ends, and misaligned tensors, STRAY elements at a time.
"""

import triton
import triton.language as tl

from .table import ALIGNED, NUMEL, OFFSET


@triton.jit
def chunk_elements(row_ptr, program, CHUNK: tl.constexpr):
    """indices, in the full parameter, of a program's first element and past its last"""
    offset = tl.load(row_ptr + OFFSET)
    start = (offset // CHUNK + program) * CHUNK
    return tl.maximum(start, offset), tl.minimum(start + CHUNK, offset + tl.load(row_ptr + NUMEL))


@triton.jit
def block_elements(block, begin, end, BLOCK: tl.constexpr):
    """the same for a block of a chunk"""
    return tl.maximum(block * BLOCK, begin), tl.minimum((block + 1) * BLOCK, end)


@triton.jit
def index(i):
    """a loop's variable as an int64 scalar, which it is not where the interpreter counts"""
    return tl.cast(i, tl.int64)


@triton.jit
def is_whole(row_ptr, low, high, BLOCK: tl.constexpr):
    """whether elements low .. high fill a block, and 16-byte accesses are possible"""
    return (high - low == BLOCK) & (tl.load(row_ptr + ALIGNED) != 0)


@triton.jit
def load_run(ptr, mask, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[COUNT] neighbouring elements; a thread gets runs of WIDTH"""
    if WIDTH == 8 and ptr.dtype.element_ty.primitive_bitwidth == 32:
        # Eight in 32 bits are two accesses, which Triton must see as two, or it would load fours
        # and pass them round through shared memory.
        ptrs = ptr + tl.arange(0, COUNT // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
        x = tl.join(tl.load(ptrs), tl.load(ptrs + 4))
        return tl.reshape(tl.permute(x, (0, 2, 1)), (COUNT,))
    else:
        return tl.load(ptr + tl.arange(0, COUNT), mask=mask)


@triton.jit
def store_run(ptr, x, mask, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """the way back"""
    if WIDTH == 8 and ptr.dtype.element_ty.primitive_bitwidth == 32:
        ptrs = ptr + tl.arange(0, COUNT // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
        low, high = tl.split(tl.permute(tl.reshape(x, (COUNT // 8, 2, 4)), (0, 2, 1)))
        tl.store(ptrs, low)
        tl.store(ptrs + 4, high)
    else:
        tl.store(ptr + tl.arange(0, COUNT), x, mask=mask)
