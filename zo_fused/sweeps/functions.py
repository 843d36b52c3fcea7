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

Parts of parameters get the noise that they have in the whole: DTensors, whose local part is swept,
and with ``shards``, a `Shard` for each tensor (None: a whole parameter), the parts of any engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_fused.sweeps import operators
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
from zo_fused.sweeps.shards import Cut, Shards, local, located

Scalar = float | Tensor


def _cut(
    params: Sequence[Tensor],
    ids: Sequence[int] | Tensor | None,
    offsets: Sequence[int] | Tensor | None,
    shards: Shards | None,
) -> tuple[list[Tensor], torch.device, Cut, tuple[Tensor, Tensor]]:
    """Parameters of this process, their device, and the tensors that sweeps over noise take of
    them, with ids and offsets."""
    params, device = listed(params)
    params, places = located(params, shards)
    if places is None:
        return params, device, Cut(params, None), streams_of(params, ids, offsets)
    if offsets is not None:
        raise ValueError("zo_fused: shards say where tensors lie: offsets or shards, not both")
    cut = Cut(params, places)
    numbers = cut.spread(streams_of(params, ids, [0] * len(params))[0])
    return params, device, cut, streams_of(cut.tensors, numbers, cut.starts)


@torch.no_grad()
def update_(
    params: Sequence[Tensor],
    keys: Sequence[int] | Tensor,
    coeffs: Sequence[float] | Tensor,
    decay: Scalar | Sequence[float] = 1.0,
    ids: Sequence[int] | Tensor | None = None,
    *,
    offsets: Sequence[int] | Tensor | None = None,
    shards: Shards | None = None,
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
        offsets: index of each tensor's first element in its full parameter, for flat parts of it.
        shards, rounding_key, transform: see the top of this module.

    Raises:
        TypeError: a parameter is not float16, bfloat16 or float32.
        ValueError: lengths or devices differ, two parameters share an id, a tensor does not lie
            where its shard says, or the backend that serves the device lacks the transform.
        NotImplementedError: a DTensor is placed so that a process has no box of its elements.
    """
    params, device, cut, streams = _cut(params, ids, offsets, shards)
    key_row = keys_of(keys, device)
    operators.dense_(
        cut.tensors,
        *streams,
        key_row,
        cut.spread(rows_of("coeffs", coeffs, params, key_row)),
        cut.spread(column("decay", decay, params, device)),
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
    shards: Shards | None = None,
    transform: str = "portable",
) -> None:
    """``p += scale * z`` with z the dense Gaussian of stream ``key``. Arguments as in `update_`."""
    params, device, cut, streams = _cut(params, ids, offsets, shards)
    key_row = int64_tensor([key], device, "key")
    operators.dense_(
        cut.tensors,
        *streams,
        key_row,
        cut.spread(table_of("scale", scale, device, [(), (1,), (len(params), 1)])),
        column("decay", 1.0, cut.tensors, device),
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
    shards: Shards | None = None,
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
        decay, ids, offsets, shards: as in `update_`.
        rounding_key, transform: see the top of this module.
        squares: K numbers, or a float32 tensor [K] or [len(params), K], for "adam" without `firsts`
            and `seconds`; beta, beta2 and gain2 then don't matter.

    Raises:
        TypeError, ValueError: as `update_`; also for moments of a wrong shape or dtype, or squares
            where there are others.
    """
    params, device, cut, streams = _cut(params, ids, offsets, shards)
    firsts, seconds = ([local(tensor) for tensor in tensors] for tensors in (firsts, seconds))
    key_row = keys_of(keys, device)
    names = ("beta", "gain", "beta2", "gain2", "eps", "step")
    numbers = zip(names, (beta, gain, beta2, gain2, eps, step), strict=True)
    columns = [column(name, value, params, device) for name, value in numbers]
    operators.moments_(
        cut.tensors,
        cut.like(firsts, "firsts"),
        cut.like(seconds, "seconds"),
        *streams,
        key_row,
        cut.spread(rows_of("grads", grads, params, key_row)),
        cut.spread(rows_of("restores", restores, params, key_row, one_for_all=True)),
        cut.spread(torch.stack(columns, dim=-1)),
        cut.spread(column("decay", decay, params, device)),
        rule,
        rounding_of(rounding_key, device),
        transform,
        None if squares is None else cut.spread(rows_of("squares", squares, params, key_row)),
    )
