"""Evolution strategies on a Ray cluster (docs/scaling.md). Ray is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see
    from zo_fused.ray.driver import Driver as Driver

__all__ = ["Driver"]


def __getattr__(name: str) -> Any:
    if name != "Driver":
        raise AttributeError(f"module 'zo_fused.ray' has no attribute {name!r}")
    from zo_fused.ray.driver import Driver

    return Driver


def __dir__() -> list[str]:
    return __all__
