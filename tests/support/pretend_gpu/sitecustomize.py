"""Python imports this file when it starts, if its folder is on the path: there is a GPU, then.

It is the CPU, with the C++ backend in the place of Triton's and CUDA's kernels. What is left out is
what computes: paths, imports, options, files and exit codes of a run on a GPU are the real ones.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from bench.gpu import rivals, steps, sweep_cases
from zo_fused.sweeps import dispatch
from zo_fused.sweeps.backends import cpu
from zo_fused.sweeps.numbers import TRANSFORMS

CPU = torch.device("cpu")


# ---- torch --------------------------------------------------------------------------------------


class OnTheCPU(TorchFunctionMode):
    """What asks for memory on the GPU gets some of the CPU's."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.pin_memory:
            return args[0]
        args = tuple(map(self._here, args))
        return func(*args, **{name: self._here(value) for name, value in (kwargs or {}).items()})

    @staticmethod
    def _here(value: Any) -> Any:
        gpu = isinstance(value, torch.device) and value.type == "cuda"
        return CPU if gpu or (isinstance(value, str) and value == "cuda") else value


class Event:
    """On the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


class Graph:
    """Of nothing."""

    def replay(self) -> None:
        time.sleep(1e-6)


PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", total_memory=1 << 36, multi_processor_count=132, major=9, minor=0
)
OF_CUDA: dict[str, Any] = {
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": lambda graph: contextlib.nullcontext(),
    "device": lambda device: contextlib.nullcontext(),
    "is_available": lambda: True,
    "get_device_name": lambda device=0: PROPERTIES.name,
    "get_device_capability": lambda device=0: (9, 0),
    "get_device_properties": lambda device=0: PROPERTIES,
    "mem_get_info": lambda: (1 << 36, 1 << 36),
    "memory_allocated": lambda: 100,
    "max_memory_allocated": lambda: 612,
}
NOTHING = ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode")


# ---- backends -----------------------------------------------------------------------------------


def without_fast(sweep: Callable[..., Any]) -> Callable[..., Any]:
    """The CPU has no approximate units."""

    def swept(*args: Any, **options: Any) -> Any:
        args = tuple("portable" if arg == "fast" else arg for arg in args)
        if options.get("transform") == "fast":
            options["transform"] = "portable"
        return sweep(*args, **options)

    return swept


def stand_in(name: str) -> Any:
    """A backend of GPUs."""
    kept = {n: without_fast(f) if n.endswith("_") else f for n, f in vars(cpu).items()}
    changed = {
        "__name__": f"zo_fused.sweeps.backends.{name}",
        "TRANSFORMS": TRANSFORMS,
        "why_not": lambda device_type: None,
        "_kernels": lambda: SimpleNamespace(CHUNK=1 << 15),
        "prepare": lambda *arguments: without_fast(cpu.prepare(*arguments)),
    }
    return SimpleNamespace(**{**kept, **changed})


def first_cases(family: Callable[[], Any]) -> Callable[[], Any]:
    """A few, for the reference is slow."""
    return lambda: itertools.islice(family(), 3)


def pretend() -> None:
    for name, value in OF_CUDA.items():
        setattr(torch.cuda, name, value)
    for name in NOTHING:
        setattr(torch.cuda, name, lambda *_: None)
    OnTheCPU().__enter__()
    backends = {name: stand_in(name) for name in ("triton", "cuda")}
    load = dispatch.load
    dispatch.load = lambda name: backends[name] if name in backends else load(name)
    for name, family in sweep_cases.FAMILIES.items():
        sweep_cases.FAMILIES[name] = first_cases(family)
    rivals.perturb_ = lambda params, seed, scale: [p.add_(scale) for p in params]
    steps.launches = lambda call: call() or {"kernel": 1}
    torch.compile = lambda **options: lambda function: function


if "pip" not in sys.orig_argv:
    pretend()
