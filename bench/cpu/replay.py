"""Steps a second of a replay, many in one pass against one after the other:
``python -m bench.cpu.replay --out FILE.md``.

The log is of a run over random weights; it has no forward passes, so its projected gradients are
made up. Both ways take turns, each on the same weights, and write the same bits. Medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

import zo_fused
from bench import machine
from bench.models import DTYPES, OPT, opt_parameters
from bench.page import publish
from zo_fused.noise.streams import CONTRACT_VERSION
from zo_fused.replaying import rebuild
from zo_fused.step import log_lines, log_records

# Others are replayed sweep by sweep.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "MeZO": (zo_fused.MeZO, {}),
    "MeZO deferred": (zo_fused.MeZO, {"deferred": True}),
    "MeZO, stochastic": (zo_fused.MeZO, {"rounding": "stochastic"}),
}


def write_log(path: Path, method: str, params: dict[str, nn.Parameter], steps: int) -> None:
    """A log of so many steps."""
    cls, options = METHODS[method]
    opt = cls(params.items(), lr=1e-6, **options)
    opt.start_log(path)
    opt.close_log()
    checksum = log_lines.read(path, CONTRACT_VERSION).checksum
    with open(path, "ab") as file:
        for step in range(steps):
            grad = float(f"{0.1 * (step % 7 - 3):.9g}")
            line, checksum = log_records.line_of([step, grad], checksum)
            file.write(line)


def step_by_step(tensors: dict[str, Tensor], log: Path) -> None:
    """A replay that repeats every sweep by itself."""
    with mock.patch.object(rebuild, "recorder_of", return_value=None):
        zo_fused.replay(tensors, log)


WAYS: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
    "fused": zo_fused.replay,
    "step by step": step_by_step,
}


def times(method: str, base: dict[str, nn.Parameter], steps: int, repeats: int) -> dict[str, float]:
    """Seconds a step of either way, with the preparations that a replay makes."""
    tensors = {name: torch.empty_like(p) for name, p in base.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    ends: list[list[Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        write_log(log, method, base, steps)
        for _ in range(repeats):
            for way, replay in WAYS.items():
                torch._foreach_copy_(list(tensors.values()), list(base.values()))
                start = time.perf_counter()
                replay(tensors, log)
                seconds[way].append((time.perf_counter() - start) / steps)
                if len(ends) < len(WAYS):
                    ends.append([t.clone() for t in tensors.values()])
    if not all(map(torch.equal, *ends)):
        raise AssertionError(f"{method}: the weights differ")
    return {way: statistics.median(taken) for way, taken in seconds.items()}


def rows(
    model: str, dtypes: list[str], methods: list[str], steps: int, repeats: int
) -> Iterator[str]:
    """Lines of the table."""
    yield "| model | dtype | method | steps/s, fused | steps/s, step by step | ratio |"
    yield "|---|---|---|---|---|---|"
    for dtype in dtypes:
        with torch.no_grad():
            base = opt_parameters(model, DTYPES[dtype])
            for method in tqdm(methods, desc=dtype):
                if dtype == "fp32" and "stochastic" in method:
                    continue  # the same: float32 has nothing to round
                found = times(method, base, steps, repeats)
                fused, single = (found[way] for way in WAYS)
                ratio = single / fused
                cells = (model, dtype, method, f"{1 / fused:.3g}", f"{1 / single:.3g}")
                yield "| " + " | ".join(cells) + f" | {ratio:.2f} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="opt-125m", choices=list(OPT))
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--methods", help="names in METHODS, with semicolons between; default: all")
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    chosen = options.methods.split(";") if options.methods else list(METHODS)
    lines = [
        f"# Replay, {options.model.upper()} shapes, CPU\n",
        "How to read it: [bench/README.md](../README.md).\n",
        f"`python -m bench.cpu.replay --model {options.model} --steps {options.steps} "
        f"--repeats {options.repeats}`\n",
        "  \n".join([*machine.of_cpu(), f"load at the start: {os.getloadavg()[0]:.1f}"]) + "\n",
    ]
    sizes = (options.steps, options.repeats)
    lines += rows(options.model, options.dtypes.split(","), chosen, *sizes)
    publish(lines, options.out)


if __name__ == "__main__":
    main()
