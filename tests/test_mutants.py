"""Planted faults must turn the suite red: the kernel that does nothing, the wrong sign, ..."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zo_fused
from zo_fused.sweeps import dispatch

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow
# The names only: importing the plugin here would pull its package into this process.
MUTANTS = re.findall(r'^    "([^"]+)": ', (HERE / "mutants.py").read_text(), re.MULTILINE)
# The fault lies above the backends, so the fastest will do.
BACKEND = zo_fused.backend_of("cpu")
# The tests that must fail; the others see none of these.
SUITES = {
    "a script rounds once": ["fused_replay"],
    "waiting sweeps lost": ["fused_replay"],
    "one key for all queries": ["queries"],
    "only the last query counts": ["queries"],
    "all blocks move": ["queries"],
}
OTHERS = sorted(set(dispatch.BACKENDS) - {BACKEND})


def run_suite(mutant: str | None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "ZO_FUSED_BACKEND": BACKEND,
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("ZO_FUSED_MUTANT", None)
    if mutant is not None:
        environment["ZO_FUSED_MUTANT"] = mutant
    suites = SUITES.get(mutant or "", ["ops", "optim", "noise"])
    command = [
        str(Path(sys.executable).with_name("pytest")),
        *("-q", "-x", "-p", "mutants", "-p", "no:cacheprovider", "--no-header"),
        *("-m", "not slow and not gpu"),
        *("-k", f"not ({' or '.join(OTHERS)} or opcheck or compiles)"),
        *(str(HERE / f"test_{suite}.py") for suite in suites),
    ]
    return subprocess.run(
        command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=300
    )


def test_the_suite_is_green_without_a_mutant() -> None:
    result = run_suite(None)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_fails_the_suite(mutant: str) -> None:
    result = run_suite(mutant)
    assert result.returncode == 1, result.stdout + result.stderr  # 1: tests failed; not an error
    assert "1 failed" in result.stdout


def test_the_list_of_mutants_was_read() -> None:
    assert len(MUTANTS) >= 15
