"""Trainers of transformers and TRL that take zeroth-order steps (docs/trainer.md).

Names load on first use: `ZOTrainer` needs transformers, `ZOSFTTrainer` TRL as well.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see
    from zo_fused.hf.convert import zeroth_order as zeroth_order
    from zo_fused.hf.mixin import ZOMixin as ZOMixin
    from zo_fused.hf.sft import ZOSFTTrainer as ZOSFTTrainer
    from zo_fused.hf.trainer import ZOTrainer as ZOTrainer

_HOME = {
    "ZOMixin": "zo_fused.hf.mixin",
    "ZOSFTTrainer": "zo_fused.hf.sft",
    "ZOTrainer": "zo_fused.hf.trainer",
    "zeroth_order": "zo_fused.hf.convert",
}
__all__ = ["ZOMixin", "ZOSFTTrainer", "ZOTrainer", "zeroth_order"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zo_fused.hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
