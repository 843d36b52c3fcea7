"""The operators: schemas, fake implementations and the router.

The only file that touches ``torch.library``. One list-valued call is one sweep. Per-parameter rows:

* ``ids``, ``offsets``: int64 [P] on the CPU. Parameter id, and the index of the tensor's first
  element in the full parameter (not zero for a shard).
* ``keys``: int64, the 64-bit stream keys in two's complement. [K] for ``dense_`` and scripts, [P]
  for ``bits_`` and ``normal_``. On the parameters' device, as are
* ``coeffs``: float32 [P, K] (``dense_``), [P] (``lowrank_``), [P, 4] (``lowrank_momentum_``:
  beta, grad, restore, step), [P, 6] (``moments_``: beta, gain, beta2, gain2, eps, step), also
* ``grads``, ``restores`` and ``squares``: float32 [P, K], and ``decay``: float32 [P].

Options:

* ``rounding``: int64 [1] on the parameters' device, the key of a rounding stream: 16-bit weights
  are rounded stochastically. None: to nearest. Low-rank sweeps need ids and offsets only for it.
* ``transform``: how words become normals, "portable" or (GPUs only) "fast"; or signs, "rademacher".
* ``rule``: "momentum", "adam" or "sign". ``firsts`` may be empty for all but "adam", which alone
  has ``seconds``. With ``squares`` "adam" keeps neither and makes both anew from all directions.

``dense_steps_`` and ``lowrank_steps_`` make many sweeps over the same weights in one pass. What
they are is a ``script`` with rows of its own (`zo_fused.sweeps.script`); us are (products, m,
rank) there.

What each computes, to the bit, is in `zo_fused.sweeps.reference`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from zo_fused.sweeps import dispatch
from zo_fused.sweeps.arguments import (
    RULES,
    TRANSFORMS,
    WEIGHT_DTYPES,
    WRITTEN,
    check_apart,
    check_lists,
    check_rows,
    matrix_shape,
    split,
)

__all__ = ["RULES", "SCHEMAS", "TRANSFORMS", "WEIGHT_DTYPES", "backend_for", "matrix_shape"]

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
    "dense_steps_": (
        "(Tensor(a!)[] params, Tensor ids, Tensor offsets, Tensor keys, Tensor script, "
        f"Tensor coeffs, Tensor decay, {_TRANSFORM}) -> ()"
    ),
    "moments_": (
        "(Tensor(a!)[] params, Tensor(b!)[] firsts, Tensor(c!)[] seconds, Tensor ids, "
        "Tensor offsets, Tensor keys, Tensor grads, Tensor restores, Tensor coeffs, "
        f"Tensor decay, str rule, Tensor? rounding=None, {_TRANSFORM}, Tensor? squares=None) -> ()"
    ),
    "lowrank_": (
        "(Tensor(a!)[] params, Tensor[] us, Tensor[] vs, Tensor coeffs, Tensor decay, "
        f"{_ROUNDING}) -> ()"
    ),
    "lowrank_steps_": (
        "(Tensor(a!)[] params, Tensor[] us, Tensor[] vs, Tensor ids, Tensor offsets, "
        "Tensor keys, Tensor script, Tensor coeffs, Tensor decay) -> ()"
    ),
    "lowrank_momentum_": (
        "(Tensor(a!)[] params, Tensor(b!)[] moments, Tensor[] us, Tensor[] vs, Tensor coeffs, "
        f"Tensor decay, {_ROUNDING}) -> ()"
    ),
}

# ---- registration -------------------------------------------------------------------------------


def backend_for(device: torch.device, transform: str) -> Any:
    """The module that serves a device.

    Raises:
        ValueError: it lacks the transform.
        RuntimeError: as `dispatch.select`.
    """
    backend = dispatch.select(device.type)
    if transform not in backend.TRANSFORMS:
        raise ValueError(
            f"zo_fused: transform={transform!r} uses the approximate units of GPUs, and "
            f"{device.type!r} tensors are served here by {backend.__name__}; "
            'use transform="portable"'
        )
    return backend


@torch.no_grad()
def _route(name: str, args: tuple[Any, ...]) -> None:
    lists, ids, offsets, rows = split(name, args)
    checked = check_lists(name, lists, ids, offsets)
    transform = check_rows(checked, *rows)
    if checked.device is None:
        return
    check_apart(name, lists)
    sweep = getattr(backend_for(checked.device, transform), name)
    # Backends see contiguous memory. A permuted parameter (rare) goes through a copy of itself.
    written = lists[: WRITTEN[name]]
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in written]
    sweep(*dense, *args[len(written) :])
    for tensors, copies in zip(written, dense, strict=True):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
    versioned = [tensor for tensor in chain.from_iterable(written) if not tensor.is_inference()]
    torch.autograd.graph.increment_version(versioned)  # for graphs that saved them


def _define(name: str) -> None:
    torch.library.define(f"zo_fused::{name}", SCHEMAS[name])

    # The dispatcher leaves out arguments that have their default value.
    @torch.library.impl(f"zo_fused::{name}", "default")
    def call(*args: Any) -> None:
        _route(name, args)

    @torch.library.register_fake(f"zo_fused::{name}")
    def fake(*args: Any) -> None:
        lists, ids, offsets, rows = split(name, args)
        check_rows(check_lists(name, lists, ids, offsets), *rows)


for _name in SCHEMAS:
    _define(_name)

bits_ = torch.ops.zo_fused.bits_
normal_ = torch.ops.zo_fused.normal_
dense_ = torch.ops.zo_fused.dense_
dense_steps_ = torch.ops.zo_fused.dense_steps_
moments_ = torch.ops.zo_fused.moments_
lowrank_ = torch.ops.zo_fused.lowrank_
lowrank_steps_ = torch.ops.zo_fused.lowrank_steps_
lowrank_momentum_ = torch.ops.zo_fused.lowrank_momentum_
