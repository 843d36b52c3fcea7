"""The fused sweeps as functions on lists of tensors.

For optimizers, other engines (vLLM workers, Ray actors, federated clients) and anyone who wants the
kernels alone. Stream keys are used as they are; `zo_fused.noise.derive_key` makes them. Weights are
float16, bfloat16 or float32 tensors of any shape, changed in place: read once, computed in float32,
rounded once, written once. Nothing here records gradients.

Options of all sweeps: ``rounding_key``, the key of a rounding stream (purpose ROUNDING), rounds
16-bit weights stochastically, without bias; None rounds to nearest. ``transform="fast"`` makes
normals with the approximate units of a GPU: close to the portable ones, but not the same bits on
every device. ``transform="rademacher"`` makes signs in place of normals: every element of z is +1
or -1, the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_fused.checks import finite, number, whole
from zo_fused.noise.keys import on_device
from zo_fused.noise.streams import MAX_ELEMENTS, as_int64
from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import matrix_shape

Scalar = float | Tensor
Factor = int | Sequence[Tensor]


def int64_tensor(
    values: Sequence[int] | Tensor,
    device: torch.device | str = "cpu",
    name: str = "values",
    bits: int = 64,
) -> Tensor:
    """64-bit numbers, ``0 <= value < 2**bits``, as an int64 tensor of the same bits.

    Raises:
        TypeError: a tensor that is not of 64-bit integers.
        ValueError: a number that is no whole one, or out of range.
    """
    if isinstance(values, Tensor):
        if values.dtype not in (torch.int64, torch.uint64):
            raise TypeError(f"zo_fused: {name} must be a tensor of int64, got {values.dtype}")
        return values.to(device=device, dtype=torch.int64)
    numbers = list(values)
    if set(map(type, numbers)) - {int} or (numbers and (min(numbers) < 0 or max(numbers) >> bits)):
        numbers = [whole(f"zo_fused: {name}[{i}]", v, 0, bits) for i, v in enumerate(numbers)]
    signed = list(map(as_int64, numbers))
    return on_device(torch.tensor(signed, dtype=torch.int64, device="cpu"), device)


def listed(params: Sequence[Tensor]) -> tuple[list[Tensor], torch.device]:
    """The tensors of a call and their device.

    Raises:
        TypeError: it is no list of tensors.
        ValueError: one is on the meta device.
    """
    if isinstance(params, Tensor):
        raise TypeError("zo_fused: params must be a list of tensors, got one: write [p]")
    tensors = list(params)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"zo_fused: params[{i}] must be a tensor, got {type(tensor).__name__}")
        if tensor.device.type == "meta":
            raise ValueError(
                f"zo_fused: params[{i}] is on the meta device: it has no data to change"
            )
    return tensors, tensors[0].device if tensors else torch.device("cpu")


def _table(name: str, value: Any, device: torch.device, forms: Sequence[tuple[int, ...]]) -> Tensor:
    """Numbers as a float32 tensor of the last of the forms; those of another form broadcast.

    Args:
        forms: shapes that the numbers may have. Those of the host must be finite, unless they are
            being traced.
    """
    shape = forms[-1]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value, dtype=np.float64))
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"zo_fused: {name} must be real numbers, got {value.dtype}")
        numbers = value.to(dtype=torch.float32, device=device)
        known = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if known and not torch.isfinite(value.float()).all():
            raise ValueError(f"zo_fused: {name} must be finite in float32, got {value}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        row = [finite(f"zo_fused: {name}[{i}]", x) for i, x in enumerate(value)]
        numbers = on_device(torch.tensor(row, dtype=torch.float32, device="cpu"), device)
    else:  # filled on the device: nothing waits for a copy
        plain = finite(f"zo_fused: {name}", value)
        numbers = torch.full((), plain, dtype=torch.float32, device=device)
    if tuple(numbers.shape) not in forms:
        wanted = " or ".join("a number" if not form else str(list(form)) for form in forms)
        got = "a number" if not numbers.dim() else str(list(numbers.shape))
        raise ValueError(f"zo_fused: {name} must be {wanted}, got {got}")
    return numbers.expand(shape).contiguous()


def _column(name: str, value: Any, params: Sequence[Tensor], device: torch.device) -> Tensor:
    """A number, or one a parameter, as float32 [P]."""
    return _table(name, value, device, [(), (len(params),)])


def _rows(
    name: str, value: Any, params: Sequence[Tensor], keys: Tensor, one_for_all: bool = False
) -> Tensor:
    """A number a key, for each parameter or for all, as float32 [P, K].

    Args:
        one_for_all: one number may stand for all keys; else it must be the only one's.
    """
    directions = len(keys)
    alone: list[tuple[int, ...]] = [()] if one_for_all or directions == 1 else []
    return _table(name, value, keys.device, [*alone, (directions,), (len(params), directions)])


def _streams(
    params: Sequence[Tensor],
    ids: Sequence[int] | Tensor | None,
    offsets: Sequence[int] | Tensor | None,
) -> tuple[Tensor, Tensor]:
    table = int64_tensor(range(len(params)) if ids is None else ids, name="ids")
    if table.shape != (len(params),):
        raise ValueError(f"zo_fused: {len(params)} parameters but {table.numel()} ids")
    if offsets is None and len(table.unique()) != len(table):
        raise ValueError(
            "zo_fused: two parameters have the same id and would get the same noise; "
            "shards of one parameter need `offsets`"
        )
    if offsets is None:
        return table, torch.zeros_like(table)
    starts = int64_tensor(offsets, "cpu", "offsets", 62)
    if starts.shape != (len(params),):
        raise ValueError(f"zo_fused: {len(params)} parameters but {starts.numel()} offsets")
    for start, p in zip(starts.tolist(), params, strict=True):
        if not 0 <= start <= MAX_ELEMENTS - p.numel():
            raise ValueError(
                f"zo_fused: elements must lie in [0, 2**62), got offset {start} and {p.numel()} "
                "elements"
            )
    return table, starts


def _keys(keys: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    row = int64_tensor(keys, device, "keys")
    if row.dim() != 1:
        raise ValueError(f"zo_fused: keys must be [K], got {list(row.shape)}")
    return row


def _rounding(rounding_key: int | Tensor | None, device: torch.device) -> Tensor | None:
    if rounding_key is None or isinstance(rounding_key, Tensor):
        return rounding_key
    return int64_tensor([rounding_key], device, "rounding_key")


@torch.no_grad()
def update_(
    params: Sequence[Tensor],
    keys: Sequence[int] | Tensor,
    coeffs: Sequence[float] | Tensor,
    decay: Scalar | Sequence[float] = 1.0,
    ids: Sequence[int] | Tensor | None = None,
    *,
    offsets: Sequence[int] | Tensor | None = None,
    rounding_key: int | Tensor | None = None,
    transform: str = "portable",
) -> None:
    """``p = decay * p + sum_k coeffs[k] * z_k`` for every parameter, in one sweep.

    z_k is the dense Gaussian of stream ``keys[k]``, regenerated in registers. Equivalent to, for
    each parameter p with id i, in float32: ``decay * p + sum(c * noise.normal(p.numel(), k, i))``.

    Args:
        params: tensors on one device.
        keys: K 64-bit stream keys.
        coeffs: K numbers, or a float32 tensor [K] or [len(params), K] on the parameters' device.
        decay: a number, or one per parameter.
        ids: 64-bit parameter ids; None: positions in the list.
        offsets: index of each tensor's first element in its full parameter, for shards.
        rounding_key, transform: see the top of this module.

    Raises:
        TypeError: a parameter is not float16, bfloat16 or float32.
        ValueError: lengths or devices differ, two parameters share an id, or the backend that
            serves the device lacks the transform.
    """
    params, device = listed(params)
    key_row = _keys(keys, device)
    operators.dense_(
        params,
        *_streams(params, ids, offsets),
        key_row,
        _rows("coeffs", coeffs, params, key_row),
        _column("decay", decay, params, device),
        _rounding(rounding_key, device),
        transform,
    )


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    key: int,
    scale: Scalar,
    ids: Sequence[int] | Tensor | None = None,
    *,
    offsets: Sequence[int] | Tensor | None = None,
    transform: str = "portable",
) -> None:
    """``p += scale * z`` with z the dense Gaussian of stream ``key``. Arguments as in `update_`."""
    params, device = listed(params)
    key_row = int64_tensor([key], device, "key")
    operators.dense_(
        params,
        *_streams(params, ids, offsets),
        key_row,
        _table("scale", scale, device, [(), (1,), (len(params), 1)]),
        _column("decay", 1.0, params, device),
        None,
        transform,
    )


@torch.no_grad()
def moments_update_(
    params: Sequence[Tensor],
    keys: Sequence[int] | Tensor,
    grads: Sequence[float] | Tensor,
    rule: str,
    step: Scalar | Sequence[float],
    *,
    firsts: Sequence[Tensor] = (),
    seconds: Sequence[Tensor] = (),
    beta: Scalar = 0.0,
    gain: Scalar = 1.0,
    beta2: Scalar = 0.0,
    gain2: Scalar = 1.0,
    eps: Scalar = 0.0,
    restores: Scalar | Sequence[float] = 0.0,
    decay: Scalar | Sequence[float] = 1.0,
    ids: Sequence[int] | Tensor | None = None,
    offsets: Sequence[int] | Tensor | None = None,
    rounding_key: int | Tensor | None = None,
    transform: str = "portable",
    squares: Sequence[float] | Tensor | None = None,
) -> None:
    """Element-wise moments of the estimate ``g = sum_k grads[k] * z_k``, and their step, in one
    sweep. g exists in registers only. For each parameter p:

    * ``m = beta * m + gain * g``; without `firsts`, ``m = gain * g``;
    * rule "momentum": ``s = m``; "sign": ``s = sign(m)``; "adam": ``v = beta2 * v + gain2 * g**2``
      and ``s = m / (sqrt(v) + eps)``;
    * ``p = decay * p + sum_k restores[k] * z_k + step * s``.

    Heavy ball is ``gain=1``, the exponential average ``gain=1 - beta``; bias corrections of Adam
    go into `step` and `eps`. `step` is negative to descend.

    Adam without memory: with `squares` the directions are those of the last K steps, from which
    "adam" makes both moments anew, ``m = gain * g`` and ``v = sum_k squares[k] * z_k**2``. K is as
    large as you like; every direction costs its noise.

    Args:
        params: tensors on one device.
        keys: K 64-bit stream keys.
        grads: K numbers, or a float32 tensor [K] or [len(params), K].
        rule: "momentum", "sign" or "adam".
        firsts: the m, like `params` in shape and strides, float32 or each in its parameter's dtype;
            empty to keep none. Changed in place, as are
        seconds: the v, float32, for "adam".
        restores: a number or K numbers, that take back a perturbation.
        decay, ids, offsets: as in `update_`.
        rounding_key, transform: see the top of this module.
        squares: K numbers, or a float32 tensor [K] or [len(params), K], for "adam" without `firsts`
            and `seconds`; beta, beta2 and gain2 then don't matter.

    Raises:
        TypeError, ValueError: as `update_`; also for moments of a wrong shape or dtype, or squares
            where there are others.
    """
    params, device = listed(params)
    key_row = _keys(keys, device)
    names = ("beta", "gain", "beta2", "gain2", "eps", "step")
    numbers = zip(names, (beta, gain, beta2, gain2, eps, step), strict=True)
    columns = [_column(name, value, params, device) for name, value in numbers]
    operators.moments_(
        params,
        list(firsts),
        list(seconds),
        *_streams(params, ids, offsets),
        key_row,
        _rows("grads", grads, params, key_row),
        _rows("restores", restores, params, key_row, one_for_all=True),
        torch.stack(columns, dim=-1),
        _column("decay", decay, params, device),
        rule,
        _rounding(rounding_key, device),
        transform,
        None if squares is None else _rows("squares", squares, params, key_row),
    )


@torch.no_grad()
def factors(
    params: Sequence[Tensor],
    u: Factor,
    v: Factor,
    rank: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors U (m, rank) and V (n, rank), float32, of parameters seen as (m, n).

    A factor given as a 64-bit key is drawn from that stream in row-major order; one given as a
    list of tensors is returned as it is.
    """
    params, device = listed(params)
    table, starts = _streams(params, ids, None)
    made = []
    for side, (name, factor) in enumerate({"u": u, "v": v}.items()):
        if isinstance(factor, Sequence):
            made.append(list(factor))
            continue
        key_row = int64_tensor([factor], device, name).expand(len(params)).contiguous()
        if rank is None:
            raise ValueError("zo_fused: factors from keys need a rank")
        columns = whole("zo_fused: rank", rank, 1)
        outs = [
            torch.empty(matrix_shape(p)[side], columns, dtype=torch.float32, device=p.device)
            for p in params
        ]
        operators.normal_(outs, table, starts, key_row)
        made.append(outs)
    return made[0], made[1]


@torch.no_grad()
def lowrank_update_(
    params: Sequence[Tensor],
    u: Factor,
    v: Factor,
    coeff: Scalar | Sequence[float],
    decay: Scalar | Sequence[float] = 1.0,
    *,
    rank: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
    rounding_key: int | Tensor | None = None,
) -> None:
    """``p = decay * p + coeff * U @ V.T`` for every parameter, in one sweep.

    A parameter is seen as ``(m, n) = (size(0), numel / size(0))``; the m x n product is never
    stored. Several directions in one sweep: concatenate their factors along the rank.

    Args:
        params: tensors on one device.
        u, v: 64-bit stream keys (then `rank` is needed), or lists of contiguous float32 tensors
            (m, r) and (n, r).
        coeff, decay: a number, or one per parameter.
        rank: columns of factors drawn from keys.
        ids: as in `update_`.
        rounding_key: see the top of this module.

    Raises:
        TypeError, ValueError: as `update_`; also for factors of a wrong shape.
    """
    params, device = listed(params)
    us, vs = factors(params, u, v, rank, ids)
    operators.lowrank_(
        params,
        us,
        vs,
        _column("coeff", coeff, params, device),
        _column("decay", decay, params, device),
        *_streams(params, ids, None),
        _rounding(rounding_key, device),
    )


def lowrank_perturb_(
    params: Sequence[Tensor],
    u: Factor,
    v: Factor,
    scale: Scalar,
    *,
    rank: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
) -> None:
    """``p += scale * U @ V.T``. Arguments as in `lowrank_update_`."""
    lowrank_update_(params, u, v, scale, 1.0, rank=rank, ids=ids)


@torch.no_grad()
def lowrank_momentum_(
    params: Sequence[Tensor],
    moments: Sequence[Tensor],
    u: Factor,
    v: Factor,
    grad: Scalar,
    lr: Scalar,
    beta: Scalar,
    restore: Scalar = 0.0,
    decay: Scalar | Sequence[float] = 1.0,
    *,
    rank: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
    rounding_key: int | Tensor | None = None,
) -> None:
    """Momentum in the factor (LOZO-M, arXiv 2410.07698), in one sweep:

    ``N = beta * N + (1 - beta) * grad * U``, then
    ``p = decay * p + (restore * U - lr * N) @ V.T``.

    Args:
        params: tensors on one device.
        moments: the N of each parameter, float32 (m, r), changed in place.
        u, v, rank, ids, rounding_key: as in `lowrank_update_`.
        grad: projected gradient.
        lr: learning rate.
        beta: momentum coefficient in [0, 1).
        restore: coefficient of ``U @ V.T`` that takes back a perturbation.
        decay: a number, or one per parameter.
    """
    params, device = listed(params)
    us, vs = factors(params, u, v, rank, ids)
    given = {"beta": beta, "grad": grad, "restore": restore, "lr": lr}
    b, g, a, s = (
        x.double() if isinstance(x, Tensor) else number(f"zo_fused: {name}", x)
        for name, x in given.items()
    )
    columns = {"beta": b, "(1 - beta) * grad": (1 - b) * g, "restore": a, "lr": -s}
    table = torch.stack([_column(name, x, params, device) for name, x in columns.items()], dim=-1)
    operators.lowrank_momentum_(
        params,
        list(moments),
        us,
        vs,
        table,
        _column("decay", decay, params, device),
        *_streams(params, ids, None),
        _rounding(rounding_key, device),
    )
