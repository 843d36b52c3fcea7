"""Param groups in which one-dimensional parameters have hyper-parameters of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_fused.step.hyper import hyper


def vectors_apart(params: Any, **own: Any) -> Any:
    """Params as groups of matrices and groups of vectors, the latter with what `own` has that is
    not None; params as they are where there is nothing. A group of one kind stays one group, so
    groups that were split come out the same.

    Args:
        params: a module's named_parameters() or parameters(), or param groups.
        own: such as ``lr=1e-7``, which methods have as ``vector_lr``.

    Raises:
        TypeError, ValueError: one is not what it should be.
    """
    own = {
        name: hyper(name, value, f"vector_{name}")
        for name, value in own.items()
        if value is not None
    }
    if not own:
        return params
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    made = []
    for group in groups:
        taken = group["params"]
        given = [taken] if isinstance(taken, Tensor) else list(taken)
        matrices = [entry for entry in given if _tensor(entry).dim() >= 2]
        vectors = [entry for entry in given if _tensor(entry).dim() < 2]
        if matrices:
            made.append({**group, "params": matrices})
        if vectors:
            made.append({**group, "params": vectors, **own})
    return made


def _tensor(entry: Any) -> Tensor:
    """Of a parameter, or its name and itself."""
    tensor: Tensor = entry[1] if isinstance(entry, tuple) else entry
    return tensor
