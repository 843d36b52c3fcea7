"""Dense sweeps of a script in one pass: a weight goes through all of them in registers.

Sweeps that follow each other share directions, and noise is most of the work. So the script
(`zo_fused.sweeps.script`) is taken term by term, and terms in a row with the same direction share
its normals. These live within a turn of a loop: carried from turn to turn, they would be laid out
among threads in another way than weights are, and go through shared memory.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_elements, chunk_elements, index, is_whole, load_run, pointers, store_run
from .fma import fma
from .launch import DTYPES, NOISE_BLOCK, NOISE_WARPS, OPTIONS, STRAY, width
from .normal import normals, transform_of
from .rounding import rounded, widen
from .table import ADDRESS, ID, INDEX, OFFSET, find, pointer

Script = tuple[tuple[int, ...], ...]

# Columns of a term.
DIRECTION = tl.constexpr(0)  # index of its key
SWEEP = tl.constexpr(1)
COEFF = tl.constexpr(2)  # index of its coefficient
OPENS = tl.constexpr(3)  # 1: the first term of its sweep
CLOSES = tl.constexpr(4)  # 1: the last term of its sweep
ROUNDING = tl.constexpr(5)  # index of the key of its sweep's rounding stream, or -1
TERM = tl.constexpr(6)  # columns


@functools.lru_cache(maxsize=64)
def terms_of(script: Script, device: torch.device) -> tuple[Tensor, Tensor]:
    """The terms of a script, int64 [T, TERM], and where those of one direction begin, [groups + 1],
    on a device. A replay has the same script again and again, and nothing is copied for it then."""
    terms: list[tuple[int, ...]] = []
    for sweep, (first, second, rounding) in enumerate(script):
        used = [first] if second < 0 else [first, second]
        for i, direction in enumerate(used):
            ends = (int(i == 0), int(i == len(used) - 1))
            terms.append((direction, sweep, 2 * sweep + i, *ends, rounding))
    begins = [i for i, t in enumerate(terms) if i == 0 or t[0] != terms[i - 1][0]]
    rows = torch.tensor(terms, dtype=torch.int64, device="cpu")
    starts = torch.tensor([*begins, len(terms)], dtype=torch.int64, device="cpu")
    return rows.to(device), starts.to(device)


@triton.jit
def steps_run(
    ptrs,  # `pointers` to neighbouring weights
    mask,  # [COUNT] or None
    first,  # index of the first in the full parameter
    id,
    keys_ptr,  # [K]
    terms_ptr,  # [T, TERM]
    begins_ptr,  # [groups + 1]
    groups,
    coeffs_ptr,  # [sweeps, 2]
    decay_ptr,  # [sweeps]
    TRANSFORM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """COUNT weights after all sweeps, each of them rounded"""
    w = load_run(ptrs, mask, COUNT, WIDTH)
    acc = widen(w)
    for group in range(groups):
        begin = tl.load(begins_ptr + group)
        key = tl.load(keys_ptr + tl.load(terms_ptr + begin * TERM + DIRECTION))
        z = normals(first, key, id, COUNT, WIDTH, TRANSFORM)
        for term in range(begin, tl.load(begins_ptr + group + 1)):
            term_ptr = terms_ptr + term * TERM
            decay = tl.load(decay_ptr + tl.load(term_ptr + SWEEP))
            acc = tl.where(tl.load(term_ptr + OPENS) != 0, decay * widen(w), acc)
            acc = fma(tl.load(coeffs_ptr + tl.load(term_ptr + COEFF)), z, acc)
            if tl.load(term_ptr + CLOSES) != 0:
                rounding = tl.load(term_ptr + ROUNDING)
                if STOCHASTIC:
                    if rounding >= 0:
                        w = rounded(acc, w.dtype, keys_ptr + rounding, first, id, COUNT, WIDTH)
                    else:
                        w = rounded(acc, w.dtype, None, first, id, COUNT, WIDTH)
                else:
                    w = rounded(acc, w.dtype, None, first, id, COUNT, WIDTH)
    store_run(ptrs, w, mask, COUNT, WIDTH)


POINTERS = ["table_ptr", "keys_ptr", "terms_ptr", "begins_ptr", "coeffs_ptr", "decay_ptr"]


@triton.jit(do_not_specialize=["rows", "groups", "sweeps", *POINTERS])
def _dense_steps_kernel(
    table_ptr,  # [rows, WIDTH]
    rows,
    keys_ptr,  # [K] stream keys
    terms_ptr,  # [T, TERM]
    begins_ptr,  # [groups + 1]
    groups,
    sweeps,
    coeffs_ptr,  # [P, sweeps, 2]
    decay_ptr,  # [P, sweeps]
    DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRANSFORM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STRAY: tl.constexpr,
):
    """the sweeps of a script over all parameters of the table"""
    row_ptr, program = find(table_ptr, rows)
    p_ptr = pointer(tl.load(row_ptr + ADDRESS), DTYPE)
    id = tl.load(row_ptr + ID)
    row = tl.load(row_ptr + INDEX)
    coeffs_ptr += row * sweeps * 2
    decay_ptr += row * sweeps
    offset = tl.load(row_ptr + OFFSET)
    begin, end = chunk_elements(row_ptr, program, CHUNK)
    for block in range(begin // BLOCK, tl.cdiv(end, BLOCK)):
        low, high = block_elements(block, begin, end, BLOCK)
        if is_whole(row_ptr, low, high, BLOCK):
            ptrs = pointers(tl.multiple_of(p_ptr + (low - offset), 16), BLOCK, WIDTH)
            steps_run(
                ptrs, None, block * BLOCK, id, keys_ptr,
                terms_ptr, begins_ptr, groups, coeffs_ptr, decay_ptr, TRANSFORM, STOCHASTIC,
                BLOCK, WIDTH,
            )  # fmt: skip
        else:
            for i in range(low, high, STRAY):
                first = index(i)
                run = first + tl.arange(0, STRAY)
                steps_run(
                    p_ptr + (run - offset), run < high, first, id,
                    keys_ptr, terms_ptr, begins_ptr, groups, coeffs_ptr, decay_ptr, TRANSFORM,
                    STOCHASTIC, STRAY, 1,
                )  # fmt: skip


def dense_steps(
    launch: Any, keys: Tensor, script: Tensor, coeffs: Tensor, decay: Tensor, transform: str
) -> None:
    """The sweeps of a script, which is on the host; see `zo_fused.sweeps.backends.multi_tensor`."""
    if not len(script):
        return
    terms, begins = terms_of(tuple(map(tuple, script.tolist())), keys.device)
    _dense_steps_kernel[(launch.programs,)](
        launch.table,
        launch.rows,
        keys,
        terms,
        begins,
        len(begins) - 1,
        len(script),
        coeffs,
        decay,
        DTYPE=DTYPES[launch.dtype],
        STOCHASTIC=bool((script[:, 2] >= 0).any()),
        TRANSFORM=transform_of(transform),
        CHUNK=launch.chunk,
        BLOCK=NOISE_BLOCK // 2,
        WIDTH=width(transform, launch.dtype.itemsize, NOISE_BLOCK // 2),
        STRAY=STRAY,
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )
