"""Long matrices: every pair of values in every run, every combination in `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch


def covering(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes over all combinations of the axes' values. Those that aren't needed for every
    two values of different axes to meet are marked `slow`."""
    lists = [list(values) for values in axes.values()]
    combinations = list(itertools.product(*(range(len(values)) for values in lists)))
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in combinations}
    missing, needed = set().union(*pairs.values()), set()
    while missing:  # greedy, and the first of the best: the same set in every process
        best = max(combinations, key=lambda c: len(pairs[c] & missing))
        needed.add(best)
        missing -= pairs[best]
    cases = [
        pytest.param(
            *(values[i] for values, i in zip(lists, c, strict=True)),
            marks=() if c in needed else pytest.mark.slow,
            id="-".join(map(_name, (values[i] for values, i in zip(lists, c, strict=True)))),
        )
        for c in combinations
    ]
    return pytest.mark.parametrize(tuple(axes), cases)


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
