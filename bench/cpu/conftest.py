"""Interleaved measurement on top of pytest-benchmark, and the table at the end.

pytest-benchmark times zo_fused; between its rounds (in `setup`) the rivals run and are timed, so
whatever else the machine does hits all of them alike. Reported are medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
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


SECONDS = 10.0  # of a rival, after which it has run often enough


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """Interleaved rounds of zo_fused, its rivals (slow ones fewer) and a copy: a row."""

    def run(
        fused: Callable[[], None],
        rivals: Mapping[str, Callable[[], None]],
        copy: Callable[[], None],
        sweeps: int,
        bytes_per_sweep: int,
        rounds: int,
        **labels: str,
    ) -> None:
        times: dict[str, list[float]] = {name: [] for name in (*rivals, "copy")}

        def others() -> None:
            for name, rival in rivals.items():
                if sum(times[name]) < SECONDS:
                    times[name].append(seconds(rival))
            copy()  # touches memory that the system may have put aside meanwhile
            times["copy"].append(seconds(copy))

        fused()  # first touch, thread pools
        benchmark.pedantic(fused, setup=others, rounds=rounds, iterations=1)
        median = benchmark.stats.stats.median
        row: dict[str, Any] = {
            **labels,
            "ms": 1e3 * median,
            "GB/s": sweeps * bytes_per_sweep / median / 1e9,
            "of copy": sweeps * statistics.median(times["copy"]) / median,
        }
        if rivals:
            taken = {name: 1e3 * statistics.median(times[name]) for name in rivals}
            row |= {f"{name} ms": ms for name, ms in taken.items()}
            row["fastest rival"] = min(taken, key=lambda name: taken[name])
            row["speed-up"] = min(taken.values()) / row["ms"]
            row["against published"] = taken["published"] / row["ms"]
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
