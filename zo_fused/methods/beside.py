"""What methods with a mode "factored" have in common: their arguments, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from zo_fused.checks import choice, switch
from zo_fused.step.hyper import hyper
from zo_fused.sweeps.shards import is_sharded

MODES = ("inplace", "factored")
MANY = 32  # columns from which a sweep is no longer bound by memory (docs/performance.md)


def mode_of(
    mode: str | None, rank: int, params: Any, module: nn.Module | None, common: Mapping[str, Any]
) -> str:
    """The mode that a method takes if none is given: "factored" for `MANY` columns or more, where
    the model is known and not sharded, and the schedule has no sweeps within a window, else
    "inplace"."""
    if mode is not None:
        return mode
    model = params if isinstance(params, nn.Module) else module
    free = not (common.get("deferred") or common.get("block_order"))
    if model is None or not free or any(map(is_sharded, model.parameters())):
        return "inplace"
    return "factored" if hyper("rank", rank) >= MANY else "inplace"


def evaluated_module(
    method: str,
    params: Any,
    module: nn.Module | None,
    mode: str,
    paired: bool,
    common: Mapping[str, Any],
) -> nn.Module | None:
    """The model whose forward pass takes part in mode "factored"; None: the mode is "inplace".

    Raises:
        TypeError, ValueError: arguments don't go together.
    """
    choice("mode", mode, MODES)
    if mode == "inplace":
        if switch("paired", paired):
            raise ValueError('paired needs mode="factored": weights have one sign at a time')
        return None
    for name in ("deferred", "block_order"):
        if common.get(name):
            raise ValueError(f'{name} is for mode="inplace": factored steps make no sweeps')
    if switch("paired", paired) and common.get("one_sided"):
        raise ValueError("paired evaluates both signs at once, one_sided only one of them")
    evaluated = params if isinstance(params, nn.Module) else module
    if evaluated is None:
        raise ValueError(
            'mode="factored" needs the module whose forward pass takes part: '
            f"{method}(model, ...), or module=model beside param groups"
        )
    return evaluated


BETAS, ADAM_EPS = (0.9, 0.999), 1e-8


def adam_of(moments: str | None, betas: tuple[float, float], adam_eps: float) -> dict[str, Any]:
    """The hyper-parameters of moments "adam"; none without.

    Raises:
        ValueError: `moments` is something else, or there are none for the others.
    """
    if moments is not None:
        choice("moments", moments, ("adam",))
        return {"betas": betas, "adam_eps": adam_eps}
    if betas not in (BETAS, [*BETAS]):
        raise ValueError('betas is for moments="adam"')
    if adam_eps != ADAM_EPS:
        raise ValueError('adam_eps is for moments="adam"')
    return {}


def rounding_of(rounding: str | None, mode: str) -> str:
    """Beside the weights, nothing else would keep updates below a 16-bit weight's last place."""
    if rounding is None:
        return "stochastic" if mode == "factored" else "nearest"
    return rounding
