"""What it costs to go on with a run from its base weights: ``python -m bench.cpu.resume``.

The embedded model, 1,000 steps. Their losses are random numbers, as a replay makes no forward
passes. And what a checkpoint costs beside its own writing: checksums of its files, and writing them
through to the disk.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.cli import defaults
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.task.files import sync_all
from zo_fused.task.models import load_model
from zo_fused.task.resuming import sums

STEPS = 1000
RUNS: dict[str, tuple[type[ZerothOrderOptimizer], dict[str, Any]]] = {
    "MeZO": (zo_fused.MeZO, {}),
    "MeZO, deferred": (zo_fused.MeZO, {"deferred": True}),
    "LOZO": (zo_fused.LOZO, {}),
    "LOZO, factored": (zo_fused.LOZO, {"mode": "factored"}),
    "ZOAdam": (zo_fused.ZOAdam, {}),
}
FILE = 1 << 28  # bytes


def model(dtype: str) -> Any:
    """The embedded one."""
    return load_model(str(defaults.EMBEDDED_MODEL), dtype, torch.device("cpu"))


def seconds_of(name: str, dtype: str, folder: Path) -> tuple[float, float]:
    """Of making the steps without their forward passes, and of a replay."""
    method, options = RUNS[name]
    log = folder / "replay.jsonl"
    losses = torch.rand(2 * STEPS, generator=torch.Generator().manual_seed(0)).tolist()
    run, resumed = (method(model(dtype), lr=1e-6, **options) for _ in range(2))
    run.start_log(log)
    start = time.perf_counter()
    for _ in range(STEPS):
        run.step(losses.pop)
    made = time.perf_counter() - start
    run.close_log()
    start = time.perf_counter()
    assert resumed.replay(log) == STEPS
    return made, time.perf_counter() - start


def main() -> None:
    """Prints a table in Markdown."""
    parameters = sum(p.numel() for p in model("float32").parameters())
    print(f"{STEPS:,} steps, {parameters:,} parameters, {torch.get_num_threads()} threads\n")
    print("| method | dtype | steps without forward passes | replay |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=os.curdir) as place:
        folder = Path(place)
        for name in RUNS:
            for dtype in ("float32", "bfloat16"):
                made, replayed = seconds_of(name, dtype, folder)
                print(f"| {name} | {dtype} | {made:.2f} s | {replayed:.2f} s |", flush=True)
        (folder / "replay.jsonl").unlink()
        (folder / "weights").write_bytes(os.urandom(FILE))
        start = time.perf_counter()
        sync_all(folder)
        synced = time.perf_counter() - start
        start = time.perf_counter()
        assert json.dumps(sums(folder))
        summed = time.perf_counter() - start
    print(f"\nchecksums: {FILE / summed / 1e9:.2f} GB/s; fsync: {FILE / synced / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
