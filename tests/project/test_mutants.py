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

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# The names only: importing the plugin here would pull its package into this process.
PLUGIN = Path(__file__).with_name("mutants.py")
MUTANTS = re.findall(r'^    "([^"]+)": ', PLUGIN.read_text(), re.MULTILINE)
# The fault lies above the backends, so the fastest will do.
BACKEND = zo_fused.backend_of("cpu")
# The tests that must fail; the others see none of these.
SUITES = {
    "a script rounds once": ["replaying/test_fused_replay.py"],
    "waiting sweeps lost": ["replaying/test_fused_replay.py"],
    "one key for all queries": ["step/test_queries.py"],
    "only the last query counts": ["step/test_queries.py"],
    "all blocks move": ["step/test_queries.py"],
}
USUAL = ["sweeps/test_ops.py", "step/test_optim.py", "noise/test_noise.py"]
OTHERS = sorted(set(dispatch.BACKENDS) - {BACKEND})


def run_suite(mutant: str | None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(PLUGIN.parent),
        "ZO_FUSED_BACKEND": BACKEND,
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("ZO_FUSED_MUTANT", None)
    if mutant is not None:
        environment["ZO_FUSED_MUTANT"] = mutant
    suites = SUITES.get(mutant or "", USUAL)
    command = [
        str(Path(sys.executable).with_name("pytest")),
        *("-q", "-x", "-p", "mutants", "-p", "no:cacheprovider", "--no-header"),
        *("-m", "not slow and not gpu"),
        *("-k", f"not ({' or '.join(OTHERS)} or opcheck or compiles)"),
        *(str(TESTS / suite) for suite in suites),
    ]
    return subprocess.run(
        command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300
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
