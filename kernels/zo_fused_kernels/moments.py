"""Sweeps with dense state: momentum, Adam, sign of the momentum.

The estimate ``g = sum_k grads[k] * z_k`` exists in registers only: each direction is regenerated
once, for g and for the way back to the unperturbed weights. Layout as in `dense`, with the states
beside the weights.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_elements, chunk_elements, index, is_whole, load_run, pointers, store_run
from .fma import fma
from .launch import DTYPES, NOISE_WARPS, OPTIONS, STRAY, moments_block, width
from .normal import as_bits, as_float, hidden, normals, transform_of
from .rounding import narrow, rounded, widen
from .shaped import root_of
from .table import ADDRESS, ID, INDEX, OFFSET, STATES, find, pointer


@triton.jit
def zeros(x):
    """as many zeros, laid out among threads as x is"""
    # A loop may carry them from turn to turn. Constants, laid out anew, would make what is added to
    # them go through shared memory.
    return as_float(as_bits(x) & hidden(0))


@triton.jit
def moments_run(
    p_ptr,  # to the first of some neighbouring weights
    m_ptr,  # to the first of their first moments, or None
    v_ptr,  # to the first of their second moments, or of the Hessian, or None
    mask,  # [COUNT] or None
    first,  # index of the first weight in the full parameter
    id,
    keys_ptr,  # [K]
    grads_ptr,  # [K]
    restores_ptr,  # [K]
    squares_ptr,  # [K] or None
    coeffs_ptr,  # [6] beta, gain, beta2, gain2, eps, step
    directions,  # K
    decay,
    rounding_ptr,  # [1] or None
    RULE: tl.constexpr,
    SINGLE: tl.constexpr,  # K is 1, without squares
    TRANSFORM: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`zo_fused.sweeps.reference.moments_` of COUNT neighbouring elements"""
    p_ptrs = pointers(p_ptr, COUNT, WIDTH)
    w = load_run(p_ptrs, mask, COUNT, WIDTH)
    acc = decay * widen(w)
    if SINGLE:
        g = tl.zeros_like(acc)
        z = normals(first, tl.load(keys_ptr), id, COUNT, WIDTH, TRANSFORM)
        g = fma(tl.load(grads_ptr), z, g)
        acc = fma(tl.load(restores_ptr), z, acc)
    else:
        g = zeros(acc)
        if squares_ptr is not None:
            v = g
        if RULE == "hizoo":
            h_ptrs = pointers(v_ptr, COUNT, WIDTH)
            h = load_run(h_ptrs, mask, COUNT, WIDTH)
            root = root_of(h, mask)
        for k in range(directions):
            z = normals(first, tl.load(keys_ptr + k), id, COUNT, WIDTH, TRANSFORM)
            g = fma(tl.load(grads_ptr + k), z, g)
            if RULE == "hizoo":
                acc = fma(tl.load(restores_ptr + k), tl.div_rn(z, root), acc)
            else:
                acc = fma(tl.load(restores_ptr + k), z, acc)
            if squares_ptr is not None:
                v = fma(tl.load(squares_ptr + k) * z, z, v)

    gain = tl.load(coeffs_ptr + 1)
    if m_ptr is None:
        s = gain * g
    else:
        m_ptrs = pointers(m_ptr, COUNT, WIDTH)
        m = load_run(m_ptrs, mask, COUNT, WIDTH)
        s = fma(gain, g, tl.load(coeffs_ptr) * widen(m))
        store_run(m_ptrs, narrow(s, m.dtype), mask, COUNT, WIDTH)
    if RULE == "hizoo":
        h = fma(v, h, tl.load(coeffs_ptr + 2) * h)
        floor = tl.load(coeffs_ptr + 4)
        h = tl.where(h > floor, h, floor)
        store_run(h_ptrs, h, mask, COUNT, WIDTH)
        s = tl.div_rn(s, root_of(h, mask))
    elif RULE == "adam":
        if v_ptr is not None:
            v_ptrs = pointers(v_ptr, COUNT, WIDTH)
            v = load_run(v_ptrs, mask, COUNT, WIDTH)
            v = fma(tl.load(coeffs_ptr + 3) * g, g, tl.load(coeffs_ptr + 2) * v)
            store_run(v_ptrs, v, mask, COUNT, WIDTH)
        s = tl.div_rn(s, tl.sqrt_rn(v) + tl.load(coeffs_ptr + 4))
    elif RULE == "sign":
        s = (s > 0).to(tl.float32) - (s < 0).to(tl.float32)
    acc = fma(tl.load(coeffs_ptr + 5), s, acc)
    acc = rounded(acc, w.dtype, rounding_ptr, first, id, COUNT, WIDTH)
    store_run(p_ptrs, acc, mask, COUNT, WIDTH)


POINTERS = [
    f"{name}_ptr"
    for name in ("table", "keys", "grads", "restores", "squares", "coeffs", "decay", "rounding")
]


@triton.jit(do_not_specialize=["rows", "directions", *POINTERS])
def _moments_kernel(
    table_ptr,  # [rows, WIDTH]
    rows,
    keys_ptr,  # [K] stream keys
    grads_ptr,  # [P, K]
    restores_ptr,  # [P, K]
    squares_ptr,  # [P, K], or None: seconds are kept
    coeffs_ptr,  # [P, 6]
    decay_ptr,  # [P]
    rounding_ptr,  # [1] key of a rounding stream, or None
    directions,  # K
    DTYPE: tl.constexpr,
    M_DTYPE: tl.constexpr,  # of the first moments, or None
    RULE: tl.constexpr,
    SINGLE: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRAY: tl.constexpr,
):
    """the update of `zo_fused.sweeps.reference.moments_` for all parameters of the table"""
    row_ptr, program = find(table_ptr, rows)
    p_ptr = pointer(tl.load(row_ptr + ADDRESS), DTYPE)
    id = tl.load(row_ptr + ID)
    row = tl.load(row_ptr + INDEX)
    decay = tl.load(decay_ptr + row)
    grads_ptr += row * directions
    restores_ptr += row * directions
    if squares_ptr is not None:
        squares_ptr += row * directions
    coeffs_ptr += row * 6
    m_ptr = None
    v_ptr = None
    if M_DTYPE is not None:
        m_ptr = pointer(tl.load(row_ptr + STATES), M_DTYPE)
    if RULE == "adam" and squares_ptr is None:
        v_ptr = pointer(tl.load(row_ptr + STATES + 1), tl.float32)
    elif RULE == "hizoo":
        v_ptr = pointer(tl.load(row_ptr + STATES), tl.float32)
    offset = tl.load(row_ptr + OFFSET)
    begin, end = chunk_elements(row_ptr, program, CHUNK)
    for block in range(begin // BLOCK, tl.cdiv(end, BLOCK)):
        low, high = block_elements(block, begin, end, BLOCK)
        if is_whole(row_ptr, low, high, BLOCK):
            moments_run(
                tl.multiple_of(p_ptr + (low - offset), 16),
                None if m_ptr is None else tl.multiple_of(m_ptr + (low - offset), 16),
                None if v_ptr is None else tl.multiple_of(v_ptr + (low - offset), 16),
                None, block * BLOCK, id, keys_ptr, grads_ptr, restores_ptr, squares_ptr,
                coeffs_ptr, directions, decay, rounding_ptr, RULE, SINGLE, TRANSFORM, BLOCK, WIDTH,
            )  # fmt: skip
        else:
            for i in range(low, high, STRAY):
                first = index(i)
                moments_run(
                    p_ptr + (first - offset),
                    None if m_ptr is None else m_ptr + (first - offset),
                    None if v_ptr is None else v_ptr + (first - offset),
                    first + tl.arange(0, STRAY) < high, first, id, keys_ptr, grads_ptr,
                    restores_ptr, squares_ptr, coeffs_ptr, directions, decay, rounding_ptr, RULE,
                    False, TRANSFORM, STRAY, 1,
                )  # fmt: skip


def moments(
    launch: Any,
    keys: Tensor,
    grads: Tensor,
    restores: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rule: str,
    rounding: Tensor | None,
    transform: str,
    squares: Tensor | None,
) -> None:
    """As `zo_fused.sweeps.reference.moments_`; see `zo_fused.sweeps.backends.multi_tensor`."""
    states = launch.state_dtypes
    _moments_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        keys,
        grads,
        restores,
        squares,
        coeffs,
        decay,
        rounding,
        keys.numel(),
        DTYPE=DTYPES[launch.dtype],
        M_DTYPE=DTYPES[states[0]] if states and rule != "hizoo" else None,
        RULE=rule,
        SINGLE=keys.numel() == 1 and squares is None,
        TRANSFORM=transform_of(transform),
        CHUNK=launch.chunk,
        BLOCK=moments_block(transform),
        WIDTH=width(transform, launch.dtype.itemsize, moments_block(transform)),
        STRAY=STRAY,
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )
