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
_COLUMNS = 1024
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 times the golden ratio, as int64


def checksum(p: Tensor) -> Tensor:
    """A sum of a tensor's raw bytes, int64 []: words of 64 bits, in the order of its elements, in
    rows of a thousand; the sums of rows, and those of columns, each times an odd number of its
    place. So it sees elements that are others, and those that changed their places. It reads the
    tensor twice; a copy first, where it is not dense or lies across words."""
    flat = p.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % _WORD or flat.stride() != (1,):
        flat = flat.clone(memory_format=torch.contiguous_format)
    count = flat.numel() * flat.element_size() // _WORD
    end = count * _WORD // flat.element_size()
    words, rest = flat[:end].view(torch.int64), flat[end:].view(torch.uint8).long()
    rows = words[: count // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    parts = (rows.sum(0), rows.sum(1), words[rows.numel() :], rest)
    return _placed(torch.stack([_placed(part) for part in parts]))


def _placed(numbers: Tensor) -> Tensor:
    places = torch.arange(len(numbers), device=numbers.device)
    return (numbers * ((places + 1) * _GOLDEN | 1)).sum()


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
