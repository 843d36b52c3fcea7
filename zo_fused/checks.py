"""What users give: numbers, switches, choices.

What can be meant in one way only becomes a number of Python's: NumPy's numbers, 0-d arrays, tensors
of one element, `decimal.Decimal`, `fractions.Fraction`. Everything else is refused by its name;
text that looks like a number, too: YAML reads ``1e-3`` as text, and what else it made of the file
is for its reader to see.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).tiny)  # the smallest with all its digits


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
    return bounded(name, value, "finite in float32", lambda x: abs(x) <= FLOAT32_MAX)


def bounded(name: str, value: Any, bound: str, holds: Callable[[float], bool]) -> float:
    """A number for which something holds, which `bound` says in words.

    Raises:
        TypeError: as `number`.
        ValueError: it does not hold.
    """
    plain = number(name, value)
    if not holds(plain):  # NaN never does
        raise ValueError(f"{name} must be {bound}, got {value}")
    return plain


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


@lru_cache(maxsize=256)  # groups are checked again whenever a scheduler changes a number
def meant(key: Any, names: tuple[str, ...]) -> str | None:
    """The name that a key is a misspelling of."""
    near = get_close_matches(key, names, n=1, cutoff=0.85) if isinstance(key, str) else []
    return near[0] if near else None
