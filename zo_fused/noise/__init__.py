"""The noise itself: keys of streams, ids of parameters, and the values that they name.

The contract is in docs/noise.md. Names load on first use, as those of `zo_fused`: the values come
from a backend, which the names of streams know nothing of.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zo_fused.noise.streams import CONTRACT_VERSION, Purpose, derive_key, parameter_id
    from zo_fused.sweeps.inspection import normal, random_bits

_HOME = {
    "CONTRACT_VERSION": "zo_fused.noise.streams",
    "Purpose": "zo_fused.noise.streams",
    "derive_key": "zo_fused.noise.streams",
    "normal": "zo_fused.sweeps.inspection",
    "parameter_id": "zo_fused.noise.streams",
    "random_bits": "zo_fused.sweeps.inspection",
}

__all__ = [
    "CONTRACT_VERSION",
    "Purpose",
    "derive_key",
    "normal",
    "parameter_id",
    "random_bits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zo_fused.noise' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
