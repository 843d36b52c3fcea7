"""Evolution strategies on a Ray cluster (docs/scaling.md). Names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see
    from zo_fused.ray.driver import Driver as Driver

__all__ = ["Driver"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'zo_fused.ray' has no attribute {name!r}")
    return getattr(importlib.import_module("zo_fused.ray.driver"), name)


def __dir__() -> list[str]:
    return __all__
