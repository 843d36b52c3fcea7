"""Planted faults must turn the suite red: the kernel that does nothing, the wrong sign, ..."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zo_fused
from zo_fused.sweeps import dispatch

TESTS = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# The names only: importing the plugin here would pull its package into this process.
PLUGIN = Path(__file__).with_name("mutants.py")
MUTANTS = re.findall(r'^    "([^"]+)": mutate|^    "([^"]+)": [a-z_]+,$', PLUGIN.read_text(), re.M)
MUTANTS = [first or second for first, second in MUTANTS]
# The fault lies above the backends, so the fastest will do.
BACKEND = zo_fused.backend_of("cpu")
OTHERS = sorted(set(dispatch.BACKENDS) - {BACKEND})
SUITES = (
    *("replaying/test_fused_replay.py", "step/test_queries.py"),
    *("sweeps/test_ops.py", "step/test_optim.py", "noise/test_noise.py"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """Of every fault: the number of tests there were, and the name of the one that failed."""
    found = tmp_path_factory.mktemp("mutants") / "found.jsonl"
    environment: dict[str, Any] = {
        **os.environ,
        "PYTHONPATH": str(PLUGIN.parent),
        "ZO_FUSED_BACKEND": BACKEND,
        "OMP_NUM_THREADS": "1",
        "ZO_FUSED_MUTANTS": str(found),
    }
    command = [
        str(Path(sys.executable).with_name("pytest")),
        *("-q", "-x", "-p", "mutants", "-p", "no:cacheprovider", "--no-header"),
        *("-m", "not slow and not gpu"),
        *("-k", f"not ({' or '.join(OTHERS)} or opcheck or compiles)"),
        *(str(TESTS / suite) for suite in SUITES),
    ]
    subprocess.run(
        command, env=environment, cwd=TESTS.parent, stdout=subprocess.DEVNULL, timeout=500
    )
    lines = map(json.loads, found.read_text().splitlines())
    return {mutant: (count, failed) for mutant, count, failed in lines}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_fails_the_suite(runs: dict[str, tuple[int, list[str]]], mutant: str) -> None:
    assert len(runs[mutant][1]) == 1


def test_what_fails_with_a_fault_passes_without(runs: dict[str, tuple[int, list[str]]]) -> None:
    count, failed = runs.pop("none")
    assert count == len({name for _, names in runs.values() for name in names})
    assert not failed


def test_the_list_of_mutants_was_read() -> None:
    assert len(MUTANTS) >= 20
