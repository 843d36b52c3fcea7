"""Which combinations of a method and of a test's other parameters run, and when.

A test of every method that has parameters of its own (a dtype, a place to stop) would run their
product with some 150 variants. Instead a method meets every value of each parameter, and a variant
of it one, in turn: a value meets many variants, and what a variant meets never changes when a
method is added. In `make test` a test meets a third of the variants, the others in `make test-all`.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable
from types import SimpleNamespace

import pytest
from support.methods import METHODS, Case

_NONE = SimpleNamespace(params={})  # of a test without parameters
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


def for_later(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Variants whose turn it is not."""
    return {
        item
        for item in items
        for value in getattr(item, "callspec", _NONE).params.values()
        if isinstance(value, Case) and not _is_first(value) and _turn(item, value) % 3
    }


def _is_first(case: Case) -> bool:
    return _FIRST[case.optimizer] == case.name


def _turn(item: pytest.Item, case: Case) -> int:
    return _crc(f"{case} {item.originalname}")  # type: ignore[attr-defined]


def _crc(text: str) -> int:
    return zlib.crc32(text.encode())


def _taken(case: Case, alike: list[tuple[dict[str, int], pytest.Item]]) -> set[pytest.Item]:
    axes = {key: sorted({indices[key] for indices, _ in alike}) for key in alike[0][0]}
    rounds = max(map(len, axes.values()), default=1) if _is_first(case) else 1
    taken = set()
    for number in range(rounds):
        wanted = {
            key: values[(number + _crc(f"{case} {key}")) % len(values)]
            for key, values in axes.items()
        }
        # Where a test has no such combination, the nearest one.
        _, item = max(alike, key=lambda one: sum(one[0][key] == wanted[key] for key in wanted))
        taken.add(item)
    return taken
