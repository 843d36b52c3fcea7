"""Which backend serves which device. Floor 3.

A backend that was asked for works or raises its reason; one chosen automatically is visible
through `backend_of` and ``zo-fused doctor``. A new backend is a module in ``zo_fused/backends``
and a name here.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from zo_fused import _env

BACKENDS = ("reference", "cpu", "cuda", "triton")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

_forced: str | None = _env.forced_backend()


def set_backend(name: str | None) -> str | None:
    """Serve every call with one backend, or choose automatically again (None).

    Returns the name that was in force before (None if automatic).

    Raises:
        ValueError: unknown name. Whether the backend serves a device is known only per call.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    previous, _forced = _forced, name
    select.cache_clear()
    return previous


def load(name: str) -> ModuleType:
    """The backend's module."""
    return importlib.import_module(f"zo_fused.backends.{name}")


def why_not(name: str, device_type: str) -> str | None:
    """None if the backend serves the device type, else the reason in one sentence."""
    return load(name).why_not(device_type)


@functools.lru_cache(maxsize=None)
def select(device_type: str) -> ModuleType:
    """The backend for a device type.

    Raises:
        ValueError: ``ZO_FUSED_BACKEND`` names no backend.
        RuntimeError: the forced backend, or every backend, can't serve the device.
    """
    if _forced is not None and _forced not in BACKENDS:
        raise ValueError(
            f"ZO_FUSED_BACKEND={_forced!r} is no backend; choose one of {', '.join(BACKENDS)}"
        )
    names = (_forced,) if _forced else _PREFERENCE.get(device_type, ("reference",))
    reasons = []
    for name in names:
        reason = why_not(name, device_type)
        if reason is None:
            return load(name)
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend for {device_type!r} tensors. " + "; ".join(reasons))


def backend_of(device: torch.device | str | torch.Tensor) -> str:
    """Name of the backend that serves a tensor or device, e.g. ``"cpu"``."""
    if isinstance(device, torch.Tensor):
        device = device.device
    return select(torch.device(device).type).__name__.rpartition(".")[2]
