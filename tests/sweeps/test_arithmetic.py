"""Roots, powers and sums with the same bits everywhere, and that no others are used."""

from __future__ import annotations

import ast
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zo_fused.sweeps.arithmetic import (
    BITS,
    power,
    powers,
    square_root,
    squares,
    sum_of_columns,
)

PACKAGE = Path(__file__).parents[2] / "zo_fused"
positive = {"allow_nan": False, "allow_infinity": False, "allow_subnormal": False}


@given(st.lists(st.floats(0, 1e300, **positive), min_size=1, max_size=40))
def test_roots_of_float64_are_correctly_rounded(values: list[float]) -> None:
    """Python's are those of the processor."""
    found = square_root(torch.tensor(values, dtype=torch.float64))
    assert found.tolist() == list(map(math.sqrt, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_root_is_nearer(dtype: torch.dtype) -> None:
    """In whole numbers: ``(r - ulp / 2)^2 < x < (r + ulp / 2)^2``. MKL has this wrong for 1.4 % of
    float64 and 20 % of float32."""
    x = torch.rand(3000, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 1e3
    for value, root in zip(x.tolist(), square_root(x).tolist(), strict=True):
        kind = np.float32 if dtype == torch.float32 else np.float64
        half = Fraction(float(np.spacing(kind(root)))) / 2
        below, above = Fraction(root) - half, Fraction(root) + half
        assert below * below < Fraction(value) < above * above


def test_roots_of_any_shape() -> None:
    for x in (torch.tensor(2.0).double(), torch.ones(0), torch.arange(6.0).view(2, 3).T):
        found = square_root(x)
        assert (found.shape, found.dtype) == (x.shape, x.dtype)
        assert torch.equal(found * found, x) or x.dim() == 0 or x.numel() == 6
    assert square_root(torch.tensor([-1.0, 4.0])).isnan().tolist() == [True, False]


@given(st.floats(0, 0.99999), st.integers(0, 2**BITS - 1))
def test_powers(base: float, exponent: int) -> None:
    """Each of the squarings doubles the error before it and adds 2^-53, and so do the products: of
    the exponent's size in all, and it is at most what is left of base."""
    close = pytest.approx(base**exponent, rel=2.0**-52 * (exponent + 1), abs=1e-300)
    assert power(base, exponent) == close
    assert power(0.5, exponent % 1000) == 0.5 ** (exponent % 1000)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(0, 2**BITS - 1))
def test_powers_on_a_device(bases: list[float], exponent: int) -> None:
    exponents = [exponent >> i for i in range(len(bases))]
    table = torch.tensor(list(map(squares, bases)), dtype=torch.float64).T
    found = powers(table, torch.tensor(exponents).double())
    assert found.tolist() == list(map(power, bases, exponents))


def test_powers_have_these_bits() -> None:
    """Single operations of IEEE 754, so of any device."""
    assert power(0.999, 1).hex() == (0.999).hex()
    assert power(0.999, 1000).hex() == "0x1.788526411edacp-2"
    assert power(0.9, 37).hex() == "0x1.4c31dc565706ep-6"


@given(st.lists(st.floats(-1e9, 1e9, **positive), min_size=1, max_size=20))
def test_sums_have_a_fixed_order(values: list[float]) -> None:
    """That of halves: adding zeros at the end changes nothing."""
    x = torch.tensor([values, values[::-1]], dtype=torch.float64)
    found = sum_of_columns(x)
    size = sum(map(abs, values))
    assert found.tolist() == pytest.approx([sum(values)] * 2, rel=0, abs=2.0**-48 * size)
    columns = [*values, *([0.0] * (2**5 - len(values)))]
    while len(columns) > 1:
        half = len(columns) // 2
        columns = [a + b for a, b in zip(columns[:half], columns[half:], strict=True)]
    assert found[0] == columns[0]


FOLDERS = ("noise", "sweeps", "step", "directions", "rules")
VARY = {"sqrt", "rsqrt", "pow", "exp", "log", "sin", "cos", "tanh", "norm", "addcmul_", "lerp_"}


def varying(path: Path) -> list[str]:
    """Calls of a method of tensors whose bits a library may choose, and roots as powers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node.func)
            if node.func.attr in VARY and called.partition(".")[0] not in ("math", "np"):
                found.append(f"{path.name}:{node.lineno}: {called}")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            powers_of_two = isinstance(node.left, ast.Constant)
            whole = ast.unparse(node.right).lstrip("-").isdigit()
            if not whole and not powers_of_two:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_else_has_roots_and_powers() -> None:
    paths = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]
    found = [line for path in paths if path.name != "arithmetic.py" for line in varying(path)]
    assert found == []
