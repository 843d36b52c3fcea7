"""The C++ CPU backend: the operators of the extension ``zo_fused._C``. Floor 2."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TRANSFORMS = ("portable",)
RULES = ("momentum", "sign", "adam")  # as in `Rule` of csrc/element.h

_import_error: str | None = None
try:
    importlib.import_module("zo_fused._C")  # registers zo_fused_C::*
except ImportError as error:
    _import_error = str(error)


def why_not(device_type: str) -> str | None:
    """None if this backend serves the device, else the reason."""
    if device_type != "cpu":
        return f"the cpu backend serves CPU tensors, not {device_type!r}"
    if _import_error is not None:
        return (
            f"the C++ extension zo_fused._C is not built ({_import_error}); build it with "
            "`pip install --no-build-isolation -e .` in a checkout with a C++ compiler"
        )
    return None


def isa() -> str:
    """The instruction set chosen at run time: ``avx512``, ``avx2`` or ``portable``."""
    return ("portable", "avx2", "avx512")[torch.ops.zo_fused_C.isa()]


def _operator(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> None:
        getattr(torch.ops.zo_fused_C, name)(*args)

    call.__name__ = name
    return call


bits_ = _operator("bits_")
lowrank_ = _operator("lowrank_")
lowrank_momentum_ = _operator("lowrank_momentum_")

# Strings stay on this side: torch's stable ABI loses the memory of every one that it hands to C++.


def normal_(
    outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor, transform: str = "portable"
) -> None:
    torch.ops.zo_fused_C.normal_(outs, ids, offsets, keys)


def dense_(
    params: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rounding: Tensor | None = None,
    transform: str = "portable",
) -> None:
    torch.ops.zo_fused_C.dense_(params, ids, offsets, keys, coeffs, decay, rounding)


def moments_(
    params: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    grads: Tensor,
    restores: Tensor,
    coeffs: Tensor,
    decay: Tensor,
    rule: str,
    rounding: Tensor | None = None,
    transform: str = "portable",
) -> None:
    streams = (ids, offsets, keys, grads, restores)
    number = RULES.index(rule)
    torch.ops.zo_fused_C.moments_(
        params, firsts, seconds, *streams, coeffs, decay, number, rounding
    )
