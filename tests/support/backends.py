"""Backends that serve CPU tensors, for fixtures that run a test on each."""

from __future__ import annotations

import pytest

ON_THE_CPU = ("reference", "cpu", "triton")

# For a test that takes long in Triton's interpreter: there it runs with `make test-all` only.
slow_in_triton = pytest.mark.parametrize(
    "backend", ["reference", "cpu", pytest.param("triton", marks=pytest.mark.slow)], indirect=True
)
