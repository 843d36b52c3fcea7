"""What users give: numbers, switches, choices, hyper-parameters of groups. Floor 0.

What can be meant in one way only becomes a number of Python's: NumPy's numbers, 0-d arrays, tensors
of one element, `decimal.Decimal`, `fractions.Fraction`. Everything else is refused by its name;
text that looks like a number, too: YAML reads ``1e-3`` as text, and what else it made of the file
is for its reader to see.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, MutableMapping
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache, partial
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from zo_fused.generators import capturing

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # the smallest with all its digits

ROUNDINGS = ("nearest", "stochastic")


# ---- one argument -------------------------------------------------------------------------------


def number(name: str, value: Any) -> float:
    """A real number.

    Raises:
        TypeError: it is none, or several.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and (value.numel() != 1 or value.device.type == "meta"):
        where = " on the meta device" if value.device.type == "meta" else ""
        raise TypeError(f"{name} must be one number, got a tensor {tuple(value.shape)}{where}")
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"{name} must be one number, got an array {value.shape}")
    plain = value.item() if isinstance(value, Tensor | np.ndarray) else value
    if isinstance(plain, bool | np.bool_) or not isinstance(plain, Real | Decimal):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(plain)
    except (OverflowError, ValueError):  # 10**400, Decimal("sNaN")
        return math.nan


def finite(name: str, value: Any) -> float:
    """A number that float32 can hold.

    Raises:
        TypeError: as `number`.
        ValueError: it is not finite, or not in float32.
    """
    return _bounded(name, value, "finite in float32", lambda x: abs(x) <= FLOAT32_MAX)


def _bounded(
    name: str, value: Any, bound: str, holds: Callable[[float], bool], tensors: bool = False
) -> Any:
    """A number within bounds; where `tensors` may stay, one that is a tensor stays one."""
    if tensors and isinstance(value, Tensor) and capturing():
        return value  # a host that looked would end the capture
    plain = number(name, value)
    if not holds(plain):  # NaN never does
        raise ValueError(f"{name} must be {bound}, got {value}")
    return value if tensors and isinstance(value, Tensor) else plain


def whole(name: str, value: Any, low: int | None = None, bits: int | None = None) -> int:
    """A whole number of an integral type, ``low <= value < 2**bits``.

    Raises:
        ValueError: it is none, or out of range.
    """
    truth = isinstance(value, bool | np.bool_)
    truth = truth or (isinstance(value, Tensor | np.ndarray) and "bool" in str(value.dtype))
    try:
        plain = None if truth else operator.index(value)
    except TypeError:
        plain = None
    inside = plain is not None and (low is None or low <= plain)
    if plain is None or not inside or (bits is not None and plain >> bits):
        bound = "" if low is None else f" >= {low}" if bits is None else f" in [{low}, 2**{bits})"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r}")
    return plain


def switch(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        TypeError: it is something else, such as 1 or "no".
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of some words.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")
    return str(value)


# ---- hyper-parameters of groups -----------------------------------------------------------------


def _betas(name: str, value: Any) -> tuple[float, float]:
    two = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    if len(two) != 2:
        raise ValueError(f"{name} must be two numbers in [0, 1), got {value!r}")
    first, second = (_FRACTION(f"{name}[{i}]", beta) for i, beta in enumerate(two))
    return first, second


_NOT_NEGATIVE = partial(
    _bounded, bound="a finite number >= 0", holds=lambda x: 0 <= x <= FLOAT32_MAX
)
_POSITIVE = partial(  # twice a radius is still a number
    _bounded,
    bound=f"a finite number > 0 that does not underflow in float32 (at least {FLOAT32_TINY:.3g})",
    holds=lambda x: FLOAT32_TINY <= x <= FLOAT32_MAX / 2,
)
_FRACTION = partial(_bounded, bound="a number in [0, 1)", holds=lambda x: 0 <= x < 1)

# Of all methods. A new one may have others, which its `_check_group` looks at.
_HYPER: dict[str, Callable[[str, Any], Any]] = {
    "lr": partial(_NOT_NEGATIVE, tensors=True),
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "momentum": _FRACTION,
    "dampening": _FRACTION,
    "betas": _betas,
    "adam_eps": _POSITIVE,
    "rank": partial(whole, low=1),
    "interval": partial(whole, low=1),
    "block": whole,
    "rounding": partial(choice, choices=ROUNDINGS),
}


def hyper(name: str, value: Any) -> Any:
    """A hyper-parameter as it is kept in groups.

    Raises:
        TypeError, ValueError: it is not what it should be.
    """
    return _HYPER[name](name, value) if name in _HYPER else value


def names_of(defaults: Collection[str]) -> list[str]:
    """Those that are hyper-parameters."""
    return [name for name in defaults if name in _HYPER]


# Without effect in a group whose method does not use it; groups of earlier versions have them.
_UNUSED = {"momentum": 0.0, "eps": 1.0, "weight_decay": 0.0, "rounding": "nearest"}


@lru_cache(maxsize=256)  # groups are checked again whenever a scheduler changes a number
def _meant(key: Any, names: tuple[str, ...]) -> str | None:
    """The name that a key is a misspelling of."""
    near = get_close_matches(key, names, n=1, cutoff=0.85) if isinstance(key, str) else []
    return near[0] if near else None


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
        if meant := _meant(key, tuple(own)):
            raise ValueError(f"a param group has {key!r}: did you mean {meant!r}?")
