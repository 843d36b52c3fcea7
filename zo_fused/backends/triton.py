"""The Triton backend: NVIDIA and AMD GPUs or, for tests, Triton's interpreter. Floor 2.

One launch a parameter. Keys, coefficients and decay stay on the device, where the kernels read
them: nothing waits for the host, and nothing is compiled anew when they change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 6)


def why_not(device_type: str) -> str | None:
    """None if this backend serves the device, else the reason."""
    try:
        import triton
    except ImportError as error:
        return f"Triton can't be imported ({error}); `pip install 'zo-fused[triton]'`"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"Triton {triton.__version__} is too old; upgrade it to {OLDEST[0]}.{OLDEST[1]}"

    from zo_fused_kernels.launch import INTERPRETING

    if device_type == "cuda" or (INTERPRETING.value and device_type == "cpu"):
        return None
    return (
        f"Triton compiles for GPUs, not for {device_type!r} tensors; to run its kernels in Python "
        "on CPU tensors, slowly, set TRITON_INTERPRET=1 before starting"
    )


@contextlib.contextmanager
def _device_of(tensor: Tensor) -> Iterator[None]:
    """Makes the tensor's device current, to which Triton launches."""
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield


def _rows(tensors: Sequence[Tensor], *integers: Tensor) -> Iterator[tuple[Any, ...]]:
    return zip(range(len(tensors)), tensors, *(t.tolist() for t in integers), strict=True)


def bits_(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor) -> None:
    from zo_fused_kernels import fill

    keys = keys.contiguous()
    with _device_of(keys):
        for row, out, id, offset in _rows(outs, ids, offsets):
            fill.bits_(out, id, offset, keys, row)


def normal_(outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor) -> None:
    from zo_fused_kernels import fill

    keys = keys.contiguous()
    with _device_of(keys):
        for row, out, id, offset in _rows(outs, ids, offsets):
            fill.normal_(out, id, offset, keys, row)


def dense_(
    params: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    from zo_fused_kernels import dense

    keys, coeffs, decay = keys.contiguous(), coeffs.contiguous(), decay.contiguous()
    with _device_of(decay):
        for row, param, id, offset in _rows(params, ids, offsets):
            dense.dense_(param, id, offset, keys, coeffs, decay, row)


def lowrank_(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    from zo_fused_kernels import lowrank

    coeffs, decay = coeffs.contiguous(), decay.contiguous()
    with _device_of(decay):
        for row, (param, u, v) in enumerate(zip(params, us, vs, strict=True)):
            lowrank.lowrank_(param, u, v, coeffs, decay, row)


def lowrank_momentum_(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    from zo_fused_kernels import lowrank

    coeffs, decay = coeffs.contiguous(), decay.contiguous()
    with _device_of(decay):
        rows = zip(params, moments, us, vs, strict=True)
        for row, (param, moment, u, v) in enumerate(rows):
            lowrank.lowrank_momentum_(param, moment, u, v, coeffs, decay, row)
