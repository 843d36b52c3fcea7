"""Fills: the random words and the normals themselves. Floor 3.

For factors, inspection and tests, so these kernels are as plain as they can be.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import NOISE_BLOCK, NOISE_WARPS, OPTIONS, noise_grid
from .normal import normals
from .philox import covered, locate, words


@triton.jit(do_not_specialize=["out_ptr", "keys_ptr", "row", "n", "id", "offset"])
def _bits_kernel(
    out_ptr,  # [n] int64
    keys_ptr,  # [P] stream keys
    row: tl.int64,  # of keys
    n: tl.int64,  # elements
    id: tl.int64,  # parameter id
    offset: tl.int64,  # index of out[0] in the full parameter
    BLOCK: tl.constexpr,
):
    """out[i] = word of element offset + i"""
    block, start = locate(offset, BLOCK)
    w0, w1, w2, w3 = words(block, tl.load(keys_ptr + row), id.to(tl.int64), BLOCK, 4, 0)
    x = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,)).to(tl.int64)
    tl.store(out_ptr + start + tl.arange(0, BLOCK), x, mask=covered(start, n, BLOCK))


@triton.jit(do_not_specialize=["out_ptr", "keys_ptr", "row", "n", "id", "offset"])
def _normal_kernel(
    out_ptr,  # [n] float32
    keys_ptr,  # [P] stream keys
    row: tl.int64,  # of keys
    n: tl.int64,  # elements
    id: tl.int64,  # parameter id
    offset: tl.int64,  # index of out[0] in the full parameter
    BLOCK: tl.constexpr,
):
    """out[i] = standard normal of element offset + i"""
    block, start = locate(offset, BLOCK)
    z = normals(block, tl.load(keys_ptr + row), id.to(tl.int64), BLOCK, 4)
    tl.store(out_ptr + start + tl.arange(0, BLOCK), z, mask=covered(start, n, BLOCK))


def _fill(kernel: Any, out: Tensor, id: int, offset: int, keys: Tensor, row: int) -> None:
    n = out.numel()
    if n:
        kernel[noise_grid(n, offset)](
            out, keys, row, n, id, offset, BLOCK=NOISE_BLOCK, num_warps=NOISE_WARPS, **OPTIONS
        )


def bits_(out: Tensor, id: int, offset: int, keys: Tensor, row: int) -> None:
    """out[i] = Philox word of element ``offset + i`` of parameter ``id``, in place.

    Args:
        out: contiguous int64 tensor.
        id: parameter id, a signed 64-bit integer.
        offset: index of out's first element in the full parameter.
        keys: [P] int64 on out's device.
        row: which key is out's.
    """
    _fill(_bits_kernel, out, id, offset, keys, row)


def normal_(out: Tensor, id: int, offset: int, keys: Tensor, row: int) -> None:
    """out[i] = standard normal of element ``offset + i``, float32; arguments as for `bits_`."""
    _fill(_normal_kernel, out, id, offset, keys, row)
