"""Low-rank sweeps: decay a matrix and add an outer product of two factors. Floor 3.

A thread owns eight neighbouring columns of several rows, so that it loads what it needs of v once
and every weight access has 128 bits. The products over the rank are a chain of fma in registers,
in the order of the specification: matrix units would round otherwise.
"""

import triton
import triton.language as tl
from torch import Tensor

from .fma import fma
from .launch import (
    FACTOR_BLOCK,
    FACTOR_WARPS,
    OPTIONS,
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WARPS,
    UNROLL,
    tile_grid,
)
from .rounding import narrow, widen


@triton.jit
def outer_step(dot, us, row_mask, vs, column_mask, q):
    """dot + u[:, q] v[:, q]"""
    u = tl.load(us + q, mask=row_mask)
    v = tl.load(vs + q, mask=column_mask)
    return fma(u[:, None], v[None, :], dot)


@triton.jit
def outer(u_ptr, row_mask, v_ptr, column_mask, RANK: tl.constexpr, UNROLL: tl.constexpr):
    """[ROWS, COLUMNS] sum_q u[:, q] v[:, q], in the order of q, the first term a plain product"""
    us = u_ptr + tl.arange(0, row_mask.shape[0]) * RANK
    vs = v_ptr + tl.arange(0, column_mask.shape[0]) * RANK
    dot = tl.load(us, mask=row_mask)[:, None] * tl.load(vs, mask=column_mask)[None, :]
    if RANK <= UNROLL:
        for q in tl.static_range(1, RANK):
            dot = outer_step(dot, us, row_mask, vs, column_mask, q)
    else:
        for q in range(1, RANK):
            dot = outer_step(dot, us, row_mask, vs, column_mask, q)
    return dot


@triton.jit(do_not_specialize=["u_ptr", "v_ptr", "coeffs_ptr", "decay_ptr", "row", "m", "n"])
def _lowrank_kernel(
    p_ptr,  # [m, n] weights, in place
    u_ptr,  # [m, RANK]
    v_ptr,  # [n, RANK]
    coeffs_ptr,  # [P]; not read unless SCALED
    decay_ptr,  # [P]
    row: tl.int64,  # of coeffs and decay
    m: tl.int64,
    n: tl.int64,
    RANK: tl.constexpr,
    SCALED: tl.constexpr,
    VECTORIZES: tl.constexpr,  # n is a multiple of eight
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """p = round(decay * p + coeff * u v^T), or without coeff"""
    m = m.to(tl.int64)
    n = n.to(tl.int64)
    tiles = tl.cdiv(n, COLUMNS).to(tl.int32)  # in a row of tiles
    pid = tl.program_id(0)
    row_start = (pid // tiles).to(tl.int64) * ROWS
    column_start = (pid % tiles).to(tl.int64) * COLUMNS
    rows = tl.minimum(m - row_start, ROWS).to(tl.int32)  # of the tile, in the matrix
    columns = tl.minimum(n - column_start, COLUMNS).to(tl.int32)
    if VECTORIZES:  # tells the compiler, and changes neither
        n = n // 8 * 8
        columns = columns // 8 * 8
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    row_mask = r < rows
    column_mask = c < columns
    ptrs = p_ptr + (row_start * n + column_start) + (r[:, None] * n + c[None, :])
    mask = row_mask[:, None] & column_mask[None, :]

    w = tl.load(ptrs, mask=mask)
    acc = tl.load(decay_ptr + row) * widen(w)
    us = u_ptr + row_start * RANK
    vs = v_ptr + column_start * RANK
    dot = outer(us, row_mask, vs, column_mask, RANK, UNROLL)
    acc = fma(tl.load(coeffs_ptr + row), dot, acc) if SCALED else acc + dot
    tl.store(ptrs, narrow(acc, w.dtype), mask=mask)


@triton.jit(do_not_specialize=["moment_ptr", "u_ptr", "a_ptr", "coeffs_ptr", "row", "n"])
def _momentum_kernel(
    moment_ptr,  # [n] in place
    u_ptr,  # [n]
    a_ptr,  # [n] out
    coeffs_ptr,  # [P, 4] beta, grad, restore, step
    row: tl.int64,  # of coeffs
    n: tl.int64,  # elements of the factor
    BLOCK: tl.constexpr,
):
    """moment = beta * moment + grad * u; a = restore * u + step * moment"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    coeffs_ptr += row * 4
    beta = tl.load(coeffs_ptr)
    grad = tl.load(coeffs_ptr + 1)
    restore = tl.load(coeffs_ptr + 2)
    step = tl.load(coeffs_ptr + 3)
    u = tl.load(u_ptr + offs, mask=mask)
    moment = fma(grad, u, tl.load(moment_ptr + offs, mask=mask) * beta)
    tl.store(moment_ptr + offs, moment, mask=mask)
    tl.store(a_ptr + offs, fma(step, moment, u * restore), mask=mask)


def _sweep(
    p: Tensor, u: Tensor, v: Tensor, coeffs: Tensor, decay: Tensor, row: int, scaled: bool
) -> None:
    m, n = u.shape[0], v.shape[0]
    _lowrank_kernel[tile_grid(m, n)](
        p,
        u,
        v,
        coeffs,
        decay,
        row,
        m,
        n,
        RANK=u.shape[1],
        SCALED=scaled,
        VECTORIZES=n % 8 == 0,
        UNROLL=UNROLL,
        ROWS=TILE_ROWS,
        COLUMNS=TILE_COLUMNS,
        num_warps=TILE_WARPS,
        **OPTIONS,
    )


def lowrank_(p: Tensor, u: Tensor, v: Tensor, coeffs: Tensor, decay: Tensor, row: int) -> None:
    """p = round(decay[row] * p + coeffs[row] * u @ v.T), in place.

    Args:
        p: contiguous float16, bfloat16 or float32 tensor, seen as (m, n).
        u: [m, rank] float32, contiguous, as is
        v: [n, rank].
        coeffs: [P] float32 on p's device, as is
        decay: [P] float32.
        row: which row belongs to p.
    """
    if p.numel():
        _sweep(p, u, v, coeffs, decay, row, scaled=True)


def lowrank_momentum_(
    p: Tensor, moment: Tensor, u: Tensor, v: Tensor, coeffs: Tensor, decay: Tensor, row: int
) -> None:
    """moment = beta * moment + grad * u, then p = round(decay[row] * p + a @ v.T) with
    a = restore * u + step * moment; coeffs: [P, 4]; the rest as for `lowrank_`."""
    if not p.numel():
        return
    a = u.new_empty(u.shape)
    n = u.numel()
    _momentum_kernel[(triton.cdiv(n, FACTOR_BLOCK),)](
        moment, u, a, coeffs, row, n, BLOCK=FACTOR_BLOCK, num_warps=FACTOR_WARPS, **OPTIONS
    )
    _sweep(p, a, v, coeffs, decay, row, scaled=False)
