"""Dense sweeps: decay a parameter and add K directions, regenerated in registers. Floor 3.

A thread makes the noise of two neighbouring counters and so owns eight neighbouring elements,
which for 16-bit weights is one 128-bit load and store; noise never leaves its thread. For 32-bit
weights one counter, four elements, is 128 bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from .fma import fma
from .launch import NOISE_BLOCK, NOISE_WARPS, OPTIONS, noise_grid, vectorizes
from .normal import normals
from .philox import covered, locate
from .rounding import narrow, widen


@triton.jit
def sweep_block(
    ptrs,  # [BLOCK] a block of weights
    mask,  # [BLOCK] which of them the tensor has, or None: all
    block,  # its number in the full parameter
    id,  # parameter id
    keys_ptr,  # [K]
    coeffs_ptr,  # [K]
    decay,  # scalar
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """*ptrs = round(decay * *ptrs + sum_k coeffs[k] * z_k)"""
    w = tl.load(ptrs, mask=mask)
    acc = decay * widen(w)
    for k in range(K):
        z = normals(block, tl.load(keys_ptr + k), id, BLOCK, WIDTH)
        acc = fma(tl.load(coeffs_ptr + k), z, acc)
    tl.store(ptrs, narrow(acc, w.dtype), mask=mask)


@triton.jit(
    do_not_specialize=["p_ptr", "keys_ptr", "coeffs_ptr", "decay_ptr", "row", "n", "id", "offset"]
)
def _dense_kernel(
    p_ptr,  # [n] weights, in place
    keys_ptr,  # [K] stream keys
    coeffs_ptr,  # [P, K]
    decay_ptr,  # [P]
    row: tl.int64,  # of coeffs and decay
    n: tl.int64,  # elements
    id: tl.int64,  # parameter id
    offset: tl.int64,  # index of p[0] in the full parameter
    K: tl.constexpr,
    VECTORIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """p[i] = round(decay * p[i] + sum_k coeffs[k] * z_k[offset + i])"""
    block, start = locate(offset, BLOCK)
    ptrs = p_ptr + start
    if VECTORIZES:
        ptrs = tl.multiple_of(ptrs, 16)
    ptrs = ptrs + tl.arange(0, BLOCK)
    id = id.to(tl.int64)
    coeffs_ptr += row * K
    decay = tl.load(decay_ptr + row)

    # A block that the tensor fills has code of its own, free of masks: 128-bit accesses need
    # that, and comparisons would be a fifth of the instructions.
    if (start >= 0) & (start + BLOCK <= n):
        sweep_block(ptrs, None, block, id, keys_ptr, coeffs_ptr, decay, K, BLOCK, WIDTH)
    else:
        mask = covered(start, n, BLOCK)
        sweep_block(ptrs, mask, block, id, keys_ptr, coeffs_ptr, decay, K, BLOCK, WIDTH)


def dense_(
    p: Tensor, id: int, offset: int, keys: Tensor, coeffs: Tensor, decay: Tensor, row: int
) -> None:
    """p = round(decay[row] * p + sum_k coeffs[row, k] * z_k), in place.

    Args:
        p: contiguous float16, bfloat16 or float32 tensor.
        id: parameter id, a signed 64-bit integer.
        offset: index of p's first element in the full parameter.
        keys: [K] int64 on p's device, as are
        coeffs: [P, K] float32, contiguous, and
        decay: [P] float32.
        row: which row belongs to p.
    """
    n = p.numel()
    if n == 0:
        return
    _dense_kernel[noise_grid(n, offset)](
        p,
        keys,
        coeffs,
        decay,
        row,
        n,
        id,
        offset,
        K=keys.numel(),
        VECTORIZES=vectorizes(p.data_ptr(), offset, p.element_size()),
        BLOCK=NOISE_BLOCK,
        WIDTH=16 // p.element_size(),
        num_warps=NOISE_WARPS,
        **OPTIONS,
    )
