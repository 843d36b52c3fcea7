"""Readers of files refuse what is damaged by the errors that they document, and change nothing.

`fuzz.py` looks for inputs with atheris (`make fuzz`); these tests need no more than Python.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from fuzzing.mutations import changed
from fuzzing.readers import FOUND, READERS

INPUTS = [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in FOUND.glob("*/*")]


@pytest.mark.parametrize("path", INPUTS)
def test_what_once_went_wrong(path: Path, tmp_path: Path) -> None:
    assert READERS[path.parent.name].once(path.read_bytes(), tmp_path) is None


@pytest.mark.parametrize("name", READERS)
def test_seeds_are_good(name: str, tmp_path: Path) -> None:
    """Else fuzzing would begin behind a closed door."""
    reader = READERS[name]
    first, *others = reader.seeds()
    assert reader.once(first, tmp_path) is not None
    for seed in others:
        reader.once(seed, tmp_path)


@pytest.mark.parametrize("amount", [25, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_files_with_a_change(name: str, amount: int, tmp_path: Path) -> None:
    rng, seeds = random.Random(name), READERS[name].seeds()
    for _ in range(amount):
        READERS[name].once(changed(rng.choice(seeds), rng), tmp_path)
