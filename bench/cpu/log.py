"""What a replay log costs: ``python -m bench.cpu.log``.

A line a step and a write-through to the disk now and then, in a folder of this machine; and the
fingerprint of the base, once a run, on one thread.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import zo_fused
from zo_fused.step.fingerprint import weighted_sum
from zo_fused.step.log_writer import SYNC_SECONDS, Writer

STEPS, SYNCS = 20_000, 100
WEIGHTS = 1 << 27  # float16


def median(action: Callable[[], object], times: int) -> float:
    """Seconds that it takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.curdir) as folder:
        path = Path(folder) / "replay.jsonl"
        opt = zo_fused.MeZO(torch.nn.Linear(2, 1), lr=1e-6)
        opt.start_log(path)
        writer = opt.weights.log._writer
        assert isinstance(writer, Writer)
        settings, usual = writer._settings, writer._usual_path
        steps = iter(range(STEPS))
        grads = torch.randn(STEPS, generator=torch.Generator().manual_seed(0)).tolist()

        def line() -> None:
            step = next(steps)
            writer.update(step, usual, [grads[step]], settings)

        def synced_line() -> None:
            line()
            writer.sync()

        appended = median(line, STEPS - SYNCS)
        synced = median(synced_line, SYNCS)
        size = path.stat().st_size
        opt.close_log()
    tensor = torch.zeros(WEIGHTS, dtype=torch.float16)
    hashed = median(lambda: weighted_sum(tensor), 3)
    print(f"a line: {1e6 * appended:.1f} us")
    print(f"fsync: {1e3 * synced:.2f} ms, at most every {SYNC_SECONDS:g} s")
    print(f"{STEPS:,} steps of one query: {size:,} bytes")
    print(f"fingerprint: {tensor.numel() * tensor.element_size() / hashed / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
