"""Dense sweeps: decay a parameter and add K directions, regenerated in registers.

A thread makes the noise of two neighbouring counters and so owns eight neighbouring elements,
which for 16-bit weights is one 128-bit load and store; noise never leaves its thread. For 32-bit
weights one counter, four elements, is 128 bits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_elements, chunk_elements, index, is_whole, load_run, pointers, store_run
from .fma import fma
from .launch import (
    DTYPES,
    NOISE_WARPS,
    OPTIONS,
    STRAY,
    UNROLLED_DIRECTIONS,
    noise_block,
    width,
)
from .normal import normals, transform_of
from .rounding import rounded, widen
from .table import ADDRESS, ID, INDEX, OFFSET, find, pointer


@triton.jit
def sweep_run(
    ptrs,  # `pointers` to neighbouring weights
    mask,  # [COUNT] or None
    first,  # index of the first in the full parameter
    id,
    keys_ptr,  # [K]
    coeffs_ptr,  # [K]
    directions,  # K
    held,  # if K is 1 or 2: a tuple of keys and coefficients in registers; else empty
    decay,
    rounding_ptr,  # [1] or None
    TRANSFORM: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """w = round(decay * w + sum_k coeffs[k] * z_k) of COUNT weights"""
    w = load_run(ptrs, mask, COUNT, WIDTH)
    acc = decay * widen(w)
    if len(held) > 0:
        for i in tl.static_range(0, len(held), 2):
            acc = fma(held[i + 1], normals(first, held[i], id, COUNT, WIDTH, TRANSFORM), acc)
    else:
        for k in range(directions):
            z = normals(first, tl.load(keys_ptr + k), id, COUNT, WIDTH, TRANSFORM)
            acc = fma(tl.load(coeffs_ptr + k), z, acc)
    w = rounded(acc, w.dtype, rounding_ptr, first, id, COUNT, WIDTH)
    store_run(ptrs, w, mask, COUNT, WIDTH)


POINTERS = ["table_ptr", "keys_ptr", "coeffs_ptr", "decay_ptr", "rounding_ptr"]


@triton.jit(do_not_specialize=["rows", "directions", *POINTERS])
def _dense_kernel(
    table_ptr,  # [rows, WIDTH]
    rows,
    keys_ptr,  # [K] stream keys
    coeffs_ptr,  # [P, K]
    decay_ptr,  # [P]
    rounding_ptr,  # [1] key of a rounding stream, or None
    directions,  # K
    DTYPE: tl.constexpr,
    UNROLL: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRAY: tl.constexpr,
):
    """p = round(decay * p + sum_k coeffs[k] * z_k) for all parameters p of the table"""
    row_ptr, program = find(table_ptr, rows)
    p_ptr = pointer(tl.load(row_ptr + ADDRESS), DTYPE)
    id = tl.load(row_ptr + ID)
    row = tl.load(row_ptr + INDEX)
    decay = tl.load(decay_ptr + row)
    coeffs_ptr += row * directions
    # Loaded here, they stay in registers from block to block, and the key schedule with them.
    held = ()
    if UNROLL == 1:
        held = (tl.load(keys_ptr), tl.load(coeffs_ptr))
    elif UNROLL == 2:
        held = (
            tl.load(keys_ptr),
            tl.load(coeffs_ptr),
            tl.load(keys_ptr + 1),
            tl.load(coeffs_ptr + 1),
        )
    offset = tl.load(row_ptr + OFFSET)
    begin, end = chunk_elements(row_ptr, program, CHUNK)
    for block in range(begin // BLOCK, tl.cdiv(end, BLOCK)):
        low, high = block_elements(block, begin, end, BLOCK)
        if is_whole(row_ptr, low, high, BLOCK):
            ptrs = pointers(tl.multiple_of(p_ptr + (low - offset), 16), BLOCK, WIDTH)
            sweep_run(
                ptrs, None, block * BLOCK, id, keys_ptr,
                coeffs_ptr, directions, held, decay, rounding_ptr, TRANSFORM, BLOCK, WIDTH,
            )  # fmt: skip
        else:
            for i in range(low, high, STRAY):
                first = index(i)
                run = first + tl.arange(0, STRAY)
                sweep_run(
                    p_ptr + (run - offset), run < high, first, id,
                    keys_ptr, coeffs_ptr, directions, (), decay, rounding_ptr, TRANSFORM, STRAY, 1,
                )  # fmt: skip


def dense(
    launch: Any,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rounding: Tensor | None,
    transform: str,
) -> None:
    """p = round(decay * p + sum_k coeffs[k] * z_k), in place; see
    `zo_fused.sweeps.backends.multi_tensor`."""
    directions = keys.numel()
    block = noise_block(directions, launch.dtype.itemsize, transform)
    _dense_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        keys,
        coeffs,
        decay,
        rounding,
        directions,
        DTYPE=DTYPES[launch.dtype],
        UNROLL=directions if directions <= UNROLLED_DIRECTIONS else 0,
        TRANSFORM=transform_of(transform),
        CHUNK=launch.chunk,
        BLOCK=block,
        WIDTH=width(transform, launch.dtype.itemsize, block),
        STRAY=STRAY,
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )
