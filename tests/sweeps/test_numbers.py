"""Enumerations of C++ headers and Triton kernels are those of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from zo_fused.sweeps import numbers
from zo_fused.sweeps.backends import table
from zo_fused.sweeps.signatures import CHOICES

CSRC = Path(__file__).parents[2] / "csrc"
DTYPES = [str(dtype).removeprefix("torch.") for dtype in numbers.WEIGHT_DTYPES]


def members(header: str, name: str) -> dict[str, int]:
    """An ``enum`` of a header: its names and numbers."""
    text = re.search(rf"enum (?:class )?{name} \{{([^}}]*)\}}", (CSRC / header).read_text())
    assert text is not None, f"{header} has no enum {name}"
    found: dict[str, int] = {}
    number = 0
    for member in text[1].split(","):
        label, _, value = member.partition("=")
        number = int(value) if value else number
        found[label.strip()] = number
        number += 1
    return found


@pytest.mark.parametrize(
    ("header", "name", "wanted"),
    [
        ("element.h", "Rule", numbers.RULES),
        ("element.h", "Transform", numbers.TRANSFORMS),
        ("cpu/sweeps.h", "Dtype", DTYPES),
        ("cuda/launch.h", "Dtype", DTYPES),
        ("cuda/launch.h", "First", numbers.FIRSTS),
    ],
)
def test_enumerations_of_headers(header: str, name: str, wanted: list[str]) -> None:
    assert members(header, name) == {word: number for number, word in enumerate(wanted)}


def test_a_cpu_has_the_first_transforms() -> None:
    """`NoiseSweeps` of csrc/cpu/sweeps.h are in their order."""
    assert numbers.TRANSFORMS[: len(numbers.EXACT)] == numbers.EXACT
    wanted = f"NoiseSweeps noise[{len(numbers.EXACT)}];"
    assert wanted in (CSRC / "cpu/sweeps.h").read_text()


def test_columns_of_tables_in_cuda() -> None:
    columns = [members("cuda/kernels.h", n) for n in ("Column", "NoiseColumn", "LowrankColumn")]
    found = {name: number for enum in columns for name, number in enum.items()}
    assert found.pop("table_width") == table.WIDTH
    names = {name.rstrip("_").upper(): number for name, number in found.items()}
    assert names == {name: getattr(table, name) for name in names}
    assert {"FIRST", "STATES", "V"} <= names.keys()


def test_columns_of_tables_in_triton() -> None:
    tl = pytest.importorskip("triton.language")
    from zo_fused_kernels import table as columns

    found = {n: x.value for n, x in vars(columns).items() if isinstance(x, tl.constexpr)}
    assert found == {name: getattr(table, name) for name in found}
    assert {"FIRST", "STATES", "V", "WIDTH"} <= found.keys()


def test_words_of_triton_kernels() -> None:
    """They compare words, and have names of their own for what GPUs of two makers do."""
    pytest.importorskip("triton")
    from zo_fused_kernels import launch, moments, normal

    names = {name.value for name in (normal.PORTABLE, normal.SIGNS, normal.HADAMARD)}
    assert names | {"fast"} == set(numbers.TRANSFORMS)
    text = Path(moments.__file__).read_text()
    assert set(re.findall(r'RULE == "(\w+)"', text)) | {"momentum"} == set(numbers.RULES)
    assert set(numbers.WEIGHT_DTYPES) == set(launch.DTYPES) - {torch.int64}


def test_no_word_has_two_numbers() -> None:
    words = [word for choices in CHOICES.values() for word in choices]
    assert len(numbers.NUMBER) == len(words)
    assert all(numbers.NUMBER[w] == c.index(w) for c in CHOICES.values() for w in c)
