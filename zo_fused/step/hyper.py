"""The hyper-parameters of param groups: what each must be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, MutableMapping
from functools import partial
from typing import Any

from torch import Tensor

from zo_fused.checks import FLOAT32_MAX, FLOAT32_TINY, bounded, choice, meant, whole
from zo_fused.recording import capturing

ROUNDINGS = ("nearest", "stochastic")


def _betas(name: str, value: Any) -> tuple[float, float]:
    two = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    if len(two) != 2:
        raise ValueError(f"{name} must be two numbers in [0, 1), got {value!r}")
    first, second = (_FRACTION(f"{name}[{i}]", beta) for i, beta in enumerate(two))
    return first, second


_NOT_NEGATIVE = partial(
    bounded, bound="a finite number >= 0", holds=lambda x: 0 <= x <= FLOAT32_MAX
)


def _lr(name: str, value: Any) -> Any:
    """A tensor stays one: steps follow it without asking the host."""
    if isinstance(value, Tensor):
        if not capturing():  # a host that looked would end the capture
            _NOT_NEGATIVE(name, value)
        return value
    return _NOT_NEGATIVE(name, value)


_POSITIVE = partial(  # twice a radius is still a number
    bounded,
    bound=f"a finite number > 0 that does not underflow in float32 (at least {FLOAT32_TINY:.3g})",
    holds=lambda x: FLOAT32_TINY <= x <= FLOAT32_MAX / 2,
)


_FRACTION = partial(bounded, bound="a number in [0, 1)", holds=lambda x: 0 <= x < 1)


# Of all methods. A new one may have others, which its `_check_group` looks at.
_HYPER: dict[str, Callable[[str, Any], Any]] = {
    "lr": _lr,
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "momentum": _FRACTION,
    "dampening": _FRACTION,
    "betas": _betas,
    "adam_eps": _POSITIVE,
    "hessian_smooth": _FRACTION,
    "rank": partial(whole, low=1, bits=31),
    "interval": partial(whole, low=1, bits=63),
    "block": whole,
    "rounding": partial(choice, choices=ROUNDINGS),
}


def hyper(name: str, value: Any, said: str | None = None) -> Any:
    """A hyper-parameter as it is kept in groups.

    Args:
        said: how errors name it, if not by its name.

    Raises:
        TypeError, ValueError: it is not what it should be.
    """
    return _HYPER[name](said or name, value) if name in _HYPER else value


def names_of(defaults: Collection[str]) -> list[str]:
    """Those that are hyper-parameters."""
    return [name for name in defaults if name in _HYPER]


# Without effect in a group whose method does not use it; groups of earlier versions have them.
_UNUSED = {"momentum": 0.0, "eps": 1.0, "weight_decay": 0.0, "rounding": "nearest"}


def check_group(method: str, group: MutableMapping[str, Any], defaults: Collection[str]) -> None:
    """Convert and check the hyper-parameters of a param group, in place.

    Other keys are the user's, or a scheduler's; but for what another method has as a
    hyper-parameter, or what is one misspelt: that would be without effect.

    Raises:
        TypeError, ValueError: one is not what it should be, is missing, or is none of the method.
    """
    own = names_of(defaults)
    for name, value in _UNUSED.items():
        if name in group and name not in defaults and group[name] == value:
            del group[name]
    if "momentum" not in group and "dampening" not in defaults:
        group.pop("dampening", None)
    for name in own:
        if name not in group:
            raise ValueError(f"a param group has no {name}, which {method} needs")
        group[name] = hyper(name, group[name])
    for key in group.keys() - defaults:
        if key in _HYPER:
            made = f"this {method} was made without" if key == "momentum" else f"{method} has none"
            raise ValueError(f"a param group has {key}, but {made}")
        if near := meant(key, tuple(own)):
            raise ValueError(f"a param group has {key!r}: did you mean {near!r}?")
