"""What an option of ``zo-fused finetune`` is if it is not given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zo_fused.cli.method_options import QUANTIZERS as QUANTIZERS
from zo_fused.cli.method_options import by_method, in_place

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
    "data_seed": 0,
    "peft": None,  # all weights
    "trust_remote_code": False,
    "max_length": None,  # as many tokens as the model takes
}

# The embedded model is tiny, so it bears far larger steps than a real one, and sweeps over its
# weights cost less than what a factored step adds to every layer. Rates: bench/training.
EMBEDDED_COMMON: dict[str, Any] = {"steps": 600, "eval_steps": 50}
EMBEDDED_BY_METHOD: dict[str, dict[str, Any]] = {
    "mezo": {"lr": 3e-5},
    "mezo-m": {"lr": 1e-5},
    "mezo-gv": {"lr": 1e-4},
    "mezo-greedy": {"lr": 3e-5},
    "lozo": {"lr": 3e-5, "schedule": "deferred"},
    "lozo-m": {"lr": 3e-5, "schedule": "deferred"},
    "agzo": {"lr": 3e-5, "rank": 1, "schedule": "deferred"},
    "zo-act": {"lr": 1e-4, "rank": 8, "schedule": "deferred"},
    "zo-adam": {"lr": 1e-4},
    "zo-sign": {"lr": 3e-4},
    "zo-conservative": {"lr": 1e-4},
    "forward-grad": {"lr": 1e-5},
    "kerzoo": {"lr": 3e-5},
    "es": {"lr": 3e-4, "population": 8, "steps": 150},  # 1200 forward passes, as the others
    "zo-muon": {"lr": 1e-3},
    "zo-mopi": {"lr": 1e-3},
    "p-gap": {"lr": 3e-5},
    "svd-0": {"lr": 3e-5},
    "tezo": {"lr": 3e-6, "schedule": "deferred"},
    "tezo-m": {"lr": 3e-6, "schedule": "deferred"},
    "tezo-adam": {"lr": 3e-4},
    "subzero": {"lr": 3e-5, "schedule": "deferred", "interval": 50},
    "subzero-adam": {"lr": 3e-4, "schedule": "deferred", "interval": 50},
    "conmezo": {"lr": 1e-4},
    "fzoo": {"lr": 1e-3},
    "loren": {"lr": 1e-4},
    "meazo": {"lr": 1e-4},
    "seezo": {"lr": 2e-3, "schedule": "deferred"},
    "sparse-mezo": {"lr": 1e-4},
    "hizoo": {"lr": 3e-5},
    "qzo": {"lr": 1e-7, "eps": 1e-4, "quantize": "int8"},
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
    table = COMMON | by_method()[method]
    if embedded:
        table |= EMBEDDED_COMMON | EMBEDDED_BY_METHOD.get(method, {})
    if peft is not None:
        own = BY_PEFT[peft]
        table |= {name: value for name, value in own.items() if name in table}
    if (peft is not None or one_sided) and table["schedule"] == "factored":
        table["schedule"] = in_place(method)
    if blocks:
        table["schedule"] = "plain"
    return table
