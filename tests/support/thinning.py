"""Which combinations of a method and of a test's other parameters run.

A test of every method that has parameters of its own (a dtype, a place to stop) would run their
product with some 150 variants. Instead a method meets every value of each parameter, and a variant
of it one, in turn: a value meets many variants, and what a variant meets never changes when a
method is added.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable

import pytest
from support.methods import METHODS, Case

_FIRST = {row.optimizer: name for name, row in reversed(METHODS.items())}


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    groups: dict[Hashable, list[tuple[dict[str, int], pytest.Item]]] = {}
    for item in items:
        called = getattr(item, "callspec", None)
        if called is None:
            continue
        for name, value in called.params.items():
            if isinstance(value, Case):
                others = {key: index for key, index in called.indices.items() if key != name}
                groups.setdefault((item.function, value), []).append((others, item))  # type: ignore[attr-defined]
    dropped: set[pytest.Item] = set()
    for (_, case), alike in groups.items():  # type: ignore[misc]
        dropped |= {item for _, item in alike} - _taken(case, alike)
    return dropped


def _taken(case: Case, alike: list[tuple[dict[str, int], pytest.Item]]) -> set[pytest.Item]:
    axes = {key: sorted({indices[key] for indices, _ in alike}) for key in alike[0][0]}
    rounds = max(map(len, axes.values()), default=1) if _FIRST[case.optimizer] == case.name else 1
    taken = set()
    for number in range(rounds):
        wanted = {
            key: values[(number + zlib.crc32(f"{case} {key}".encode())) % len(values)]
            for key, values in axes.items()
        }
        # Where a test has no such combination, the nearest one.
        _, item = max(alike, key=lambda one: sum(one[0][key] == wanted[key] for key in wanted))
        taken.add(item)
    return taken
