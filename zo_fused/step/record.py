"""What a replay log says of an optimizer's parameters and settings."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from zo_fused.step.buckets import Bucket

Groups = list[dict[str, Any]]


def parameter_table(param_groups: Groups) -> list[list[Any]]:
    """Name (or null), shape, dtype and group of every parameter, in optimizer order."""
    table = []
    for number, group in enumerate(param_groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            dtype = str(p.dtype).removeprefix("torch.")
            table.append([name, list(p.shape), dtype, number])
    return table


def settings(param_groups: Groups, hyper: Collection[str], buckets: list[Bucket]) -> dict[str, Any]:
    """What a replay must know besides the projected gradients.

    Args:
        hyper: names of the hyper-parameters of groups.
        buckets: with the parameters that move.
    """
    groups = [
        {name: _plain(value) for name, value in group.items() if name in hyper}
        for group in param_groups
    ]
    taken = {id(p) for bucket in buckets for p in bucket.params}
    everyone = [p for group in param_groups for p in group["params"]]
    return {
        "groups": groups,
        "trainable": [i for i, p in enumerate(everyone) if id(p) in taken],
        "in_place": list(param_groups[0]["in_place"]),
    }


def _plain(value: Any) -> Any:
    """A hyper-parameter as JSON gives it back."""
    if isinstance(value, Tensor):
        return float(value)
    return list(value) if isinstance(value, tuple) else value
