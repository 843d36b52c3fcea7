"""What an option of ``zo-fused finetune`` is if it is not given: the only table of defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBEDDED_FOLDER = Path(__file__).parent.parent / "embedded"
EMBEDDED_MODEL = EMBEDDED_FOLDER / "model"
EMBEDDED_DATA = EMBEDDED_FOLDER / "data"

METHOD = "lozo"

COMMON: dict[str, Any] = {
    "steps": 20_000,
    "batch_size": 16,
    "micro_batch_size": None,  # the batch at once
    "eval_steps": 1000,
    "lr_scheduler": "constant",
    "loss": "classification",
    "dtype": "float32",
    "device": "auto",
    "seed": 0,
    "label_field": "label",
    "peft": None,  # all weights
    "trust_remote_code": False,
    "max_length": None,  # as many tokens as the model takes
}

# The options that a method takes are those that it has a default for.
_SWEEPS: dict[str, Any] = {
    "eps": 1e-3,
    "weight_decay": 0.0,
    "rounding": "nearest",
    "schedule": "deferred",
    "queries": 1,
    "one_sided": False,
    "blocks": None,
}
_DENSE: dict[str, Any] = {**_SWEEPS, "distribution": "gaussian"}
_LOZO: dict[str, Any] = {
    **_SWEEPS,
    "rounding": None,  # by schedule
    "schedule": "factored",
    "rank": 2,
    "interval": 50,
}
BY_METHOD: dict[str, dict[str, Any]] = {
    "mezo": {**_DENSE, "lr": 1e-6, "momentum": 0.0},
    "mezo-m": {**_DENSE, "lr": 1e-7, "momentum": 0.9},
    "lozo": {**_LOZO, "lr": 1e-6, "momentum": 0.0},
    "lozo-m": {**_LOZO, "lr": 1e-6, "momentum": 0.9},
    "zo-adam": {**_DENSE, "lr": 1e-5, "history": None},
    "zo-sign": {**_DENSE, "lr": 1e-6},
    "zo-conservative": {
        "lr": 1e-6,
        "eps": 1e-3,
        "schedule": "plain",
        "blocks": None,
        "distribution": "gaussian",
    },
    "forward-grad": {
        "lr": 1e-6,
        "weight_decay": 0.0,
        "rounding": "stochastic",
        "schedule": "plain",
        "queries": 1,
        "distribution": "gaussian",
    },
}

# The embedded model is tiny, so it bears far larger steps than a real one, and sweeps over its
# weights cost less than what a factored step adds to every layer. Rates: bench/learning_rates.py.
EMBEDDED_COMMON: dict[str, Any] = {"steps": 600, "eval_steps": 50}
EMBEDDED_BY_METHOD: dict[str, dict[str, Any]] = {
    "mezo": {"lr": 3e-5},
    "mezo-m": {"lr": 1e-5},
    "lozo": {"lr": 3e-5, "schedule": "deferred"},
    "lozo-m": {"lr": 3e-5, "schedule": "deferred"},
    "zo-adam": {"lr": 1e-4},
    "zo-sign": {"lr": 3e-4},
    "zo-conservative": {"lr": 1e-4},
    "forward-grad": {"lr": 1e-5},
}

# Adapters: MeZO's README; prompts: that of SubZero. Their matrices are too small for side paths
# to bring anything.
BY_PEFT: dict[str, dict[str, Any]] = {
    "lora": {"lr": 5e-5, "eps": 1e-2},
    "prefix": {"lr": 1e-2, "eps": 1e-1},
    "prompt": {"lr": 1e-3, "eps": 1e-2},
}


def defaults(
    method: str,
    embedded: bool,
    peft: str | None = None,
    blocks: bool = False,
    one_sided: bool = False,
) -> dict[str, Any]:
    """Every option's default for a method, on a user's model or on the embedded one.

    Args:
        peft: a key of `BY_PEFT`, or None.
        blocks, one_sided: whether these options were given: they are not for every schedule.
    """
    table = COMMON | BY_METHOD[method]
    if embedded:
        table |= EMBEDDED_COMMON | EMBEDDED_BY_METHOD[method]
    if peft is not None:
        own = BY_PEFT[peft]
        table |= {name: value for name, value in own.items() if name in table}
    if (peft is not None or one_sided) and table["schedule"] == "factored":
        table["schedule"] = "deferred"
    if blocks:
        table["schedule"] = "plain"
    return table
