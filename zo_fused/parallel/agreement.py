"""Whether all ranks have the same run and the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.parallel.groups import Groups

_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(p: Tensor) -> Tensor:
    """The sum of the raw bits of a tensor's elements, int64 []: one read of it."""
    return p.detach().view(_OF_SIZE[p.element_size()]).sum(dtype=torch.int64)


def check_agreement(
    groups: Groups, about: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device
) -> None:
    """Compare what all ranks must have. Each of them calls this, and each raises.

    Args:
        about: the run, under the names of what is compared; alike is what `repr` shows alike.
        weights: by name.
        device: where collectives are.

    Raises:
        RuntimeError: ranks differ; says in what.
    """
    told = torch.tensor([_number(value) for value in about.values()], dtype=torch.int64)
    if different := _different(groups, told.to(device), list(about)):
        raise RuntimeError(
            f"the ranks differ in their {different[0]}: make the model and the optimizer in the "
            "same way on all of them (parallel=None leaves each to itself)"
        )
    sums = torch.zeros(len(weights), dtype=torch.int64, device=device)
    for number, p in enumerate(weights.values()):
        sums[number] = checksum(p)
    if different := _different(groups, sums, list(weights)):
        raise RuntimeError(
            f"the ranks have other weights: {len(different)} of {len(weights)} parameters differ, "
            f"the first is {different[0]}; load the same weights on all ranks, and change them on "
            "all or on none (a flush, a save or an evaluation of one rank alone moves weights that "
            "a schedule keeps away from theta)"
        )


def _number(value: Any) -> int:
    digest = hashlib.sha256(repr(value).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _different(groups: Groups, numbers: Tensor, names: Sequence[str]) -> list[str]:
    """The names of numbers that are not the same on all ranks."""
    ends = torch.stack([numbers, -numbers])
    groups.max_(ends)
    different = (ends[0] != -ends[1]).tolist()
    return [name for name, other in zip(names, different, strict=True) if other]
