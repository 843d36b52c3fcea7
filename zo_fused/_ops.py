"""The operators: schemas, checks, fake implementations and the router. Floor 4.

The only file that touches ``torch.library``. One list-valued call is one sweep. Per-parameter rows:

* ``ids``, ``offsets``: int64 [P] on the CPU. Parameter id, and the index of the tensor's first
  element in the full parameter (not zero for a shard).
* ``keys``: int64, the 64-bit stream keys in two's complement. [K] for ``dense_``, [P] for
  ``bits_`` and ``normal_``. On the parameters' device, as are
* ``coeffs``: float32 [P, K] (``dense_``), [P] (``lowrank_``), [P, 4] (``lowrank_momentum_``:
  beta, grad, restore, step), [P, 6] (``moments_``: beta, gain, beta2, gain2, eps, step), also
* ``grads`` and ``restores``: float32 [P, K], and ``decay``: float32 [P].

Options:

* ``rounding``: int64 [1] on the parameters' device, the key of a rounding stream: 16-bit weights
  are rounded stochastically. None: to nearest. Low-rank sweeps need ids and offsets only for it.
* ``transform``: how words become normals, "portable" or (GPUs only) "fast".
* ``rule``: "momentum", "adam" or "sign". ``firsts`` may be empty for all but "adam", which alone
  has ``seconds``.

What each computes, to the bit, is in `zo_fused.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused import dispatch

_ROUNDING = "Tensor? ids=None, Tensor? offsets=None, Tensor? rounding=None"
_TRANSFORM = 'str transform="portable"'
SCHEMAS = {
    "bits_": "(Tensor(a!)[] outs, Tensor ids, Tensor offsets, Tensor keys) -> ()",
    "normal_": (
        f"(Tensor(a!)[] outs, Tensor ids, Tensor offsets, Tensor keys, {_TRANSFORM}) -> ()"
    ),
    "dense_": (
        "(Tensor(a!)[] params, Tensor ids, Tensor offsets, Tensor keys, Tensor coeffs, "
        f"Tensor decay, Tensor? rounding=None, {_TRANSFORM}) -> ()"
    ),
    "moments_": (
        "(Tensor(a!)[] params, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor ids, "
        "Tensor offsets, Tensor keys, Tensor grads, Tensor restores, Tensor coeffs, "
        f"Tensor decay, str rule, Tensor? rounding=None, {_TRANSFORM}) -> ()"
    ),
    "lowrank_": (
        "(Tensor(a!)[] params, Tensor[] us, Tensor[] vs, Tensor coeffs, Tensor decay, "
        f"{_ROUNDING}) -> ()"
    ),
    "lowrank_momentum_": (
        "(Tensor(a!)[] params, Tensor(b!)[] moments, Tensor[] us, Tensor[] vs, Tensor coeffs, "
        f"Tensor decay, {_ROUNDING}) -> ()"
    ),
}

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TRANSFORMS = ("portable", "fast")
RULES = ("momentum", "adam", "sign")


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


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"zo_fused: {name}={value!r}: choose one of {', '.join(choices)}")


def _check_rounding(params: Sequence[Tensor], rounding: Tensor | None) -> None:
    if rounding is not None:
        _check_row("rounding", rounding, torch.int64, (1,))
        _check_device("rounding", rounding, params)


def _check_fill(
    dtype: torch.dtype,
    outs: Sequence[Tensor],
    ids: Tensor,
    offsets: Tensor,
    keys: Tensor,
    transform: str = "portable",
) -> None:
    _check_choice("transform", transform, TRANSFORMS)
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
    rounding: Tensor | None = None,
    transform: str = "portable",
) -> None:
    _check_choice("transform", transform, TRANSFORMS)
    _check_tensors("params", params, WEIGHT_DTYPES)
    _check_streams(params, ids, offsets)
    _check_row("keys", keys, torch.int64, (keys.numel(),))
    _check_row("coeffs", coeffs, torch.float32, (len(params), keys.numel()))
    _check_row("decay", decay, torch.float32, (len(params),))
    for name, row in (("keys", keys), ("coeffs", coeffs), ("decay", decay)):
        _check_device(name, row, params)
    _check_rounding(params, rounding)


def _check_state(
    name: str, tensors: Sequence[Tensor], params: Sequence[Tensor], float32_only: bool
) -> None:
    _check(
        len(tensors) == len(params),
        f"{len(params)} parameters but {len(tensors)} tensors in {name}",
    )
    for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
        wanted = (torch.float32,) if float32_only else (torch.float32, param.dtype)
        if (
            tensor.dtype not in wanted
            or tensor.shape != param.shape
            or tensor.stride() != param.stride()
            or tensor.device != param.device
        ):
            raise ValueError(
                f"zo_fused: {name}[{i}] must be like params[{i}], {tuple(param.shape)} on "
                f"{param.device}, with the same strides, in {' or '.join(map(str, wanted))}; got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )


def _check_moments(
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
    _check_choice("rule", rule, RULES)
    _check_dense(params, ids, offsets, keys, grads, decay, rounding, transform)
    if firsts or rule == "adam":
        _check_state("firsts", firsts, params, float32_only=False)
        _check(
            len({tensor.dtype for tensor in firsts}) < 2
            or all(t.dtype == p.dtype for t, p in zip(firsts, params, strict=True)),
            "firsts must be float32 throughout, or each of its parameter's dtype",
        )
    if seconds or rule == "adam":
        _check(rule == "adam", f"rule {rule!r} has no second moments")
        _check_state("seconds", seconds, params, float32_only=True)
    _check_row("restores", restores, torch.float32, (len(params), keys.numel()))
    _check_row("coeffs", coeffs, torch.float32, (len(params), 6))
    for name, row in (("restores", restores), ("coeffs", coeffs)):
        _check_device(name, row, params)


def matrix_shape(param: Tensor) -> tuple[int, int]:
    """The shape as which low-rank sweeps see a parameter: (size(0), numel / size(0))."""
    rows = param.shape[0] if param.dim() else 1
    return rows, param.numel() // rows if rows else 0


def _check_factors(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    decay: Tensor,
    ids: Tensor | None,
    offsets: Tensor | None,
    rounding: Tensor | None,
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
    _check_rounding(params, rounding)
    if ids is not None and offsets is not None:
        _check_streams(params, ids, offsets)
    else:
        _check(rounding is None, "stochastic rounding needs ids and offsets")


def _check_lowrank(
    params: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
    ids: Tensor | None = None,
    offsets: Tensor | None = None,
    rounding: Tensor | None = None,
) -> None:
    _check_factors(params, us, vs, decay, ids, offsets, rounding)
    _check_row("coeffs", coeffs, torch.float32, (len(params),))
    _check_device("coeffs", coeffs, params)


def _check_lowrank_momentum(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    coeffs: Tensor,
    decay: Tensor,
    ids: Tensor | None = None,
    offsets: Tensor | None = None,
    rounding: Tensor | None = None,
) -> None:
    _check_factors(params, us, vs, decay, ids, offsets, rounding)
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
    "moments_": _check_moments,
    "lowrank_": _check_lowrank,
    "lowrank_momentum_": _check_lowrank_momentum,
}


# ---- registration -------------------------------------------------------------------------------


def _backend(name: str, written: Sequence[Tensor], transform: str) -> Any:
    backend = dispatch.select(written[0].device.type)
    if transform not in backend.TRANSFORMS:
        raise ValueError(
            f"zo_fused: transform={transform!r} uses the approximate units of GPUs, and "
            f"{written[0].device.type!r} tensors are served here by {backend.__name__}; "
            'use transform="portable"'
        )
    return getattr(backend, name)


@torch.no_grad()
def _route(name: str, lists: int, transform_at: int, args: tuple[Any, ...]) -> None:
    """Run a sweep. Its first `lists` arguments are the lists of tensors that it writes."""
    CHECKS[name](*args)
    if not args[0]:
        return
    # The dispatcher leaves out arguments that have their default value.
    transform = args[transform_at] if 0 <= transform_at < len(args) else "portable"
    sweep = _backend(name, args[0], transform)
    # Backends see contiguous memory. A permuted parameter (rare) goes through a copy of itself.
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in args[:lists]]
    sweep(*dense, *args[lists:])
    for tensors, copies in zip(args[:lists], dense, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)


def _define(name: str) -> None:
    torch.library.define(f"zo_fused::{name}", SCHEMAS[name])
    schema = getattr(torch.ops.zo_fused, name).default._schema
    names = [argument.name for argument in schema.arguments]
    transform_at = names.index("transform") if "transform" in names else -1
    lists = SCHEMAS[name].count("!)[]")

    @torch.library.impl(f"zo_fused::{name}", "default")
    def call(*args: Any) -> None:
        _route(name, lists, transform_at, args)

    @torch.library.register_fake(f"zo_fused::{name}")
    def fake(*args: Any) -> None:
        CHECKS[name](*args)


for _name in SCHEMAS:
    _define(_name)

bits_ = torch.ops.zo_fused.bits_
normal_ = torch.ops.zo_fused.normal_
dense_ = torch.ops.zo_fused.dense_
moments_ = torch.ops.zo_fused.moments_
lowrank_ = torch.ops.zo_fused.lowrank_
lowrank_momentum_ = torch.ops.zo_fused.lowrank_momentum_
