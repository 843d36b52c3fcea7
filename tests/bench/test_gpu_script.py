"""What the one GPU command runs, on the CPU: the benchmark with tiny sizes, the report, and how
results are compared under the sanitizer. (The command itself: `test_gpu_command.py`.)"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu_script import RESULTS, ROOT, bare, native

from bench import machine
from bench.gpu import main, measure, report, rivals, sanitize, steps
from bench.gpu.sweep_cases import FAMILIES
from zo_fused.sweeps.signatures import SWEEPS

CPU = torch.device("cpu")

# ---- the measurements and their report ----------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-S", "-m", "bench.gpu.main", "--device", "cpu", "--quick"]
    command += ["--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=bare(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def data(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / "gpu.json").read_text())
    return found


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@native
def test_quick_run_writes_everything(results: Path) -> None:
    pytest.importorskip("matplotlib")
    assert {path.name for path in results.iterdir()} == RESULTS
    assert all(path.stat().st_size > 500 for path in results.iterdir())
    assert (results / "sweeps.png").read_bytes().startswith(b"\x89PNG")


@native
def test_quick_run_measured_everything(data: dict[str, Any]) -> None:
    assert data["finished"]
    assert not data["stopped"]
    assert "errors" not in data
    assert len(data["copy"]) == 2
    for section in ("copy", "sweeps", "steps", "rivals", "overhead"):
        found = list(numbers(data[section]))
        assert found
        assert all(math.isfinite(x) and x > 0 for x in found), section
    assert {row["dtype"] for row in data["sweeps"]} == {"fp16", "bf16", "fp32"}
    halves = [row["sweep"] for row in data["sweeps"] if row["dtype"] == "fp16"]
    assert len(set(halves)) == len(halves)
    assert {"dense", "dense, 2 directions", "dense, stochastic", "low-rank r=64"} <= set(halves)
    assert {row["method"] for row in data["steps"]} == {"MeZO", "LOZO", "LOZO-M"}
    others = {"published", "compiled", "foreach"}
    for method in ("MeZO", "LOZO"):
        mine = [row for row in data["steps"] if row["method"] == method]
        assert {row["who"] for row in mine if row["rival"]} == others
        fastest = min(row["ms"] for row in mine if row["rival"])
        for row in mine:
            if not row["rival"]:
                assert row["times fastest rival"] == pytest.approx(fastest / row["ms"])
        perturbations = {row["perturbation"] for row in data["rivals"]}
        assert perturbations > {f"{name} {method}" for name in others}
    # What needs a GPU is named, with the reason.
    skipped = {row["what"]: row["reason"] for row in data["skipped"]}
    assert "GPU" in skipped["graphs"]
    assert "GPU" in skipped["rivals, tl.randn"]


@native
def test_page_has_machine_goals_and_tables(results: Path) -> None:
    page = (results / "gpu.md").read_text()
    for part in (
        "torch",
        "driver",
        "commit",
        "Copy bandwidth",
        "## Goals",
        "## Sweeps",
        "## Steps",
    ):
        assert part in page
    assert page.count("not measured") == 3  # fast, OPT-13B, memory
    plots = importlib.util.find_spec("matplotlib") is not None
    assert ("![sweeps](sweeps.png)" in page) == plots
    widths = {line.count("|") for line in page.split("## Sweeps")[1].split("## ")[0].splitlines()}
    assert len(widths - {0}) == 1


@pytest.mark.slow
@native
def test_a_run_out_of_time_keeps_what_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = ["gpu.py", "--device", "cpu", "--quick", "--budget", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert main.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["stopped"]
    assert found["finished"]
    assert "cut short" in (tmp_path / "gpu.md").read_text()


def test_goals_are_judged() -> None:
    half = {"dtype": "fp16"}
    sweeps = [
        {**half, "sweep": "dense", "backend": "triton", "of copy": 0.8},
        {**half, "sweep": "dense, hadamard", "backend": "triton", "of copy": 0.97},
        {**half, "sweep": "dense", "backend": "cuda", "of copy": 0.9},
        {"dtype": "fp32", "sweep": "dense, fast", "backend": "cuda", "of copy": 1.0},
    ]
    for rank, fraction in zip(report.LOW_RANKS, (0.97, 0.96, 0.95, 0.92), strict=True):
        name = f"low-rank r={rank}"
        sweeps.append({**half, "sweep": name, "backend": "triton", "of copy": fraction})
    step = {"model": "opt-13b", "method": "MeZO", "who": "triton", "rival": False}
    steps = [
        {**step, "times published": 7.5, "peak_extra_bytes": 4096},
        {**step, "who": "published", "rival": True, "peak_extra_bytes": 100},
    ]
    found = report.goals({"sweeps": sweeps, "steps": steps})
    assert [goal["met"] for goal in found] == [True, True, None, False, False, True]
    assert [goal["by"] for goal in found] == ["cuda", "triton", "", "triton", "triton", "triton"]
    assert found[5]["measured"] == 4096 / 1e6
    assert report.goals({})[0]["met"] is None


# ---- what only a GPU has, over stand-ins --------------------------------------------------------


class Event:
    """Of `torch.cuda`, on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Graph:
    """Of `torch.cuda`, of nothing."""

    def replay(self) -> None:
        time.sleep(1e-6)


class Properties:
    name, total_memory, multi_processor_count, major, minor = "NVIDIA H100 80GB HBM3", 1, 132, 9, 0


@pytest.fixture
def bench_of_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> measure.Bench:
    """A bench that takes the CPU for a GPU."""
    stand_ins: dict[str, Any] = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "mem_get_info": lambda: (1 << 40, 1 << 40),
        "get_device_properties": lambda device: Properties,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 612,
    }
    nothing = ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats")
    for name in (*nothing, "set_sync_debug_mode"):
        stand_ins[name] = lambda *_: None
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    sass = tmp_path / "sass.json"
    sass.write_text('{"dense fp16": {"fast": {"mix": {"FFMA": 80.0}}, "bytes": 4}}')
    options = argparse.Namespace(
        device="cpu", quick=True, dtypes=["fp16"], sass=sass, budget=100.0, out=tmp_path
    )
    data: dict[str, Any] = {"machine": machine.facts("cuda"), "quick": True, "finished": False}
    data |= {"budget": 100.0, "deadline": time.time() + 100, "stopped": False}
    data |= {"done": [], "seconds": {}}
    bench = measure.Bench(options, measure.Record(tmp_path / "gpu.json", data))
    bench.on_gpu, bench.backends = True, ("cpu",)
    return bench


@pytest.mark.slow
@native
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # says the profiler
@torch.no_grad()
def test_sections_of_a_gpu(bench_of_gpu: measure.Bench, tmp_path: Path) -> None:
    assert main.run(bench_of_gpu)
    data = bench_of_gpu.record.data
    assert "errors" not in data
    assert {row["how"] for row in data["graphs"]} == {"optimizer", "functions", "graph"}
    assert {row["peak_extra_bytes"] for row in data["steps"]} == {512}
    assert all(row["waits"] == 0 for row in data["overhead"])
    report.write(tmp_path)
    page = (tmp_path / "gpu.md").read_text()
    assert "NVIDIA H100" in page
    assert "## Three sweeps of MeZO" in page
    assert "| 0.000512 | cpu | met |" in page
    # The roofline is drawn for Triton's kernels.
    predicted = bench_of_gpu.predicted("dense fp16")
    assert 0 < predicted["predicted"] < 1
    assert predicted["limit"] in ("fp32", "issue")
    assert bench_of_gpu.predicted("dense bf16") == {}


@native
@pytest.mark.filterwarnings("ignore:CUDA is not available")  # says the profiler
@torch.no_grad()
def test_a_broken_context_is_left_to_a_fresh_process(
    bench_of_gpu: measure.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: measure.Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    few = {"copy": measure.copy, "rivals": broken, "graphs": steps.graphs, "end": main.end}
    monkeypatch.setattr(main, "sections", lambda bench: few)
    assert not main.run(bench_of_gpu)
    data = bench_of_gpu.record.data
    assert [row["section"] for row in data["errors"]] == ["rivals"]
    assert "graphs" not in data["done"]
    assert main.run(bench_of_gpu)  # as the fresh process does
    assert len(data["errors"]) == 1
    assert data["done"][-1] == "end"


def test_an_alarm_rings() -> None:
    with pytest.raises(TimeoutError, match="1 s"), rivals.alarm(1):
        time.sleep(3)


# ---- sanitize.py --------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("family", ["fill", "shaped", "lowrank_momentum", "scripts"])
def test_cases_agree_on_the_cpu(family: str) -> None:
    for case in FAMILIES[family]():
        if sanitize.served(case, "cpu"):
            assert sanitize.differences(case, "cpu", CPU) == []


def test_cases_cover_every_operator_and_have_names_of_their_own() -> None:
    cases = [case for family in FAMILIES.values() for case in family()]
    assert {case.operator for case in cases} == set(SWEEPS)
    assert len({case.name for case in cases}) == len(cases)
    for name, signature in SWEEPS.items():
        assert len(sanitize.written(name)) == signature.written


def test_a_difference_of_one_bit_is_found() -> None:
    wanted = torch.ones(9, dtype=torch.float16)
    got = wanted.clone()
    assert sanitize.difference(got, wanted) is None
    got.view(torch.int16)[4] += 1
    assert "first at 4" in str(sanitize.difference(got, wanted))
    assert sanitize.difference(got, wanted, exact=False) is None
    assert sanitize.difference(-torch.zeros(1), torch.zeros(1)) is not None
    assert sanitize.difference(wanted[:3], wanted) is not None
    assert sanitize.difference(wanted + 0.1, wanted, exact=False) is not None
    assert sanitize.difference(torch.full((2,), torch.nan), torch.ones(2), exact=False) is not None


def test_a_write_beside_a_tensor_is_found() -> None:
    for place in (63, 64 + 5):
        islands = sanitize.Islands(CPU, misalignment=0, guard=64)
        islands.put(torch.zeros(5))
        assert islands.intact()
        islands.made[0][0][place] = 0
        assert not islands.intact()


@native
def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from zo_fused.sweeps.backends import cpu

    right = cpu.dense_

    def wrong(params: Any, *args: Any) -> None:
        right(params, *args)
        params[-1].view(-1)[-1] += 1

    monkeypatch.setattr(cpu, "dense_", wrong)
    case = next(FAMILIES["dense"]())
    assert sanitize.differences(case, "cpu", CPU) != []


def test_tensors_are_misaligned_as_asked() -> None:
    for misalignment in (0, 1, 3):
        view = sanitize.Islands(CPU, misalignment, guard=64).put(torch.zeros(5, dtype=torch.half))
        assert view.data_ptr() % 16 == 2 * misalignment


def test_an_absent_backend_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--backend", "cuda", "--device", "cpu"])
    assert sanitize.main() == 2
    assert "cuda" in capsys.readouterr().err
