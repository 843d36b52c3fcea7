"""The fused low-rank sweeps as functions on lists of tensors.

What `zo_fused.sweeps.functions` says of keys, weights and options holds here, too. Factors of a
part of a parameter are the rows of U and of V that belong to its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_fused.checks import number, whole
from zo_fused.sweeps import operators
from zo_fused.sweeps.arguments import matrix_shape
from zo_fused.sweeps.conversions import column, int64_tensor, listed, rounding_of, streams_of
from zo_fused.sweeps.shards import Shards, blocks, local, located, of_runs

Scalar = float | Tensor
Factor = int | Sequence[Tensor]


@torch.no_grad()
def factors(
    params: Sequence[Tensor],
    u: Factor,
    v: Factor,
    rank: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
    shards: Shards | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors U (m, rank) and V (n, rank), float32, of parameters seen as (m, n).

    A factor given as a 64-bit key is drawn from that stream in row-major order; one given as a
    list of tensors is returned as it is.
    """
    params, device = listed(params)
    params, places = located(params, shards)
    table, starts = streams_of(params, ids, None if places is None else [0] * len(params))
    made = []
    for side, (name, factor) in enumerate({"u": u, "v": v}.items()):
        if isinstance(factor, Sequence):
            made.append(listed(factor, name)[0])
            continue
        key_row = int64_tensor([factor], device, name).expand(len(params)).contiguous()
        if rank is None:
            raise ValueError("zo_fused: factors from keys need a rank")
        columns = whole("zo_fused: rank", rank, 1)
        outs = [
            torch.empty(matrix_shape(p)[side], columns, dtype=torch.float32, device=p.device)
            for p in params
        ]
        if places is None:
            operators.normal_(outs, table, starts, key_row)
        else:
            sides = [
                (shard.columns if side else shard.rows)(p.shape)
                for p, shard in zip(params, places, strict=True)
            ]
            filled, rows, firsts = of_runs(outs, sides)
            operators.normal_(filled, table[rows], int64_tensor(firsts), key_row[rows])
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
    shards: Shards | None = None,
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
        shards: of each tensor, or None for a whole parameter; m and n are then the tensor's own.
        rounding_key: as in `update_`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `update_`; also for factors of a wrong shape.
    """
    params, device = listed(params)
    us, vs = factors(params, u, v, rank, ids, shards)
    _multiply(
        params,
        us,
        vs,
        column("coeff", coeff, params, device),
        column("decay", decay, params, device),
        ids,
        shards,
        rounding_of(rounding_key, device),
    )


def _multiply(
    params: list[Tensor],
    us: list[Tensor],
    vs: list[Tensor],
    coeffs: Tensor,
    decay: Tensor,
    ids: Sequence[int] | Tensor | None,
    shards: Shards | None,
    rounding: Tensor | None,
) -> None:
    """The sweep ``lowrank_``. Where it rounds at random, a shard is swept run by run, each with
    the random bits of its place."""
    params, places = located(params, shards)
    if places is None:
        operators.lowrank_(params, us, vs, coeffs, decay, *streams_of(params, ids, None), rounding)
        return
    if rounding is None:
        operators.lowrank_(params, us, vs, coeffs, decay, None, None, None)
        return
    table, _ = streams_of(params, ids, [0] * len(params))
    lists, rows, firsts = blocks(params, us, vs, places)
    row = torch.tensor(rows, dtype=torch.int64, device=coeffs.device)
    operators.lowrank_(*lists, coeffs[row], decay[row], table[rows], int64_tensor(firsts), rounding)


def lowrank_perturb_(
    params: Sequence[Tensor],
    u: Factor,
    v: Factor,
    scale: Scalar,
    *,
    rank: int | None = None,
    ids: Sequence[int] | Tensor | None = None,
    shards: Shards | None = None,
) -> None:
    """``p += scale * U @ V.T``. Arguments as in `lowrank_update_`."""
    lowrank_update_(params, u, v, scale, 1.0, rank=rank, ids=ids, shards=shards)


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
    shards: Shards | None = None,
    rounding_key: int | Tensor | None = None,
) -> None:
    """Momentum in the factor (LOZO-M, arXiv 2410.07698), in one sweep:

    ``N = beta * N + (1 - beta) * grad * U``, then
    ``p = decay * p + (restore * U - lr * N) @ V.T``.

    Args:
        params: tensors on one device.
        moments: the N of each parameter, float32 (m, r), changed in place.
        u, v, rank, ids, shards, rounding_key: as in `lowrank_update_`.
        grad: projected gradient.
        lr: learning rate.
        beta: momentum coefficient in [0, 1).
        restore: coefficient of ``U @ V.T`` that takes back a perturbation.
        decay: a number, or one per parameter.
    """
    params, device = listed(params)
    us, vs = factors(params, u, v, rank, ids, shards)
    given = {"beta": beta, "grad": grad, "restore": restore, "lr": lr}
    b, g, a, s = (
        x.double() if isinstance(x, Tensor) else number(f"zo_fused: {name}", x)
        for name, x in given.items()
    )
    columns = {"beta": b, "(1 - beta) * grad": (1 - b) * g, "restore": a, "lr": -s}
    table = [column(name, x, params, device) for name, x in columns.items()]
    decay, rounding = column("decay", decay, params, device), rounding_of(rounding_key, device)
    if located(params, shards)[1] is None:
        streams = streams_of(params, ids, None)
        rows = torch.stack(table, dim=-1)
        operators.lowrank_momentum_(params, list(moments), us, vs, rows, decay, *streams, rounding)
        return
    # the same in its parts, for a moment may belong to several runs of a shard
    kept = list(map(local, moments))
    operators.factor_momentum_(kept, us, table[1], table[0])
    sums = [moment.clone() for moment in kept]
    operators.factor_momentum_(sums, us, table[2], table[3])
    ones = torch.ones_like(decay)
    _multiply(params, sums, vs, ones, decay, ids, shards, rounding)
