"""The operators ``torch.ops.zo_fused.*``: registration, fake implementations and the router.

The only file that touches ``torch.library``. One list-valued call is one sweep. Arguments, in the
order of the schemas, are in `zo_fused.sweeps.signatures`; what each sweep computes, to the bit, is
in `zo_fused.sweeps.reference`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from zo_fused.sweeps import dispatch
from zo_fused.sweeps.arguments import check_apart, check_lists, check_rows
from zo_fused.sweeps.signatures import SWEEPS


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


CALLS = {"made": 0}  # of operators, which change the versions of what they write


@torch.no_grad()
def _route(name: str, args: tuple[Any, ...]) -> None:
    signature = SWEEPS[name]
    lists, ids, offsets, rows = signature.split(args)
    checked = check_lists(name, lists, ids, offsets)
    transform = check_rows(checked, *rows)
    if checked.device is None:
        return
    check_apart(name, lists)
    sweep = getattr(backend_for(checked.device, transform), name)
    # Backends see contiguous memory. A permuted parameter (rare) goes through a copy of itself.
    written = lists[: signature.written]
    dense = [[tensor.contiguous() for tensor in tensors] for tensors in lists]
    sweep(*dense, *args[len(lists) :])
    for tensors, copies in zip(written, dense, strict=False):
        for tensor, copy in zip(tensors, copies, strict=True):
            if copy is not tensor:
                tensor.copy_(copy)
    versioned = [tensor for tensor in chain.from_iterable(written) if not tensor.is_inference()]
    torch.autograd.graph.increment_version(versioned)  # for graphs that saved them
    CALLS["made"] += 1


def _define(name: str) -> None:
    torch.library.define(f"zo_fused::{name}", SWEEPS[name].schema)

    # The dispatcher leaves out arguments that have their default value.
    @torch.library.impl(f"zo_fused::{name}", "default")
    def call(*args: Any) -> None:
        _route(name, args)

    @torch.library.register_fake(f"zo_fused::{name}")
    def fake(*args: Any) -> None:
        lists, ids, offsets, rows = SWEEPS[name].split(args)
        check_rows(check_lists(name, lists, ids, offsets), *rows)


for _name in SWEEPS:
    _define(_name)

bits_ = torch.ops.zo_fused.bits_
normal_ = torch.ops.zo_fused.normal_
dense_ = torch.ops.zo_fused.dense_
shaped_ = torch.ops.zo_fused.shaped_
dense_steps_ = torch.ops.zo_fused.dense_steps_
moments_ = torch.ops.zo_fused.moments_
lowrank_ = torch.ops.zo_fused.lowrank_
factor_momentum_ = torch.ops.zo_fused.factor_momentum_
lowrank_momentum_ = torch.ops.zo_fused.lowrank_momentum_
