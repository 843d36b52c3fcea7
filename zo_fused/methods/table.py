"""The table of methods. Each file of this folder registers its own; a user's module may, too."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import STEP_DEFAULTS, StepOptions

Made = TypeVar("Made", bound=type[ZerothOrderOptimizer])


@dataclass(frozen=True)
class Recipe:
    """A name under which the command line offers a method.

    Args:
        name: of `zo-fused finetune --method`.
        title: as papers write it.
        options: those whose defaults are others than the method's own.
    """

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, type[ZerothOrderOptimizer]] = {}
RECIPES: dict[str, tuple[type[ZerothOrderOptimizer], Recipe]] = {}


def method(*recipes: Recipe) -> Callable[[Made], Made]:
    """Decorates the class of a method: `zo_fused` and replays find it by its name, the command line
    by those of its recipes, if it has any.

    Raises:
        ValueError: there is another method of that name.
    """

    def register(made: Made) -> Made:
        known = METHODS.get(made.__name__, made)
        if (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
            raise ValueError(f"there is a method {made.__name__} in {known.__module__} already")
        made.__signature__ = _expanded(inspect.signature(made))  # type: ignore[attr-defined]
        METHODS[made.__name__] = made
        RECIPES.update({recipe.name: (made, recipe) for recipe in recipes})
        return made

    return register


@cache
def _import_all() -> None:
    package = importlib.import_module("zo_fused.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"zo_fused.methods.{module.name}")


def methods() -> Mapping[str, type[ZerothOrderOptimizer]]:
    """Every method, by the name of its class."""
    _import_all()
    return METHODS


def recipes() -> Mapping[str, tuple[type[ZerothOrderOptimizer], Recipe]]:
    """What the command line offers, by name."""
    _import_all()
    return dict(sorted(RECIPES.items()))


def _expanded(signature: inspect.Signature) -> inspect.Signature:
    """With the keywords that all methods take, for help() and editors."""
    own = list(signature.parameters.values())
    if not own or own[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return signature
    common = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=STEP_DEFAULTS[name],
            annotation=annotation,
        )
        for name, annotation in StepOptions.__annotations__.items()
    ]
    return signature.replace(parameters=[*own[:-1], *common])
