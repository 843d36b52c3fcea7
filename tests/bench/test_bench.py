"""The benchmarks that stand behind tables in the docs: what they compute, and that they run."""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import machine
from bench.cpu import overhead, shared_prompts
from bench.gpu import sass
from bench.training import findings, small_updates
from zo_fused.sweeps.backends import cpu

ROOT = Path(__file__).parents[2]


def test_outcome_of_known_moves() -> None:
    torch.manual_seed(0)
    start, asked = torch.randn(1000), torch.randn(1000).double()
    end = (start.double() + 0.25 * asked).float()
    found = small_updates.outcome(start, end, asked)
    assert found.realised == pytest.approx(0.25, abs=1e-6)
    assert found.drift < 1e-6
    noise = torch.randn(1000).double()
    found = small_updates.outcome(torch.zeros(1000), noise.float(), asked)
    assert found.drift == pytest.approx(1, abs=0.1)
    assert abs(found.realised) < 4 * found.error
    assert found.error == pytest.approx(1 / math.sqrt(1000), rel=0.1)


@pytest.mark.slow
def test_small_updates_run_and_keep_what_was_asked_in_float32(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [
        sys.executable,
        "-m",
        "bench.training.small_updates",
        "--elements",
        "2000",
        "--steps",
        "10",
    ]
    subprocess.run([*command, "--out", out], check=True, capture_output=True, cwd=ROOT)
    rows = [line for line in out.read_text().splitlines() if line.startswith("| fp32")]
    assert len(rows) == sum("rounding" not in options for *_, options in small_updates.METHODS)
    assert all(row.count("1.00 ± 0.00") == 4 for row in rows)


def test_prompts_read_once() -> None:
    """All ways give the same scores, which the benchmark checks."""
    pytest.importorskip("transformers")
    lines = list(shared_prompts.rows(1, {"few": (3, 9, 2, 3), "many": (2, 20, 7, 2)}))
    assert len(lines) == 4
    assert all(line.count(" times |") == 2 for line in lines[2:])


def test_tables_of_machine_code() -> None:
    def facts(count: float, opcode: str = "FFMA", **more: object) -> dict[str, object]:
        fast = {"mix": {opcode: count}, "per_element": count}
        return {"fast": fast, "bytes": 4, "registers": 80, "shared": 0, "local": [], **more}

    found = {
        "sm_90": {"dense": facts(80), "low rank": facts(8, local=["STL", "LDL"])},
        "gfx942": {
            "dense": facts(40, "v_fma_f32", shared=4096),
            "low rank": {"registers": 99, "shared": 0, "stack": 0},
        },
    }
    lines = list(sass.tables(found))
    assert "| dense | 80.0 / 80 | 40.0 / 80 s |" in lines
    assert "| low rank | 8.0 / 80 L2 | not counted / 99 |" in lines
    # 0.8 of what an H100 issues, 128 * 132 * 1.755e9 a second, against 3e12 / 4 elements.
    assert any(line.startswith("| dense | 0.40 issue |") for line in lines)


@pytest.mark.slow
def test_make_bench_tabulates_every_sweep_and_step(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    makefile = (ROOT / "Makefile").read_text()
    (folder,) = re.findall(r"pytest -q (\S+) --benchmark-disable-gc", makefile)
    command = [sys.executable, "-m", "pytest", "-q", folder, "--models", "opt-tiny"]
    command += ["-p", "no:cacheprovider", "--table", str(tmp_path / "table.md")]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which this process may be
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=env)
    found = (tmp_path / "table.md").read_text()
    assert f"torch {torch.__version__}" in found
    header, _, *rows = [line[2:-2].split(" | ") for line in found.splitlines() if line[:1] == "|"]
    assert {"what", "ms", "GB/s", "of copy", "published ms", "against published"} <= set(header)
    assert len(rows) == 3 * (4 + 2 + 1 + 3)  # in every dtype
    assert all(len(row) == len(header) for row in rows)
    raced = [dict(zip(header, row, strict=True)) for row in rows]
    raced = [row for row in raced if row["published ms"]]
    assert len(raced) == 3 * (3 + 2)
    for row in raced:  # the ratio is to the fastest of all
        taken = {name: float(row[f"{name} ms"]) for name in ("published", "compiled", "foreach")}
        assert row["fastest rival"] in taken
        fastest = min(taken.values())
        assert taken[row["fastest rival"]] == fastest
        assert float(row["speed-up"]) == pytest.approx(fastest / float(row["ms"]), rel=0.02)


@pytest.mark.slow
def test_findings_train_and_tabulate() -> None:
    pytest.importorskip("transformers")
    names = [run.method for run in findings.alignment(4) + findings.queries(4, [1, 2])]
    assert set(names) == {*findings.ZEROTH, *findings.FIRST}
    cells = {}
    for method, queries in (("MeZO", 2), ("SGD", 1)):
        run = findings.Run((method, "a"), method, 1.0, 0, steps=1, template=False, queries=queries)
        cells[run.cell] = (1.0, [findings.train(run)])
    assert all(0.3 < runs[0].before < 0.7 for _, runs in cells.values())
    table = findings.accuracy_table(cells)
    assert [line.split(" ")[1] for line in table[2:]] == ["MeZO", "SGD"]


def test_findings_are_a_page_that_names_the_machine() -> None:
    page = findings.page("the command", [("Queries", ["a line"])])
    assert "`the command`" in page
    assert all(line in page for line in [*machine.of_cpu(), "## Queries\n\na line\n"])
    assert f"torch {torch.__version__}" in page


def test_every_benchmark_loads() -> None:
    for needed in ("tqdm", "transformers", "triton"):
        pytest.importorskip(needed)
    for path in (ROOT / "bench").rglob("*.py"):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.skipif(cpu.why_not("cpu") is not None, reason="the C++ extension is not built")
def test_overhead_measures_every_variant() -> None:
    for _, cls, options in overhead.VARIANTS:
        step, kernels = overhead.microseconds(cls, options, steps=2)
        assert 0 < kernels < step
