"""Long matrices: every pair of values in every run, every combination in `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch


def combinations(**axes: Iterable[Any]) -> list[tuple[tuple[Any, ...], bool]]:
    """All combinations of the axes' values, and of each whether it is among the few that let every
    two values of different axes meet."""
    lists = [list(values) for values in axes.values()]
    found = list(itertools.product(*(range(len(values)) for values in lists)))
    few = min(2, len(lists))
    pairs = {c: set(itertools.combinations(enumerate(c), few)) for c in found}
    missing, needed = set().union(*pairs.values()), set()
    while missing:  # greedy, and the first of the best: the same set in every process
        best = max(found, key=lambda c: len(pairs[c] & missing))
        needed.add(best)
        missing -= pairs[best]
    return [(tuple(v[i] for v, i in zip(lists, c, strict=True)), c in needed) for c in found]


def covering(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes over all combinations of the axes' values. Those that aren't needed for every
    two values of different axes to meet are marked `slow`."""
    cases = [
        pytest.param(
            *values, marks=() if needed else pytest.mark.slow, id="-".join(map(name_of, values))
        )
        for values, needed in combinations(**axes)
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
