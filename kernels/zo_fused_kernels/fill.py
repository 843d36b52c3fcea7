"""Fills: the random words, and the normals or signs themselves.

For factors, inspection and tests, so these kernels are as plain as they can be.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .blocks import chunk_elements, index
from .launch import NOISE_WARPS, OPTIONS, STRAY
from .normal import PORTABLE, normals, transform_of
from .philox import word_at
from .table import ADDRESS, ID, INDEX, OFFSET, find, pointer


@triton.jit(do_not_specialize=["table_ptr", "rows", "keys_ptr"])
def _fill_kernel(
    table_ptr,  # [rows, WIDTH]
    rows,
    keys_ptr,  # [P] stream keys
    NORMALS: tl.constexpr,  # else words
    TRANSFORM: tl.constexpr,
    CHUNK: tl.constexpr,
    STRAY: tl.constexpr,
):
    """out[i] = normal or word of element offset + i, for all tensors of the table"""
    row_ptr, program = find(table_ptr, rows)
    out_ptr = pointer(tl.load(row_ptr + ADDRESS), tl.float32 if NORMALS else tl.int64)
    id = tl.load(row_ptr + ID)
    key = tl.load(keys_ptr + tl.load(row_ptr + INDEX))
    offset = tl.load(row_ptr + OFFSET)
    begin, end = chunk_elements(row_ptr, program, CHUNK)
    for i in range(begin, end, STRAY):
        first = index(i)
        run = first + tl.arange(0, STRAY)
        if NORMALS:
            x = normals(first, key, id, STRAY, 1, TRANSFORM)
        else:
            x = word_at(run, key, id).to(tl.int64)
        tl.store(out_ptr + (run - offset), x, mask=run < end)


def _fill(launch: Any, keys: Tensor, wants_normals: bool, transform: str) -> None:
    _fill_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        keys,
        NORMALS=wants_normals,
        TRANSFORM=transform,
        CHUNK=launch.chunk,
        STRAY=STRAY,
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )


def bits(launch: Any, keys: Tensor) -> None:
    """Fill int64 tensors with words; see `zo_fused.sweeps.backends.multi_tensor`."""
    _fill(launch, keys, False, PORTABLE.value)


def normal(launch: Any, keys: Tensor, transform: str) -> None:
    """Fill float32 tensors with normals or signs; see `zo_fused.sweeps.backends.multi_tensor`."""
    _fill(launch, keys, True, transform_of(transform))
