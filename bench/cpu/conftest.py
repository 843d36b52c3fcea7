"""Interleaved measurement on top of pytest-benchmark, and the table at the end.

pytest-benchmark times zo_fused; between its rounds (in `setup`) the rivals run and are timed, so
whatever else the machine does hits all of them alike. Reported are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import machine
from bench.page import table

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("zo_fused")
    group.addoption("--models", default="opt-125m,opt-1.3b", help="comma-separated")
    group.addoption("--table", type=Path, help="also write the table, as Markdown, to this file")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", metafunc.config.getoption("--models").split(","))


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Interleaved rounds of zo_fused, the published code (fewer, it is slow) and a copy: a row."""

    def run(
        fused: Callable[[], None],
        published: Callable[[], None] | None,
        copy: Callable[[], None],
        sweeps: int,
        bytes_per_sweep: int,
        rounds: int,
        published_rounds: int,
        **labels: str,
    ) -> None:
        times: dict[str, list[float]] = {"published": [], "copy": []}

        def rivals() -> None:
            if published is not None and len(times["published"]) < published_rounds:
                times["published"].append(seconds(published))
            copy()  # touches memory that the system may have put aside meanwhile
            times["copy"].append(seconds(copy))

        fused()  # first touch, thread pools
        benchmark.pedantic(fused, setup=rivals, rounds=rounds, iterations=1)
        median = benchmark.stats.stats.median
        copy_time = statistics.median(times["copy"])
        row: dict[str, Any] = {
            **labels,
            "ms": 1e3 * median,
            "GB/s": sweeps * bytes_per_sweep / median / 1e9,
            "of copy": sweeps * copy_time / median,
        }
        if published is not None:
            row["published ms"] = 1e3 * statistics.median(times["published"])
            row["speed-up"] = row["published ms"] / row["ms"]
        benchmark.extra_info.update(row)
        ROWS.append(row)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    columns = dict.fromkeys(name for row in ROWS for name in row)
    lines = [*machine.of_cpu(), "", *table(ROWS, {name: name for name in columns})]
    text = "\n".join(lines)
    terminalreporter.write_line("\n" + text)
    if config.getoption("--table"):
        config.getoption("--table").write_text(text + "\n", encoding="utf-8")
