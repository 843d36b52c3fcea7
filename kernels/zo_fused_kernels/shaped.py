"""Dense sweeps with a shape beside each weight: a bit that says whether it moves at all, or a
float32 by whose root its noise is divided. Layout as in `dense`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_elements, chunk_elements, index, is_whole, load_run, pointers, store_run
from .dense import POINTERS, dense
from .fma import fma
from .launch import DTYPES, NOISE_WARPS, OPTIONS, STRAY, TILED, moments_block, width
from .normal import normals, transform_of
from .rounding import rounded, widen
from .table import ADDRESS, ID, INDEX, OFFSET, STATES, find, pointer


@triton.jit
def bits_of_eights(ptrs):
    """[N, 8] the bits, where they are in their bytes, of the bytes at the pointers [N, 1]"""
    return tl.load(ptrs).to(tl.int32) & (1 << tl.arange(0, 8)[None, :])


@triton.jit
def bits_of_two(ptrs):
    """[N, 8, 2] those of two runs of a tile, 64 elements apart"""
    return tl.join(bits_of_eights(ptrs), bits_of_eights(ptrs + 8))


@triton.jit
def bits_of_four(ptrs):
    """[N, 8, 2, 2] of four runs"""
    return tl.join(bits_of_two(ptrs), bits_of_two(ptrs + 16))


@triton.jit
def bits_of_run(bytes_ptr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """the bits of COUNT elements from a byte on, or zeros, laid out as `blocks.load_run` has the
    elements"""
    if WIDTH >= TILED:
        row = tl.arange(0, COUNT // WIDTH)[:, None]
        ptrs = bytes_ptr + (row // 8 * WIDTH + row % 8)
        if WIDTH == 4 * TILED:
            return tl.join(bits_of_four(ptrs), bits_of_four(ptrs + 32))
        elif WIDTH == 2 * TILED:
            return bits_of_four(ptrs)
        else:
            return bits_of_two(ptrs)
    elif WIDTH == 8:
        row = tl.arange(0, COUNT // 8)[:, None]
        return tl.reshape(bits_of_eights(bytes_ptr + row), (COUNT,))
    else:  # a byte for two threads
        row = tl.arange(0, COUNT // 4)[:, None]
        byte = tl.load(bytes_ptr + row // 2).to(tl.int32)
        return tl.reshape(byte & (1 << (row % 2 * 4 + tl.arange(0, 4)[None, :])), (COUNT,))


@triton.jit
def root_of(scale, mask):
    """the roots of scales, and 1 where there is none: noise is divided by them"""
    root = tl.sqrt_rn(scale)
    if mask is not None:
        root = tl.where(mask, root, 1.0)
    return root


@triton.jit
def over(z, root):
    """z / root, or z where there is none"""
    if root is None:
        return z
    else:
        return tl.div_rn(z, root)


@triton.jit
def shaped_run(
    p_ptr,  # to the first of some neighbouring weights
    shape_ptr,  # to the scale of the first; or to the byte that has the bit of element 0
    mask,  # [COUNT] or None
    first,  # index of the first in the full parameter
    id,
    keys_ptr,  # [K]
    coeffs_ptr,  # [K]
    directions,  # K
    decay,
    rounding_ptr,  # [1] or None
    MASKED: tl.constexpr,
    SINGLE: tl.constexpr,  # K is 1
    TRANSFORM: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`zo_fused.sweeps.reference.shaped_` of COUNT neighbouring elements"""
    ptrs = pointers(p_ptr, COUNT, WIDTH)
    w = load_run(ptrs, mask, COUNT, WIDTH)
    before = widen(w)
    acc = decay * before
    if not MASKED:
        root = root_of(load_run(pointers(shape_ptr, COUNT, WIDTH), mask, COUNT, WIDTH), mask)
    else:
        root = None
    if SINGLE:
        z = normals(first, tl.load(keys_ptr), id, COUNT, WIDTH, TRANSFORM)
        acc = fma(tl.load(coeffs_ptr), over(z, root), acc)
    else:
        for k in range(directions):
            z = normals(first, tl.load(keys_ptr + k), id, COUNT, WIDTH, TRANSFORM)
            acc = fma(tl.load(coeffs_ptr + k), over(z, root), acc)
    if MASKED:
        if mask is None:
            bits = bits_of_run(shape_ptr + first // 8, COUNT, WIDTH)
        else:
            element = first + tl.arange(0, COUNT)
            byte = tl.load(shape_ptr + element // 8, mask=mask, other=0).to(tl.int32)
            bits = byte & (1 << (element % 8).to(tl.int32))
        acc = tl.where(bits != 0, acc, before)
    acc = rounded(acc, w.dtype, rounding_ptr, first, id, COUNT, WIDTH)
    store_run(ptrs, acc, mask, COUNT, WIDTH)


@triton.jit(do_not_specialize=["rows", "directions", *POINTERS])
def _shaped_kernel(
    table_ptr,  # [rows, WIDTH]
    rows,
    keys_ptr,  # [K] stream keys
    coeffs_ptr,  # [P, K]
    decay_ptr,  # [P]
    rounding_ptr,  # [1] key of a rounding stream, or None
    directions,  # K
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    SINGLE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRAY: tl.constexpr,
):
    """`zo_fused.sweeps.reference.shaped_` of all parameters of the table, none without a shape"""
    row_ptr, program = find(table_ptr, rows)
    p_ptr = pointer(tl.load(row_ptr + ADDRESS), DTYPE)
    id = tl.load(row_ptr + ID)
    row = tl.load(row_ptr + INDEX)
    decay = tl.load(decay_ptr + row)
    coeffs_ptr += row * directions
    offset = tl.load(row_ptr + OFFSET)
    if MASKED:
        shape_ptr = pointer(tl.load(row_ptr + STATES), tl.uint8) - offset // 8
    else:
        shape_ptr = pointer(tl.load(row_ptr + STATES), tl.float32)
    begin, end = chunk_elements(row_ptr, program, CHUNK)
    for block in range(begin // BLOCK, tl.cdiv(end, BLOCK)):
        low, high = block_elements(block, begin, end, BLOCK)
        if is_whole(row_ptr, low, high, BLOCK):
            shaped_run(
                tl.multiple_of(p_ptr + (low - offset), 16),
                shape_ptr if MASKED else tl.multiple_of(shape_ptr + (low - offset), 16),
                None, block * BLOCK, id, keys_ptr, coeffs_ptr, directions, decay, rounding_ptr,
                MASKED, SINGLE, TRANSFORM, BLOCK, WIDTH,
            )  # fmt: skip
        else:
            for i in range(low, high, STRAY):
                first = index(i)
                shaped_run(
                    p_ptr + (first - offset),
                    shape_ptr if MASKED else shape_ptr + (first - offset),
                    first + tl.arange(0, STRAY) < high, first, id, keys_ptr, coeffs_ptr,
                    directions, decay, rounding_ptr, MASKED, False, TRANSFORM, STRAY, 1,
                )  # fmt: skip


def shaped(
    launch: Any,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rounding: Tensor | None,
    transform: str,
) -> None:
    """As `zo_fused.sweeps.reference.shaped_`; see `zo_fused.sweeps.backends.multi_tensor`."""
    if not launch.state_dtypes:
        dense(launch, keys, coeffs, decay, rounding, transform)
        return
    block = moments_block(transform)
    _shaped_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        keys,
        coeffs,
        decay,
        rounding,
        keys.numel(),
        DTYPE=DTYPES[launch.dtype],
        MASKED=launch.state_dtypes[0] == torch.uint8,
        SINGLE=keys.numel() == 1,
        TRANSFORM=transform_of(transform),
        CHUNK=launch.chunk,
        BLOCK=block,
        WIDTH=width(transform, launch.dtype.itemsize, block),
        STRAY=STRAY,
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )
