"""From param groups to buckets: the trainable parameters of one device, as the sweeps take them.

Floor 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zo_fused import _ops
from zo_fused.ops import int64_tensor, on_device
from zo_fused.streams import parameter_id


@dataclass
class Bucket:
    """Parameters on one device, with a row for each in every table."""

    device: torch.device
    params: list[Tensor] = field(default_factory=list)
    group: list[int] = field(default_factory=list)  # index of the param group
    id_list: list[int] = field(default_factory=list)
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    offsets: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    group_index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    scratch: dict[str, Any] = field(default_factory=dict)  # buffers that directions reuse

    def rows(self, per_group: Tensor) -> Tensor:
        """A per-group vector as a per-parameter vector on this bucket's device."""
        return on_device(per_group, self.device)[self.group_index]


def signature(param_groups: list[dict[str, Any]]) -> tuple[Any, ...]:
    """What must not change for buckets to stay valid."""
    return tuple(
        (id(p), p.data_ptr(), p.dtype, p.device, p.requires_grad)
        for group in param_groups
        for p in group["params"]
    )


def parameter_ids(param_groups: list[dict[str, Any]]) -> list[int]:
    """The id of every parameter in optimizer order: from its name if known, else its position.

    Raises:
        ValueError: two parameters have the same id.
    """
    ids: list[int] = []
    for group in param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name in names:
            ids.append(len(ids) if name is None else parameter_id(name))
    if len(set(ids)) != len(ids):
        raise ValueError("zo_fused: two parameters have the same name, so their noise would agree")
    return ids


def _refuse_unsupported(p: Tensor, label: str) -> None:
    if p.device.type == "meta":
        raise ValueError(
            f"zo_fused: {label} is on the meta device (offloaded or not loaded); "
            "load the model completely first"
        )
    if type(p).__name__ == "DTensor":
        raise NotImplementedError(
            f"zo_fused: {label} is a DTensor; sharded parameters are not supported yet"
        )
    if p.dtype not in _ops.WEIGHT_DTYPES:
        raise TypeError(
            f"zo_fused: {label} has dtype {p.dtype}; supported are float16, bfloat16 and float32. "
            "Set requires_grad=False on parameters that must not be tuned."
        )


def make_buckets(param_groups: list[dict[str, Any]], trainable: set[int] | None) -> list[Bucket]:
    """One bucket per device, of the parameters that require gradients.

    Args:
        param_groups: of a `torch.optim.Optimizer`.
        trainable: positions to take instead of those with ``requires_grad`` (for replay).

    A tensor that appears twice (tied weights under two names) is taken once, by its first name.
    """
    buckets: dict[torch.device, Bucket] = {}
    seen: set[tuple[Any, ...]] = set()
    ids = parameter_ids(param_groups)
    position = -1
    for group_number, group in enumerate(param_groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            position += 1
            chosen = p.requires_grad if trainable is None else position in trainable
            memory = (p.device, p.data_ptr(), tuple(p.shape), tuple(p.stride()))
            if not chosen or p.numel() == 0 or memory in seen:
                continue
            _refuse_unsupported(p, f"parameter {names[i] if names else position!r}")
            seen.add(memory)
            bucket = buckets.setdefault(p.device, Bucket(p.device))
            bucket.params.append(p)
            bucket.group.append(group_number)
            bucket.id_list.append(ids[position])
    for bucket in buckets.values():
        bucket.ids = int64_tensor(bucket.id_list)
        bucket.offsets = torch.zeros_like(bucket.ids)
        bucket.group_index = torch.tensor(bucket.group, device=bucket.device)
    return list(buckets.values())
