"""Runs rows of calls over one compiler's PTX and prints what came of each, as JSON.

``python -m tests.ptx.worker COMPILER TARGET FOLDER`` reads the rows from its standard input, a
list of ``[fault, row]`` (`faults.py`, `rows.py`; the fault "" is none). Tests start it, because
Triton can't compile in a process that interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.calls import check
from support.served import ROOT

from tests.ptx import faults, rows
from tests.ptx.assembler import Refused
from tests.ptx.compiled import CudaRunner, Runner, TritonRunner
from tests.ptx.machine import Fault, machine

# Elements of the longest run of noise without a loop over blocks (Triton) or chunks (CUDA).
BLOCKS = {"triton": 8192, "cuda": 32768}


@dataclass(frozen=True)
class Report:
    """What came of rows."""

    wrong: dict[str, str]  # by fault and row: what went wrong, only where something did
    kernels: list[str]  # that were launched,
    entries: list[str]  # and that there are, where all are compiled at once
    instructions: int  # of all threads


def report(compiler: str, target: str, folder: Path, wanted: Iterable[tuple[str, str]]) -> Report:
    """Runs rows, each with a fault or none (""), in a process that does not interpret.

    Raises:
        RuntimeError: the process failed otherwise than in a row.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx.worker", compiler, target, str(folder)],
        input=json.dumps(list(wanted)),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return Report(**json.loads(done.stdout))


def run(runner: Runner, block: int, wanted: Iterable[tuple[str, str]]) -> dict[str, Any]:
    served = runner.served("ptx", block)
    wrong = {}
    for fault, row in wanted:
        runner.plant(faults.FAULTS[fault])
        try:
            for call in rows.row(row)(served):
                check(served, call)
        except (AssertionError, Fault, Refused) as error:
            wrong[f"{fault}: {row}"] = f"{type(error).__name__}: {error}"
    return {
        "wrong": wrong,
        "kernels": sorted(runner.launches),
        "entries": sorted(runner.entries),
        "instructions": runner.machine.taken,
    }


def main(compiler: str, target: str, folder: Path) -> None:
    torch.set_num_threads(1)
    made = machine(folder)
    runner = (
        TritonRunner(made, target) if compiler == "triton" else CudaRunner(made, folder, target)
    )
    wanted = json.load(sys.stdin)
    print(json.dumps(run(runner, BLOCKS[compiler], wanted)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
