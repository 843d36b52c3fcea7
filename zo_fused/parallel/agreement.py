"""Whether all ranks have the same run and the same weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.parallel.groups import Groups
from zo_fused.sweeps.shards import cut_among, is_sharded, local

_WORD = 8  # bytes


def checksum(p: Tensor) -> Tensor:
    """The sum of a tensor's raw bytes, as words of 64 bits in the order of its elements, int64 [].
    One read of it; a copy first, where it is not dense or lies across words."""
    flat = p.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % _WORD or flat.stride() != (1,):
        flat = flat.clone(memory_format=torch.contiguous_format)
    words = flat.numel() * flat.element_size() // _WORD * _WORD // flat.element_size()
    return flat[:words].view(torch.int64).sum() + flat[words:].view(torch.uint8).sum()


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
        parts = cut_among(p) if is_sharded(p) else ()
        if math.prod(group.size() for group in parts) == groups.size > 1:
            continue  # there is one copy of it
        sums[number] = checksum(local(p))
        for group in parts:
            torch.distributed.all_reduce(sums[number], group=group)
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
