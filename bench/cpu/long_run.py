"""Whether a run grows: ``python -m bench.cpu.long_run [--steps 20000] [--out FILE.md]``.

A tiny model with a replay log, each method in a process of its own. Memory, open files and the time
of a step are taken in twenty parts of the run. The time is that of this process (not of the clock),
so that the machine may be busy.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zo_fused
from bench.machine import of_cpu
from bench.page import publish, table

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "MeZO": lambda net: zo_fused.MeZO(net, lr=1e-4),
    "LOZO factored": lambda net: zo_fused.LOZO(net, lr=1e-4, mode="factored", interval=50),
    "ZOAdam": lambda net: zo_fused.ZOAdam(net, lr=1e-4, deferred=True),
}
PARTS = 20


@dataclass
class Part:
    """A part of a run."""

    seconds: float  # a step
    memory: int  # bytes that are resident at its end
    files: int  # open then


@dataclass
class Run:
    """A whole run."""

    parts: list[Part]
    log: int  # bytes

    @property
    def settled(self) -> list[Part]:
        """Without the first quarter, in which caches fill."""
        return self.parts[len(self.parts) // 4 :]

    @property
    def growth(self) -> int:
        """Bytes of memory, from the first settled part to the last."""
        return self.settled[-1].memory - self.settled[0].memory

    @property
    def slowdown(self) -> float:
        """The median time of a step in the last settled parts over that in the first ones."""
        half = len(self.settled) // 2
        first, last = self.settled[:half], self.settled[-half:]
        return statistics.median(p.seconds for p in last) / statistics.median(
            p.seconds for p in first
        )


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(method: str, steps: int) -> Run:
    """A run of this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(8, 16)
    opt = METHODS[method](net)
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "replay.jsonl"
        opt.start_log(log)
        for _ in range(PARTS):
            start = time.process_time()
            for _ in range(steps // PARTS):
                opt.step(lambda: net(x).square().mean())
            seconds = (time.process_time() - start) / (steps // PARTS)
            gc.collect()
            parts.append(Part(seconds, resident(), len(os.listdir("/proc/self/fd"))))
        opt.close_log()
        return Run(parts, log.stat().st_size)


def apart(method: str, steps: int) -> Run:
    """A run of a process of its own."""
    command = [sys.executable, "-m", "bench.cpu.long_run", "--one", method, f"--steps={steps}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    *lines, size = done.stdout.splitlines()
    rows = [line.split() for line in lines]
    return Run([Part(float(s), int(m), int(f)) for s, m, f in rows], int(size))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=METHODS)
    args = parser.parse_args()
    if args.one:
        made = run(args.one, args.steps)
        for part in made.parts:
            print(part.seconds, part.memory, part.files)
        print(made.log)
        return
    rows = []
    for method in METHODS:
        made = apart(method, args.steps)
        first, last = made.settled[0], made.settled[-1]
        rows.append(
            {
                "method": method,
                "step": f"{1e6 * first.seconds:.0f}, {1e6 * last.seconds:.0f}",
                "slowdown": f"{made.slowdown:.2f}",
                "memory": f"{first.memory / 2**20:.1f}, {last.memory / 2**20:.1f}",
                "files": f"{first.files}, {last.files}",
                "log": f"{made.log / 1e6:.3f}",
            }
        )
    names = {
        "method": "method",
        "step": "µs of the CPU a step, after a quarter and at the end",
        "slowdown": "medians of the halves between",
        "memory": "MiB resident",
        "files": "open files",
        "log": "log, MB",
    }
    lines = [f"# {args.steps:,} steps of a tiny model", "", *of_cpu(), ""]
    publish([*lines, *table(rows, names)], args.out)


if __name__ == "__main__":
    main()
