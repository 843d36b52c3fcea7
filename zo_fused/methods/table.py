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

Made = TypeVar("Made", bound=type[ZerothOrderOptimizer])


@dataclass(frozen=True)
class Recipe:
    """A name under which the command line offers a method.

    Args:
        name: of `zo-fused finetune --method`.
        title: as papers write it.
        options: arguments whose defaults are others than the method's own.
        schedule: the default there, where these options exclude the method's own.
    """

    name: str
    title: str
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str | None = None


METHODS: dict[str, type[ZerothOrderOptimizer]] = {}
RECIPES: dict[str, tuple[type[ZerothOrderOptimizer], Recipe]] = {}


def method(*recipes: Recipe) -> Callable[[Made], Made]:
    """Decorates the class of a method: `zo_fused` and replays find it by its name, the command line
    by those of its recipes, if it has any.

    Raises:
        TypeError: a recipe has an option that is no argument, or a subclass of a method has an
            argument that the method does not record in logs.
        ValueError: there is another method of that name.
    """

    def register(made: Made) -> Made:
        _check_new(made.__name__, METHODS.get(made.__name__, made), made)
        _check_arguments(made)
        takes = arguments(made)
        for recipe in recipes:
            _check_new(recipe.name, RECIPES.get(recipe.name, (made, recipe))[0], made)
            for option in recipe.options:
                if option not in takes:
                    raise TypeError(f"{recipe.name}: {made.__name__} has no argument {option!r}")
        METHODS[made.__name__] = made
        RECIPES.update({recipe.name: (made, recipe) for recipe in recipes})
        return made

    return register


def _check_new(name: str, known: type, made: type) -> None:
    """A module may run again, but no name stands for two methods."""
    if (known.__module__, known.__qualname__) != (made.__module__, made.__qualname__):
        raise ValueError(f"there is a method {name} in {known.__module__} already")


def _check_arguments(made: type[ZerothOrderOptimizer]) -> None:
    """What a method inherits from another records the arguments of that one alone."""
    parent = next((kind for kind in made.__mro__[1:] if kind in METHODS.values()), None)
    if parent is None:
        return
    for name in arguments(made):
        if name not in arguments(parent):
            raise TypeError(
                f"{made.__name__} has the argument {name!r}, which {parent.__name__} would not "
                "record in replay logs: derive it from ZerothOrderOptimizer"
            )


@cache
def _import_all() -> None:
    package = importlib.import_module("zo_fused.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"zo_fused.methods.{module.name}")


def arguments(made: type[ZerothOrderOptimizer]) -> dict[str, Any]:
    """Names and defaults of what a method takes besides what to tune."""
    _, *others = inspect.signature(made).parameters.values()
    return {p.name: p.default for p in others if p.kind is not p.VAR_POSITIONAL}


def methods() -> Mapping[str, type[ZerothOrderOptimizer]]:
    """Every method, by the name of its class."""
    _import_all()
    return METHODS


def recipes() -> Mapping[str, tuple[type[ZerothOrderOptimizer], Recipe]]:
    """What the command line offers, by name."""
    _import_all()
    return dict(sorted(RECIPES.items()))
