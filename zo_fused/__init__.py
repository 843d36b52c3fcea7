"""Fused zeroth-order fine-tuning: forward passes only, inference memory, replayable noise.

Names load on first use (PEP 562): ``import zo_fused`` needs torch and NumPy alone.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

_HOME = {
    "ForwardGrad": "zo_fused.optim.forward_grad",
    "Hybrid": "zo_fused.optim.hybrid",
    "LOZO": "zo_fused.optim.lozo",
    "MeZO": "zo_fused.optim.mezo",
    "ZOAdam": "zo_fused.optim.adam",
    "ZOConservative": "zo_fused.optim.conservative",
    "ZOSignSGD": "zo_fused.optim.sign",
    "backend_of": "zo_fused.dispatch",
    "first_layers": "zo_fused.layers",
    "layer_blocks": "zo_fused.layers",
    "lowrank_momentum_": "zo_fused.ops",
    "lowrank_perturb_": "zo_fused.ops",
    "lowrank_update_": "zo_fused.ops",
    "moments_update_": "zo_fused.ops",
    "perturb_": "zo_fused.ops",
    "replay": "zo_fused.rebuild",
    "set_backend": "zo_fused.dispatch",
    "update_": "zo_fused.ops",
}
_MODULES = ("noise",)

__all__ = ["__version__", *_HOME, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"zo_fused.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'zo_fused' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
