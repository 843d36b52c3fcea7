"""Which backend serves which device.

A backend that was asked for works or raises its reason; one chosen automatically is visible
through `backend_of` and ``zo-fused doctor``, and where only the slow reference is left a warning
says why. A new backend is a module in ``zo_fused/sweeps/backends`` and a name here.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType

import torch

from zo_fused import _env

BACKENDS = ("reference", "cpu", "cuda", "triton")
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

_forced: str | None = _env.forced_backend()
_said: set[str] = set()  # warnings, so that none comes twice in a process


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
    folder = "zo_fused.sweeps" if name == "reference" else "zo_fused.sweeps.backends"
    return importlib.import_module(f"{folder}.{name}")


def why_not(name: str, device_type: str) -> str | None:
    """None if the backend serves the device type, else the reason in one sentence."""
    return load(name).why_not(device_type)


def why_slow(device_type: str) -> str | None:
    """Why nothing faster than the reference serves the device type, with the cures; None if
    something does, or nothing could."""
    reasons = []
    for name in _PREFERENCE.get(device_type, ()):
        if name == "reference":
            break
        reason = why_not(name, device_type)
        if reason is None:
            return None
        reasons.append(reason)
    return ". Or: ".join(reasons) or None


def doubt(name: str) -> str | None:
    """What may go wrong with a backend although it serves, in one sentence."""
    find = getattr(load(name), "doubt", None)
    return None if find is None else find()


def _warn(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def _chosen(name: str, device_type: str) -> ModuleType:
    """The backend's module, after a warning if there is a reason for one."""
    slow = why_slow(device_type) if name == "reference" and _forced is None else None
    if slow is not None:
        _warn(
            f"the slow reference serves {device_type!r} tensors: {slow}. "
            'ZO_FUSED_BACKEND=reference or zo_fused.set_backend("reference") chooses it silently'
        )
    doubtful = doubt(name)
    if doubtful is not None:
        _warn(doubtful)
    return load(name)


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
            return _chosen(name, device_type)
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend for {device_type!r} tensors. " + "; ".join(reasons))


def backend_of(device: torch.device | str | torch.Tensor) -> str:
    """Name of the backend that serves a tensor or device, e.g. ``"cpu"``."""
    if isinstance(device, torch.Tensor):
        device = device.device
    return select(torch.device(device).type).__name__.rpartition(".")[2]
