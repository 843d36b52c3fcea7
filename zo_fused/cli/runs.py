"""Runs of ``zo-fused finetune`` in processes of their own, so that each has its own peak memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.errors import Interrupted, optional
from zo_fused.task.signals import Signals


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    method: str  # with its options, as in --methods
    seed: int
    words: tuple[str, ...]  # of the command, without what says where and how it starts
    output: Path

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.output.with_name(f"{self.output.name}.log")

    @property
    def finished(self) -> bool:
        """Whether the run has nothing left to do."""
        return (self.output / "summary.json").is_file()


def run_all(runs: Sequence[Run], parallel: int = 1, threads: int | None = None) -> list[str]:
    """Does the runs that are not finished, each from where it was.

    Args:
        parallel: runs at a time.
        threads: of each; None leaves that to torch.

    Returns:
        A sentence for every run that failed.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1. Runs that were under way got it, too, and have
            ended; their steps are in their logs.
    """
    waiting = [run for run in runs if not run.finished]
    tqdm = optional("tqdm").tqdm
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), unit="run", disable=None)
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": f"{threads}"} if threads else {})
    running: dict[subprocess.Popen[bytes], Run] = {}
    failures = []
    with bar, Signals() as signals:
        signals.in_step = True  # those that can wait do so until they are asked for
        try:
            while waiting or running:
                signals.check()
                while waiting and len(running) < parallel:
                    run = waiting.pop(0)
                    with uninterrupted():  # a process that is not in the table would go on alone
                        running[_start(run, environment)] = run
                    bar.set_postfix_str(", ".join(f"{r.method} {r.seed}" for r in running.values()))
                for process in [p for p in running if p.poll() is not None]:
                    run = running.pop(process)
                    bar.update()
                    if process.returncode != 0:
                        failures.append(_failure(run))
                time.sleep(0.05)
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            for process in running:
                process.send_signal(number)
            for process in running:
                process.wait()
            why = "finished runs are kept, and the steps of the others"
            raise Interrupted(why, number) from None
    return failures


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    words = (*run.words, f"--output={run.output}", "--resume=auto")
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a") as log:
        # a session of its own: Ctrl-C in the terminal would reach it, and then again from here
        return subprocess.Popen(
            [sys.executable, "-m", "zo_fused.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def _failure(run: Run) -> str:
    lines = run.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    why = last.removeprefix("zo-fused: ").rstrip(".")
    return f"{run.method} with seed {run.seed} failed: {why}; see {run.log}"
