"""A long run grows neither in memory nor in open files, and its steps take no longer."""

from __future__ import annotations

import sys

import pytest

from bench.cpu.long_run import METHODS, PARTS, Part, Run, apart


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_long_run_does_not_grow(method: str) -> None:
    made = apart(method, steps=3000)
    assert len(made.parts) == PARTS
    assert len({part.files for part in made.parts}) == 1
    assert made.growth < 2**20  # 2250 steps that keep 500 bytes each would be seen
    assert made.slowdown < 1.5
    assert made.log < 150_000  # of 20,000 steps: 1 MB


def test_growth_is_seen() -> None:
    made = Run([Part(1e-3 * (1 + i / PARTS), i << 20, 3) for i in range(PARTS)], 0)
    assert made.growth == 14 << 20
    assert made.slowdown == pytest.approx((1 + 15.5 / PARTS) / (1 + 8 / PARTS), rel=0.05)
