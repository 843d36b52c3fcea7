"""The fused sweeps as functions on lists of tensors.

For optimizers, other engines (vLLM workers, Ray actors, federated clients) and anyone who wants the
kernels alone. Stream keys are used as they are; `zo_fused.noise.derive_key` makes them. Weights are
float16, bfloat16 or float32 tensors of any shape, changed in place: read once, computed in float32,
rounded once, written once. Nothing here records gradients.

Options of all sweeps: ``rounding_key``, the key of a rounding stream (purpose ROUNDING), rounds
16-bit weights stochastically, without bias; None rounds to nearest. ``transform="fast"`` makes
normals with the approximate units of a GPU: close to the portable ones, but not the same bits on
every device. ``transform="hadamard"`` makes numbers that are nearly normal, at a third to a half of
the cost, and ``transform="signs"`` +1 or -1: both the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_fused.checks import number, whole
from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.conversions import (
    column,
    int64_tensor,
    keys_of,
    listed,
    rounding_of,
    rows_of,
    streams_of,
    table_of,
)

Scalar = float | Tensor
Factor = int | Sequence[Tensor]


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
    key_row = keys_of(keys, device)
    operators.dense_(
        params,
        *streams_of(params, ids, offsets),
        key_row,
        rows_of("coeffs", coeffs, params, key_row),
        column("decay", decay, params, device),
        rounding_of(rounding_key, device),
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
        *streams_of(params, ids, offsets),
        key_row,
        table_of("scale", scale, device, [(), (1,), (len(params), 1)]),
        column("decay", 1.0, params, device),
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
    key_row = keys_of(keys, device)
    names = ("beta", "gain", "beta2", "gain2", "eps", "step")
    numbers = zip(names, (beta, gain, beta2, gain2, eps, step), strict=True)
    columns = [column(name, value, params, device) for name, value in numbers]
    operators.moments_(
        params,
        list(firsts),
        list(seconds),
        *streams_of(params, ids, offsets),
        key_row,
        rows_of("grads", grads, params, key_row),
        rows_of("restores", restores, params, key_row, one_for_all=True),
        torch.stack(columns, dim=-1),
        column("decay", decay, params, device),
        rule,
        rounding_of(rounding_key, device),
        transform,
        None if squares is None else rows_of("squares", squares, params, key_row),
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
    table, starts = streams_of(params, ids, None)
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
        column("coeff", coeff, params, device),
        column("decay", decay, params, device),
        *streams_of(params, ids, None),
        rounding_of(rounding_key, device),
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
    table = torch.stack([column(name, x, params, device) for name, x in columns.items()], dim=-1)
    operators.lowrank_momentum_(
        params,
        list(moments),
        us,
        vs,
        table,
        column("decay", decay, params, device),
        *streams_of(params, ids, None),
        rounding_of(rounding_key, device),
    )
