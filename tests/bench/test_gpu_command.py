"""`make gpu`: the shell script, over stand-ins for its programs and on a pretended GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.gpu_script import RESULTS, ROOT, bare, environment, native

LOGS = {"build.log", "tests.log", "bench.log"}

PYTHON = """#!/bin/bash
if [[ -n $HANG && "$*" == *"$HANG"* ]]; then echo hanging >>"$HUNG"; exec sleep 60; fi
case "$*" in
  -c*) printf 'NVIDIA Test GPU (80GB)\\n9.0\\n/an/environment\\n' ;;
  *build_ext*) echo "built for $TORCH_CUDA_ARCH_LIST by what is in $PATH"
    [[ $ZO_FUSED_NATIVE != "$BROKEN" ]] ;;
  -m\\ bench.gpu.sass*) echo '{}' ;;
  -m\\ bench.gpu.main*--quick*) ;;
  -m\\ bench.gpu.main*) while [[ $1 != --out ]]; do shift; done
    echo '{}' >"$2/gpu.json"; printf '## Goals\\n\\n| a |\\n\\n## End\\n' >"$2/gpu.md" ;;
  *pytest*test_triton.py) echo "====== 1 failed, 3 passed in 1s ======"; exit ${PYTEST:-0} ;;
  *pytest*) echo "====== 3 passed in 1s ======" ;;
esac
"""


def stand_ins(folder: Path, **more: str) -> tuple[dict[str, Any], Path]:
    """How to run the script over a stand-in for python and for compute-sanitizer, and where its
    results will be."""
    programs, out = folder / "programs", folder / "out"
    programs.mkdir()
    (programs / "python").write_text(PYTHON)
    (programs / "compute-sanitizer").write_text("#!/bin/bash\necho $*\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    given = {"PATH": path, "PYTHON": str(programs / "python"), "BUDGET": "120", **more}
    command = ["bash", "bench/gpu/gpu.sh", str(out)]
    return {"args": command, "cwd": ROOT, "env": environment(**given), "text": True}, out


def shell(folder: Path, **more: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What the script says over stand-ins, and where its results are."""
    call, out = stand_ins(folder, **more)
    return subprocess.run(**call, capture_output=True, timeout=60), out


def test_script_parses() -> None:
    subprocess.run(["bash", "-n", ROOT / "bench" / "gpu" / "gpu.sh"], check=True)


def test_script_runs_every_stage(tmp_path: Path) -> None:
    done, out = shell(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in out.iterdir()}
    assert names >= LOGS | {"gpu.json", "gpu.md"}
    assert len(names) <= 8
    assert "built for 9.0 by what is in /an/environment:" in (out / "build.log").read_text()
    tests = (out / "tests.log").read_text()
    for tool in ("memcheck", "racecheck"):
        assert f"--tool {tool}" in tests
    for part in ("gpu", "cuda", "triton", "triton_compile", "parity"):
        assert f"tests/sweeps/test_{part}.py" in tests
    for backend in ("triton", "cuda"):
        assert f"-k {backend}" in tests
    assert "-m gpu" in tests
    page = (out / "gpu.md").read_text()
    for stage in (
        "build",
        "kernels 0",
        "gpu",
        "test_triton",
        "memcheck",
        "racecheck",
        "benchmarks",
    ):
        assert f"| {stage} | ok |" in page
    assert "| a |" in done.stdout


@pytest.mark.slow
def test_what_the_script_runs_loads_where_nothing_is_installed(tmp_path: Path) -> None:
    """Neither this package nor what only its own environment has."""
    pytest.importorskip("triton")
    _, out = shell(tmp_path)
    files = set(re.findall(r"tests/\S+\.py", (out / "tests.log").read_text()))
    assert len(files) > 4
    absent = ("randomgen", "datasets")
    (tmp_path / "absent.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({absent})\n")
    command = [sys.executable, "-S", "-m", "pytest", "-p", "absent", "-p", "no:cacheprovider"]
    command += ["--require-gpu", "-W", "default", "--collect-only", "-qq", *sorted(files)]
    variables = bare()
    variables["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    loads = "import absent, bench.gpu.main, bench.gpu.report, bench.gpu.sanitize, bench.gpu.sass"
    subprocess.run([sys.executable, "-S", "-c", loads], cwd=ROOT, env=variables, check=True)


def test_script_goes_on_after_failures_and_tells(tmp_path: Path) -> None:
    done, out = shell(tmp_path, BROKEN="cuda", PYTEST="1")
    assert done.returncode == 1
    page = (out / "gpu.md").read_text()
    assert "| build | FAILED (1) |" in page
    assert "| build without CUDA | ok |" in page
    assert "| test_triton | FAILED (1) |" in page
    assert "| benchmarks | ok |" in page
    assert "1 failed, 3 passed" in done.stdout


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    ("stage", "finished"),
    [
        ("build_ext", []),
        ("--part 0", ["build"]),
        ("test_triton.py", ["build", "kernels 0", "memcheck", "parity of cuda"]),
        ("bench.gpu.main --out", ["build", "kernels 0", "memcheck", "test_triton"]),
    ],
)
def test_script_leaves_what_it_had_when_it_is_killed(
    stage: str, finished: list[str], how: signal.Signals, tmp_path: Path
) -> None:
    hung = tmp_path / "hung"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    call, out = stand_ins(tmp_path, HANG=stage, HUNG=str(hung), TMPDIR=str(scratch))

    def complete() -> bool:
        log = out / "tests.log"
        told = log.read_text() if log.exists() else ""
        return (
            hung.exists()
            and "Stages so far" in told
            and all(f"{name}\tok" in told for name in finished)
        )

    with subprocess.Popen(**call, stdout=subprocess.PIPE) as process:
        try:
            for _ in range(300):
                if complete():
                    break
                time.sleep(0.1)
            assert complete()
            process.send_signal(how)
            assert process.wait(10) == (143 if how == signal.SIGTERM else -how)
        finally:
            process.kill()
            for left in scratch.glob("*/running/*"):
                os.kill(int(left.name), signal.SIGTERM)
    names = {path.name for path in out.iterdir()}
    assert {"build.log", "tests.log"} <= names
    assert len(names) <= 8
    if how == signal.SIGTERM:
        assert list(scratch.iterdir()) == []


# On a pretended GPU (`support/pretend_gpu`) the programs are the real ones, with tiny sizes. Only
# what takes minutes has a stand-in: building, and Triton's compiler for an H100.
PRETENDED = """#!/bin/bash
case "$*" in
  *build_ext*) echo "the extension is there"; exit ;;
  "-m bench.gpu.sass"*)
    echo '{"dense fp16": {"fast": {"mix": {"FFMA": 80.0}}, "bytes": 4}}'; exit ;;
  "-m bench.gpu.main"*--quick*) ;;
  "-m bench.gpu.main"*) set -- "$@" --quick ;;
esac
exec "$REAL_PYTHON" "$@"
"""
SANITIZER = """#!/bin/bash
while [[ $1 != */python ]]; do shift; done
exec "$@"
"""


@native
@pytest.mark.slow  # two dozen processes import torch
def test_the_whole_run_on_a_pretended_gpu(tmp_path: Path) -> None:
    for package in ("triton", "matplotlib"):
        pytest.importorskip(package)
    call, out = stand_ins(
        tmp_path,
        REAL_PYTHON=sys.executable,
        BUDGET="480",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support" / "pretend_gpu")]),
        PYTEST_ADDOPTS="-p few_tests",
    )
    programs = tmp_path / "programs"
    (programs / "python").write_text(PRETENDED)
    (programs / "compute-sanitizer").write_text(SANITIZER)
    done = subprocess.run(**call, capture_output=True, timeout=480)
    page = (out / "gpu.md").read_text()
    logs = "".join((out / name).read_text() for name in ("tests.log", "bench.log"))
    assert done.returncode == 0, page[-3000:] + logs[-3000:]
    assert {path.name for path in out.iterdir()} <= RESULTS | LOGS  # seven
    assert {path.name for path in out.iterdir()} >= RESULTS

    data = json.loads((out / "gpu.json").read_text())
    assert data["finished"]
    assert not data["stopped"]
    assert "errors" not in data
    assert {row["backend"] for row in data["sweeps"]} == {"triton", "cuda"}
    assert any("predicted" in row for row in data["sweeps"])
    for section in ("copy", "steps", "rivals", "graphs", "overhead"):
        assert data[section], section
    assert "| dense sweep, fast, fp16, of copy |" in page
    assert "cut short" not in page
    stages = re.findall(r"^\| (.+?) \| (.+?) \| \d+ s \|$", page, re.MULTILINE)
    assert {result for _, result in stages} == {"ok"}
    assert len(stages) > 15
    for ran in (
        "test_gpu.py",
        "test_parity.py",
        "test_triton.py",
        "0 differences",
        "fill: 3 cases",
    ):
        assert ran in logs
    assert "done, 0 stages failed" in done.stdout


def test_script_wants_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "bench/gpu/gpu.sh", str(tmp_path / "out")],
        cwd=ROOT, env=environment(PYTHON="false"), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no GPU" in done.stderr
