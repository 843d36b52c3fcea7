"""The operators: schemas, checks, fake implementations and the router. Floor 4.

The only file that touches ``torch.library``. One list-valued call is one sweep. Per-parameter rows:

* ``ids``, ``offsets``: int64 [P] on the CPU. Parameter id, and the index of the tensor's first
  element in the full parameter (not zero for a shard).
* ``keys``: int64, the 64-bit stream keys in two's complement. [K] for ``dense_``, [P] for
  ``bits_`` and ``normal_``. On the parameters' device, as are
* ``coeffs``: float32 [P, K] (``dense_``), [P] (``lowrank_``), [P, 4] (``lowrank_momentum_``:
  beta, grad, restore, step), and ``decay``: float32 [P].

What each computes, to the bit, is in `zo_fused.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused import dispatch

SCHEMAS = {
    "bits_": "(Tensor(a!)[] outs, Tensor ids, Tensor offsets, Tensor keys) -> ()",
    "normal_": "(Tensor(a!)[] outs, Tensor ids, Tensor offsets, Tensor keys) -> ()",
    "dense_": (
        "(Tensor(a!)[] params, Tensor ids, Tensor offsets, Tensor keys, Tensor coeffs, "
        "Tensor decay) -> ()"
    ),
    "lowrank_": (
        "(Tensor(a!)[] params, Tensor[] us, Tensor[] vs, Tensor coeffs, Tensor decay) -> ()"
    ),
    "lowrank_momentum_": (
        "(Tensor(a!)[] params, Tensor(b!)[] moments, Tensor[] us, Tensor[] vs, Tensor coeffs, "
        "Tensor decay) -> ()"
    ),
}

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# ---- checks, shared by the fake and the real implementation -------------------------------------


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"zo_fused: {message}")


def _check_tensors(name: str, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    """Runs for every parameter in every sweep, so messages are made only where one is needed."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(
                f"zo_fused: {name}[{i}] has dtype {str(tensor.dtype).removeprefix('torch.')}; "
                f"supported: {wanted}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"zo_fused: {name}[{i}] is on {tensor.device}, {name}[0] on {tensors[0].device}; "
                "one call serves one device"
            )
        if tensor.layout != torch.strided or (
            not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor)
        ):
            raise ValueError(
                f"zo_fused: {name}[{i}] must be a dense tensor whose elements do not share memory"
            )


def _check_row(name: str, row: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    _check(
        row.dtype == dtype and tuple(row.shape) == shape,
        f"{name} must be {dtype} of shape {shape}, got {row.dtype} of shape {tuple(row.shape)}",
    )


def _check_device(name: str, tensor: Tensor, like: Sequence[Tensor]) -> None:
    if like:
        _check(
            tensor.device == like[0].device,
            f"{name} is on {tensor.device}, the parameters on {like[0].device}",
        )


def _check_streams(tensors: Sequence[Tensor], ids: Tensor, offsets: Tensor) -> None:
    for name, row in (("ids", ids), ("offsets", offsets)):
        _check_row(name, row, torch.int64, (len(tensors),))
        _check(row.device.type == "cpu", f"{name} must be a CPU tensor")


def _check_fill(
    dtype: torch.dtype, outs: Sequence[Tensor], ids: Tensor, offsets: Tensor, keys: Tensor
) -> None:
    _check_tensors("outs", outs, (dtype,))
    _check_streams(outs, ids, offsets)
    _check_row("keys", keys, torch.int64, (len(outs),))
    _check_device("keys", keys, outs)


def _check_dense(
    params: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    _check_tensors("params", params, WEIGHT_DTYPES)
    _check_streams(params, ids, offsets)
    _check_row("keys", keys, torch.int64, (keys.numel(),))
    _check_row("coeffs", coeffs, torch.float32, (len(params), keys.numel()))
    _check_row("decay", decay, torch.float32, (len(params),))
    for name, row in (("keys", keys), ("coeffs", coeffs), ("decay", decay)):
        _check_device(name, row, params)


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """The shape as which low-rank sweeps see a parameter: (size(0), numel / size(0))."""
    rows = param.shape[0] if param.dim() else 1
    return rows, param.numel() // rows if rows else 0


def _check_factors(
    params: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], decay: Tensor
) -> None:
    _check_tensors("params", params, WEIGHT_DTYPES)
    _check(
        len(us) == len(params) and len(vs) == len(params),
        f"{len(params)} parameters need as many factors, got {len(us)} us and {len(vs)} vs",
    )
    _check_tensors("us", us, (torch.float32,))
    _check_tensors("vs", vs, (torch.float32,))
    for i, (param, u, v) in enumerate(zip(params, us, vs, strict=True)):
        rows, columns = matrix_shape(param)
        rank = u.shape[-1] if u.dim() else 0
        if u.shape != (rows, rank) or v.shape != (columns, rank) or rank < 1:
            raise ValueError(
                f"zo_fused: params[{i}] is seen as ({rows}, {columns}); us[{i}] must be "
                f"({rows}, rank) and vs[{i}] ({columns}, rank) with rank >= 1, got "
                f"{tuple(u.shape)} and {tuple(v.shape)}"
            )
        if not (u.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"zo_fused: us[{i}] and vs[{i}] must be contiguous")
    _check_row("decay", decay, torch.float32, (len(params),))
    for name, tensors in (("us", us), ("vs", vs), ("decay", (decay,))):
        if params:
            _check_device(name, tensors[0], params)


def _check_lowrank(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    _check_factors(params, us, vs, decay)
    _check_row("coeffs", coeffs, torch.float32, (len(params),))
    _check_device("coeffs", coeffs, params)


def _check_lowrank_momentum(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
) -> None:
    _check_factors(params, us, vs, decay)
    _check(len(moments) == len(us), f"{len(us)} factors need as many moments, got {len(moments)}")
    _check_tensors("moments", moments, (torch.float32,))
    for i, (moment, u) in enumerate(zip(moments, us, strict=True)):
        if moment.shape != u.shape or not moment.is_contiguous() or moment.device != u.device:
            raise ValueError(
                f"zo_fused: moments[{i}] must be contiguous, of shape {tuple(u.shape)}, "
                f"on {u.device}"
            )
    _check_row("coeffs", coeffs, torch.float32, (len(params), 4))
    _check_device("coeffs", coeffs, params)


CHECKS: dict[str, Callable[..., None]] = {
    "bits_": lambda *args: _check_fill(torch.int64, *args),
    "normal_": lambda *args: _check_fill(torch.float32, *args),
    "dense_": _check_dense,
    "lowrank_": _check_lowrank,
    "lowrank_momentum_": _check_lowrank_momentum,
}


# ---- registration -------------------------------------------------------------------------------


def _route(name: str, written: Sequence[Tensor], *rest: Any) -> None:
    CHECKS[name](written, *rest)
    if not written:
        return
    sweep = getattr(dispatch.select(written[0].device.type), name)
    with torch.no_grad():
        # Backends see contiguous memory. A permuted parameter (rare) goes through a copy of itself.
        dense = [t.contiguous() for t in written]
        sweep(dense, *rest)
        for tensor, copy in zip(written, dense, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _define(name: str) -> None:
    torch.library.define(f"zo_fused::{name}", SCHEMAS[name])

    @torch.library.impl(f"zo_fused::{name}", "default")
    def call(*args: Any) -> None:
        _route(name, *args)

    @torch.library.register_fake(f"zo_fused::{name}")
    def fake(*args: Any) -> None:
        CHECKS[name](*args)


for _name in SCHEMAS:
    _define(_name)

bits_ = torch.ops.zo_fused.bits_
normal_ = torch.ops.zo_fused.normal_
dense_ = torch.ops.zo_fused.dense_
lowrank_ = torch.ops.zo_fused.lowrank_
lowrank_momentum_ = torch.ops.zo_fused.lowrank_momentum_
