"""Low-rank sweeps: decay a matrix and add the outer product of two factors.

A program has a tile of a matrix and takes it GROUP rows at a time. A thread owns the columns of
128 bits of weights, eight in 16 bits, in several rows, and loads for itself what it needs of u and
v: nothing is shared. Up to rank HELD_RANK, v stays in registers from group to group; beyond, both
factors stream by, up to four ranks at a time. Whole groups have code without masks.

The sum over the rank is a chain of fma in the order of the specification: an instruction a rank and
element, so that above rank 16 or so arithmetic is the limit, not memory. Matrix units would lift
it, but they round otherwise.
"""

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .blocks import chunk_elements
from .fma import fma
from .launch import (
    DTYPES,
    GROUP,
    HELD_RANK,
    MOMENTUM_BLOCK,
    NOISE_WARPS,
    OPTIONS,
    STRAY_TILE,
    TILE,
)
from .philox import counters_at, half_at
from .rounding import narrow, narrow_randomly, widen
from .table import (
    ADDRESS,
    ALIGNED,
    COLUMNS,
    ID,
    INDEX,
    OFFSET,
    ROWS,
    STATES,
    U,
    V,
    find,
    pointer,
)
from .table import RANK as RANK_COLUMN

# ---- factors ------------------------------------------------------------------------------------


@triton.jit
def halves_of(pairs):
    """two float32 from the 64 bits where they lie side by side"""
    low = pairs.to(tl.int32).to(tl.float32, bitcast=True)
    high = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def neighbours(ptrs, mask, Q: tl.constexpr):
    """ptrs[0], .., ptrs[Q - 1] as a tuple, in one access; ptrs, mask: [N]; mask may be None"""
    if Q == 1:
        return (tl.load(ptrs, mask=mask),)
    elif Q == 2:
        return halves_of(tl.load(ptrs.to(tl.pointer_type(tl.int64)), mask=mask))
    else:
        both = ptrs.to(tl.pointer_type(tl.int64))[:, None] + tl.arange(0, 2)[None, :]
        early, late = tl.split(tl.load(both, mask=None if mask is None else mask[:, None]))
        return halves_of(early) + halves_of(late)


@triton.jit
def in_runs(x, COUNT: tl.constexpr):
    """[COUNT] elements of the blocks x, four or eight, in turn; none leaves its thread"""
    if len(x) == 4:
        joined = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        joined = tl.join(even, odd)
    return tl.reshape(joined, (COUNT,))


@triton.jit
def of_columns(
    v_ptr, q, columns, MASKED: tl.constexpr, RANK: tl.constexpr, Q: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """v_ptr[c * RANK + q] of all c < COUNT, as a tuple over Q ranks from q on"""
    c = tl.arange(0, COUNT // WIDTH) * WIDTH
    mask = c < columns if MASKED else None
    x = ()  # WIDTH times Q blocks
    for i in tl.static_range(WIDTH):
        x += neighbours(v_ptr + ((c + i) * RANK + q), mask, Q)
    vs = ()
    for i in tl.static_range(Q):
        vs += (in_runs(x[i::Q], COUNT),)
    return vs


@triton.jit
def of_rows(
    u_ptr, q, rows, MASKED: tl.constexpr, RANK: tl.constexpr, Q: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """u_ptr[r * RANK + q] of all r < COUNT, as a tuple over Q ranks from q on"""
    r = tl.arange(0, COUNT)
    return neighbours(u_ptr + (r * RANK + q), r < rows if MASKED else None, Q)


@triton.jit
def add_outer(dot, us, vs):
    """dot + sum_q us[q] vs[q], in the order of q; without dot, the first term is a plain product"""
    for q in tl.static_range(len(us)):
        u = us[q][:, None]
        v = vs[q][None, :]
        dot = u * v if dot is None else fma(u, v, dot)
    return dot


# ---- tiles --------------------------------------------------------------------------------------


@triton.jit
def finish(w, dot, coeff, decay):
    """decay * w + coeff * dot"""
    return fma(coeff, dot, decay * widen(w))


@triton.jit
def row_halves(first, starts, key, id, COUNT: tl.constexpr):
    """[N, COUNT] the 16-bit numbers of the COUNT elements from first + starts[i] on, for all i < N;
    first and starts are multiples of eight"""
    n = (first >> 3) + ((starts >> 3)[:, None] + tl.arange(0, COUNT // 8)[None, :])
    w0, w1, w2, w3 = counters_at(n, key, id)
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), (starts.shape[0], COUNT))


@triton.jit
def laid_out_like(x, w):
    """x, in the layout of w"""
    # Triton finds no layout for sums that a loop carries but one that takes shared memory, unless w
    # has a part in them. It can't see that this is zero; LLVM can, and no instruction is left.
    if w.dtype.primitive_bitwidth == 16:
        zero = ((w.to(tl.uint16, bitcast=True) & 1) >> 1).to(tl.uint32)
    else:
        zero = (w.to(tl.uint32, bitcast=True) & 1) >> 1
    return (x.to(tl.uint32, bitcast=True) | zero).to(tl.float32, bitcast=True)


@triton.jit
def wide_group(
    ptrs, n, u_ptr, v_ptr, vs, rows, columns, coeff, decay, rounding_ptr, first, id,
    MASKED: tl.constexpr, RANK: tl.constexpr, Q: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS weights, ptrs, by 128-bit accesses; MASKED: some are beyond the edges

    vs has v, unless it is empty. The first weight is element `first` of the parameter.
    """
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    mask = (r < rows)[:, None] & (c < columns)[None, :] if MASKED else None
    w = tl.load(ptrs, mask=mask)
    dot = None
    if len(vs) > 0:
        for q in tl.static_range(0, RANK, Q):
            us = of_rows(u_ptr, q, rows, MASKED, RANK, Q, ROWS)
            dot = add_outer(dot, us, vs[q : q + Q])
    else:
        us = of_rows(u_ptr, 0, rows, MASKED, RANK, Q, ROWS)
        dot = add_outer(dot, us, of_columns(v_ptr, 0, columns, MASKED, RANK, Q, COLUMNS, WIDTH))
        dot = laid_out_like(dot, w)
        for q in range(Q, RANK, Q):
            us = of_rows(u_ptr, q, rows, MASKED, RANK, Q, ROWS)
            more = of_columns(v_ptr, q, columns, MASKED, RANK, Q, COLUMNS, WIDTH)
            dot = add_outer(dot, us, more)
    acc = finish(w, dot, coeff, decay)
    if rounding_ptr is None or tl.float32 == w.dtype:
        acc = narrow(acc, w.dtype)
    else:
        random = row_halves(first, r * n, tl.load(rounding_ptr), id, COLUMNS)
        acc = narrow_randomly(acc, random, w.dtype)
    tl.store(ptrs, acc, mask=mask)


@triton.jit
def wide_tile(
    address, n, u, v, row, column, rows, columns, coeff, decay, rounding_ptr, offset, id,
    DTYPE: tl.constexpr, RANK: tl.constexpr, Q: tl.constexpr, HELD: tl.constexpr,
    GROUP: tl.constexpr, TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """rows x columns weights from row and column on, by 128-bit accesses"""
    # Known, but not to the compiler: n, columns and the offset are multiples of a thread's columns.
    n = n // WIDTH * WIDTH
    columns = columns // WIDTH * WIDTH
    u_ptr = tl.multiple_of(pointer(u, tl.float32) + row * RANK, 4 * Q)
    v_ptr = tl.multiple_of(pointer(v, tl.float32) + column * RANK, 4 * Q)
    vs = ()
    if HELD:
        for q in tl.static_range(0, RANK, Q):
            vs += of_columns(v_ptr, q, columns, True, RANK, Q, TILE_COLUMNS, WIDTH)
    # Carried from group to group, pointers aren't worked out anew in each.
    at = row * n + column
    ptrs = tl.multiple_of(pointer(address, DTYPE) + at, 16) + (
        tl.arange(0, GROUP)[:, None] * n + tl.arange(0, TILE_COLUMNS)[None, :]
    )
    first = offset + at
    for r in range(0, rows, GROUP):
        if (rows - r >= GROUP) & (columns == TILE_COLUMNS):
            wide_group(
                ptrs, n, u_ptr, v_ptr, vs, GROUP, TILE_COLUMNS,
                coeff, decay, rounding_ptr, first, id,
                False, RANK, Q, GROUP, TILE_COLUMNS, WIDTH,
            )  # fmt: skip
        else:
            wide_group(
                ptrs, n, u_ptr, v_ptr, vs, rows - r, columns,
                coeff, decay, rounding_ptr, first, id,
                True, RANK, Q, GROUP, TILE_COLUMNS, WIDTH,
            )  # fmt: skip
        ptrs += GROUP * n
        u_ptr += GROUP * RANK
        first += GROUP * n


@triton.jit
def stray_block(
    p_ptr, n, u_ptr, v_ptr, rank, rows, columns, coeff, decay, rounding_ptr, first, id,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS weights from p_ptr on, some of them beyond the edges"""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    offs = r[:, None] * n + c[None, :]
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    us = u_ptr + r * rank
    vs = v_ptr + c * rank
    dot = tl.load(us, mask=r < rows)[:, None] * tl.load(vs, mask=c < columns)[None, :]
    for q in range(1, rank):
        u = tl.load(us + q, mask=r < rows)
        v = tl.load(vs + q, mask=c < columns)
        dot = fma(u[:, None], v[None, :], dot)
    w = tl.load(p_ptr + offs, mask=mask)
    acc = finish(w, dot, coeff, decay)
    if rounding_ptr is None or tl.float32 == w.dtype:
        acc = narrow(acc, w.dtype)
    else:
        acc = narrow_randomly(acc, half_at(first + offs, tl.load(rounding_ptr), id), w.dtype)
    tl.store(p_ptr + offs, acc, mask=mask)


@triton.jit
def stray_tile(
    address, n, u, v, rank, row, column, rows, columns, coeff, decay, rounding_ptr, offset, id,
    DTYPE: tl.constexpr, STRAY_ROWS: tl.constexpr, STRAY_COLUMNS: tl.constexpr,
):  # fmt: skip
    """the same of any alignment and rank"""
    p_ptr = pointer(address, DTYPE) + (row * n + column)
    u_ptr = pointer(u, tl.float32) + row * rank
    v_ptr = pointer(v, tl.float32) + column * rank
    first = offset + row * n + column
    for r in range(0, rows, STRAY_ROWS):
        for c in range(0, columns, STRAY_COLUMNS):
            at = r * n + c
            stray_block(
                p_ptr + at, n, u_ptr + r * rank, v_ptr + c * rank, rank.to(tl.int32),
                rows - r, columns - c, coeff, decay, rounding_ptr, first + at, id,
                STRAY_ROWS, STRAY_COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["table_ptr", "rows", "coeffs_ptr", "decay_ptr", "rounding_ptr"])
def _lowrank_kernel(
    table_ptr,  # [rows, WIDTH]
    rows,
    coeffs_ptr,  # [P]
    decay_ptr,  # [P]
    rounding_ptr,  # [1] key of a rounding stream, or None
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,  # that gets straight-line code
    Q: tl.constexpr,  # greatest of 1, 2, 4 that divides RANK
    HELD: tl.constexpr,  # v in registers
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    STRAY_ROWS: tl.constexpr,
    STRAY_COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,  # weights in 128 bits
):
    """p = round(decay * p + coeff * u v^T) for all parameters p of the table"""
    row_ptr, tile = find(table_ptr, rows)
    n = tl.load(row_ptr + COLUMNS)
    tile = tile.to(tl.int32)
    tiles = tl.cdiv(n, TILE_COLUMNS).to(tl.int32)  # in a row of tiles
    row = (tile // tiles).to(tl.int64) * TILE_ROWS
    column = (tile % tiles).to(tl.int64) * TILE_COLUMNS
    rows = tl.minimum(tl.load(row_ptr + ROWS) - row, TILE_ROWS).to(tl.int32)  # of the tile
    columns = tl.minimum(n - column, TILE_COLUMNS).to(tl.int32)

    index = tl.load(row_ptr + INDEX)
    decay = tl.load(decay_ptr + index)
    coeff = tl.load(coeffs_ptr + index)
    id = tl.load(row_ptr + ID)
    offset = tl.load(row_ptr + OFFSET)
    rank = tl.load(row_ptr + RANK_COLUMN)
    address = tl.load(row_ptr + ADDRESS)
    u = tl.load(row_ptr + U)
    v = tl.load(row_ptr + V)

    wide = (tl.load(row_ptr + ALIGNED) != 0) & (n % WIDTH == 0)
    wide = wide & (rank == RANK) & ((u | v) % (4 * Q) == 0)
    if rounding_ptr is not None:
        wide = wide & (offset % 8 == 0)
    if wide:
        wide_tile(
            address, n, u, v, row, column, rows, columns, coeff, decay, rounding_ptr, offset, id,
            DTYPE, RANK, Q, HELD, GROUP, TILE_COLUMNS, WIDTH,
        )  # fmt: skip
    else:
        stray_tile(
            address, n, u, v, rank, row, column, rows, columns, coeff, decay, rounding_ptr, offset,
            id, DTYPE, STRAY_ROWS, STRAY_COLUMNS,
        )  # fmt: skip


def lowrank(launch: Any, coeffs: Tensor, decay: Tensor, rounding: Tensor | None) -> None:
    """p = round(decay * p + coeff * u v^T), in place; see
    `zo_fused.sweeps.backends.multi_tensor`."""
    _lowrank_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        coeffs,
        decay,
        rounding,
        DTYPE=DTYPES[launch.dtype],
        RANK=launch.rank,
        Q=math.gcd(launch.rank, 4),
        HELD=launch.rank <= HELD_RANK,
        TILE_ROWS=TILE[0],
        TILE_COLUMNS=TILE[1],
        GROUP=GROUP,
        STRAY_ROWS=STRAY_TILE[0],
        STRAY_COLUMNS=STRAY_TILE[1],
        WIDTH=16 // launch.dtype.itemsize,
        num_warps=2 * launch.dtype.itemsize,
        **OPTIONS,
    )


# ---- momentum -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["table_ptr", "rows", "coeffs_ptr", "decay_ptr"])
def _momentum_kernel(
    table_ptr,  # [rows, WIDTH]; the weights are moments, the states u
    rows,
    coeffs_ptr,  # [P]
    decay_ptr,  # [P]
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """moment = decay * moment + coeff * u"""
    row_ptr, program = find(table_ptr, rows)
    moment_ptr = pointer(tl.load(row_ptr + ADDRESS), tl.float32)
    u_ptr = pointer(tl.load(row_ptr + STATES), tl.float32)
    index = tl.load(row_ptr + INDEX)
    coeff = tl.load(coeffs_ptr + index)
    decay = tl.load(decay_ptr + index)
    begin, end = chunk_elements(row_ptr, program, CHUNK)
    for first in range(begin, end, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < end
        u = tl.load(u_ptr + offs, mask=mask)
        moment = decay * tl.load(moment_ptr + offs, mask=mask) + coeff * u
        tl.store(moment_ptr + offs, moment, mask=mask)


def factor_momentum(launch: Any, coeffs: Tensor, decay: Tensor) -> None:
    """moment = decay * moment + coeff * u of factors, in place; see
    `zo_fused.sweeps.backends.multi_tensor`."""
    _momentum_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        coeffs,
        decay,
        CHUNK=launch.chunk,
        BLOCK=MOMENTUM_BLOCK,
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )
