"""What an option of ``zo-fused finetune`` is if it is not given: the only table of defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"
EMBEDDED_MODEL = EMBEDDED_FOLDER / "model"
EMBEDDED_DATA = EMBEDDED_FOLDER / "data"

METHOD = "lozo"

COMMON: dict[str, Any] = {
    "eps": 1e-3,
    "weight_decay": 0.0,
    "steps": 20_000,
    "batch_size": 16,
    "eval_steps": 1000,
    "lr_scheduler": "constant",
    "loss": "classification",
    "dtype": "float32",
    "device": "auto",
    "seed": 0,
    "label_field": "label",
}

BY_METHOD: dict[str, dict[str, Any]] = {
    "lozo": {
        "lr": 1e-6,
        "rank": 2,
        "interval": 50,
        "momentum": 0.0,
        "schedule": "factored",
        "rounding": None,  # by schedule
    },
    "mezo": {"lr": 1e-6, "schedule": "deferred", "rounding": "nearest"},
}

# The embedded model is tiny, so it bears far larger steps than a real one, and sweeps over its
# weights cost less than what a factored step adds to every layer.
EMBEDDED_COMMON: dict[str, Any] = {"steps": 600, "eval_steps": 50}
EMBEDDED_BY_METHOD: dict[str, dict[str, Any]] = {
    "lozo": {"lr": 3e-5, "schedule": "deferred"},
    "mezo": {"lr": 3e-5},
}


def defaults(method: str, embedded: bool) -> dict[str, Any]:
    """Every option's default for a method, on a user's model or on the embedded one."""
    table = COMMON | BY_METHOD[method]
    return table | EMBEDDED_COMMON | EMBEDDED_BY_METHOD[method] if embedded else table
