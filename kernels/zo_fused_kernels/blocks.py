"""The walk of a program over its chunk of a parameter.

A chunk lies between two multiples of CHUNK in the *full* parameter, of which a tensor (it may be a
shard) has any part. Sweeps over noise take it block by block: aligned blocks that the tensor fills
by wide accesses, what is left at the ends, and misaligned tensors, STRAY elements at a time.
"""

import triton
import triton.language as tl

from .launch import TILED
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
def pointers(ptr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """to COUNT neighbouring elements, of which a thread gets runs of WIDTH: [COUNT] to each, or to
    runs of eight, [COUNT / 8, 1]; from TILED on to the first of WIDTH / 8 runs that are 64 apart,
    [COUNT / WIDTH, 1]"""
    if WIDTH >= TILED:
        row = tl.arange(0, COUNT // WIDTH)[:, None]
        return ptr + (row // 8 * (8 * WIDTH) + row % 8 * 8)
    elif WIDTH == 8 and ptr.dtype.element_ty.primitive_bitwidth == 32:
        return ptr + tl.arange(0, COUNT // 8)[:, None] * 8
    else:
        return ptr + tl.arange(0, COUNT)


@triton.jit
def load_run(ptrs, mask, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[COUNT] elements at `pointers`; from TILED on [COUNT / WIDTH, 8, 2, ..], the run's number in
    the last axes, its highest bit in the last"""
    if WIDTH == 4 * TILED:
        return tl.join(load_four(ptrs), load_four(ptrs + 256))
    elif WIDTH == 2 * TILED:
        return load_four(ptrs)
    elif WIDTH == TILED:
        return load_two(ptrs)
    elif WIDTH == 8 and ptrs.dtype.element_ty.primitive_bitwidth == 32:
        return tl.reshape(load_eights(ptrs), (COUNT,))
    else:
        return tl.load(ptrs, mask=mask)


@triton.jit
def store_run(ptrs, x, mask, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """the way back"""
    if WIDTH == 4 * TILED:
        low, high = tl.split(x)
        store_four(ptrs, low)
        store_four(ptrs + 256, high)
    elif WIDTH == 2 * TILED:
        store_four(ptrs, x)
    elif WIDTH == TILED:
        store_two(ptrs, x)
    elif WIDTH == 8 and ptrs.dtype.element_ty.primitive_bitwidth == 32:
        store_eights(ptrs, tl.reshape(x, (COUNT // 8, 8)))
    else:
        tl.store(ptrs, x, mask=mask)


@triton.jit
def load_four(ptrs):
    """[N, 8, 2, 2] four runs from each of the pointers [N, 1]"""
    return tl.join(load_two(ptrs), load_two(ptrs + 128))


@triton.jit
def store_four(ptrs, x):
    """the way back"""
    low, high = tl.split(x)
    store_two(ptrs, low)
    store_two(ptrs + 128, high)


@triton.jit
def load_two(ptrs):
    """[N, 8, 2] two runs from each of the pointers [N, 1]"""
    return tl.join(load_eights(ptrs), load_eights(ptrs + 64))


@triton.jit
def store_two(ptrs, x):
    """the way back"""
    low, high = tl.split(x)
    store_eights(ptrs, low)
    store_eights(ptrs + 64, high)


@triton.jit
def load_eights(ptrs):
    """[N, 8] eight elements from each of the pointers [N, 1]"""
    if ptrs.dtype.element_ty.primitive_bitwidth == 32:
        # Eight in 32 bits are two accesses, which Triton must see as two, or it would load fours
        # and pass them round through shared memory.
        four = ptrs + tl.arange(0, 4)[None, :]
        x = tl.join(tl.load(four), tl.load(four + 4))
        return tl.reshape(tl.permute(x, (0, 2, 1)), (ptrs.shape[0], 8))
    else:
        return tl.load(ptrs + tl.arange(0, 8)[None, :])


@triton.jit
def store_eights(ptrs, x):
    """the way back"""
    if ptrs.dtype.element_ty.primitive_bitwidth == 32:
        four = ptrs + tl.arange(0, 4)[None, :]
        low, high = tl.split(tl.permute(tl.reshape(x, (ptrs.shape[0], 2, 4)), (0, 2, 1)))
        tl.store(four, low)
        tl.store(four + 4, high)
    else:
        tl.store(ptrs + tl.arange(0, 8)[None, :], x)
