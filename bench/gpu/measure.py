"""Clocks, memory and the record of a run on a GPU."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import zo_fused
from bench.gpu import roofline
from bench.models import DTYPES
from zo_fused.sweeps import dispatch

Call = Callable[[], object]

LOZO_RANK = 2  # the default of both LOZOs
SMALL = 1e-9  # coefficient of a timed sweep: weights stay what they are, however often it runs


class OutOfTimeError(Exception):
    """The budget is spent."""


class Record:
    """The JSON file, written anew after every row."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    def row(self, section: str, /, **values: Any) -> None:
        self.data.setdefault(section, []).append(values)
        self.save()
        shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in values.values())
        print(f"{section}:", *shown, flush=True)

    def skip(self, what: str, reason: str) -> None:
        self.row("skipped", what=what, reason=reason)

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


class Bench:
    """A device, its clocks, the options and the record."""

    def __init__(self, options: argparse.Namespace, record: Record) -> None:
        self.device = torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.quick: bool = options.quick
        self.dtypes = {name: DTYPES[name] for name in options.dtypes}
        self.record = record
        self.backends = ("triton", "cuda") if self.on_gpu else ("cpu",)
        self._compiled: dict[str, Any] = {}
        if options.sass is not None:
            try:
                self._compiled = json.loads(options.sass.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                record.skip("predictions", f"{options.sass}: {error}")

    def check_time(self) -> None:
        if time.time() > self.record.data["deadline"]:
            raise OutOfTimeError

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> float:
        """Bytes."""
        if not self.on_gpu:
            return math.inf
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info()[0])

    def served(self, what: str) -> list[str]:
        """Backends that serve the device; the others are recorded as skipped."""
        return [name for name in self.backends if self.serves(name, what)]

    def serves(self, backend: str, what: str) -> bool:
        known = backend in dispatch.BACKENDS
        reason = dispatch.why_not(backend, self.device.type) if known else "no such backend"
        if reason is not None:
            self.record.skip(f"{what}, {backend}", reason)
        return reason is None

    def race(self, contenders: Mapping[str, Call], repeats: int) -> dict[str, list[float]]:
        """Seconds of every call on the device's clock; contenders take turns."""
        self.check_time()
        for _, call in itertools.product(range(2), contenders.values()):
            call()
        self.synchronize()
        if not self.on_gpu:
            return {
                name: [self.wall(call) for _ in range(repeats)] for name, call in contenders.items()
            }
        marks: dict[str, list[Any]] = {name: [] for name in contenders}
        torch.cuda._sleep(20_000_000)  # ten milliseconds in which the host gets ahead
        for _ in range(repeats):
            for name, call in contenders.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                marks[name].append((start, end))
        self.synchronize()
        return {
            name: [1e-3 * start.elapsed_time(end) for start, end in pairs]
            for name, pairs in marks.items()
        }

    def wall(self, call: Call) -> float:
        """Seconds on the host's clock until the device has done everything."""
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def peak_extra(self, call: Call) -> int | None:
        """Bytes that a call needs at its peak beyond what was allocated before."""
        if not self.on_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def predicted(self, case: str) -> dict[str, Any]:
        """What `roofline` makes of a kernel's instructions, where `sass.py` found them."""
        name = self.record.data["machine"]["device"]
        facts = self._compiled.get(case, {})
        gpus = [gpu for gpu in roofline.GPUS if gpu in name]
        if not gpus or not facts.get("fast"):
            return {}
        fraction, limit = roofline.predict(facts["fast"]["mix"], facts["bytes"], gpus[0])
        return {"predicted": fraction, "limit": limit}

    def copy_rate(self) -> float:
        """Bytes read and written a second by a copy, as measured first."""
        return float(self.record.data["copy"][0]["GB/s"]) * 1e9

    @contextmanager
    def backend(self, name: str | None) -> Iterator[None]:
        previous = zo_fused.set_backend(name)
        try:
            yield
        finally:
            zo_fused.set_backend(previous)

    def on(self, backend: str, call: Call) -> Call:
        """The call, served by a backend."""

        def run() -> None:
            with self.backend(backend):
                call()

        return run


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and spread in milliseconds."""
    ordered = sorted(times)
    return {
        "ms": 1e3 * statistics.median(ordered),
        "ms_p10": 1e3 * ordered[len(ordered) // 10],
        "ms_p90": 1e3 * ordered[-1 - len(ordered) // 10],
        "repeats": len(ordered),
    }


def copy(bench: Bench) -> None:
    """Bandwidth of torch's copy: bytes read plus bytes written."""
    size = bench.count(1 << 30, 1 << 20)
    source = torch.empty(size // 4, device=bench.device).normal_()
    target = torch.empty_like(source)
    times = bench.race({"copy": lambda: target.copy_(source)}, bench.count(40, 5))["copy"]
    median = statistics.median(times)
    bench.record.row("copy", bytes=size, **{"GB/s": 2e-9 * size / median}, **summary(times))
