"""Sweeps, whole steps and their rivals on a GPU: numbers into one JSON file, then a report.

``python bench/gpu.py --out DIR`` writes ``gpu.json`` row by row, so a run that is cut short keeps
what it had, and at the end ``gpu.md`` with two plots (`gpu_report`). Sections run in the order of
their importance until ``--budget`` seconds are spent. A section that fails is recorded and the rest
goes on; where it left the CUDA context broken, in a fresh process. ``--device cpu --quick`` goes
through the same code on CPU tensors, to test it.

How a number is made: everything is warmed up (compiled) first; contenders whose ratio is reported
take turns; medians are reported. Sweeps go over more memory than any cache holds and are timed on
the device between events, steps on the host from synchronisation to synchronisation.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one kernel: no pool of compilers

import argparse
import datetime
import functools
import gc
import itertools
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_report
import roofline
import torch
from models import DTYPES, opt_shapes
from published import EPS, LR, METHODS
from torch import Tensor, nn

import zo_fused
from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps import dispatch
from zo_fused.sweeps.functions import int64_tensor

Call = Callable[[], object]

RANKS = (1, 2, 4, 8, 16, 32, 64)
LOZO_RANK = 2  # the default of both LOZOs
SMALL = 1e-9  # coefficient of a timed sweep: weights stay what they are, however often it runs


class OutOfTimeError(Exception):
    """The budget is spent."""


# ---- the record ---------------------------------------------------------------------------------


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


# ---- measuring ----------------------------------------------------------------------------------


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


# ---- copy ---------------------------------------------------------------------------------------


def copy(bench: Bench) -> None:
    """Bandwidth of torch's copy: bytes read plus bytes written."""
    size = bench.count(1 << 30, 1 << 20)
    source = torch.empty(size // 4, device=bench.device).normal_()
    target = torch.empty_like(source)
    times = bench.race({"copy": lambda: target.copy_(source)}, bench.count(40, 5))["copy"]
    median = statistics.median(times)
    bench.record.row("copy", bytes=size, **{"GB/s": 2e-9 * size / median}, **summary(times))


# ---- sweeps -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    name: str
    run: Call
    bytes: int  # that it must move


class Weights:
    """Matrices of one dtype, with the tables of coefficients that operators take."""

    def __init__(self, bench: Bench, dtype: torch.dtype) -> None:
        # Together 1 GB in 16 bits.
        count, self.rows, self.columns = (3, 64, 48) if bench.quick else (5, 20480, 5120)
        self.device = bench.device
        self.params = [
            torch.empty(self.rows, self.columns, dtype=dtype, device=bench.device).normal_(0, 0.02)
            for _ in range(count)
        ]
        self.ids = int64_tensor(range(count))
        self.offsets = torch.zeros_like(self.ids)
        self.keys = int64_tensor(
            [derive_key(0, Purpose.DENSE, step) for step in range(count)], self.device
        )
        self.rounding = int64_tensor([derive_key(0, Purpose.ROUNDING)], self.device)
        self.elements = sum(p.numel() for p in self.params)
        self.bytes = sum(2 * p.numel() * p.element_size() for p in self.params)

    def table(self, value: float, *columns: int) -> Tensor:
        return torch.full((len(self.params), *columns), value, device=self.device)

    def like(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=dtype) for p in self.params]

    def factors(self, rank: int) -> tuple[list[Tensor], list[Tensor]]:
        us, vs = (
            [torch.randn(side, rank, device=self.device) for _ in self.params]
            for side in (self.rows, self.columns)
        )
        return us, vs


def dense(weights: Weights, directions: int = 1, rounds: bool = False, transform: str = "") -> Call:
    keys, one = weights.keys[:directions], weights.table(1.0)
    coeffs = weights.table(SMALL, directions)
    rounding = weights.rounding if rounds else None
    return lambda: torch.ops.zo_fused.dense_(
        weights.params,
        weights.ids,
        weights.offsets,
        keys,
        coeffs,
        one,
        rounding,
        transform or "portable",
    )


def lowrank(weights: Weights, rank: int) -> Call:
    us, vs = weights.factors(rank)
    coeffs, one = weights.table(SMALL), weights.table(1.0)
    return lambda: torch.ops.zo_fused.lowrank_(weights.params, us, vs, coeffs, one)


def moments(weights: Weights, rule: str, first: torch.dtype | None) -> Call:
    """First moments in the given dtype, none if None; second moments of Adam in float32."""
    firsts = weights.like(first) if first else []
    seconds = weights.like(torch.float32) if rule == "adam" else []
    grads, restores = weights.table(0.5, 1), weights.table(SMALL, 1)
    row = torch.tensor([0.9, 0.1, 0.999, 0.001, 1e-8, -SMALL], device=weights.device)
    coeffs, one = row.expand(len(weights.params), 6).contiguous(), weights.table(1.0)
    streams = (weights.ids, weights.offsets, weights.keys[:1])
    return lambda: torch.ops.zo_fused.moments_(
        weights.params, firsts, seconds, *streams, grads, restores, coeffs, one, rule
    )


def fill(weights: Weights, transform: str) -> Call:
    outs = weights.like(torch.float32)
    return lambda: torch.ops.zo_fused.normal_(
        outs, weights.ids, weights.offsets, weights.keys, transform
    )


def sweeps_of(weights: Weights, transforms: Sequence[str]) -> Iterator[Sweep]:
    """All sweeps over the weights; what each needs is made when its turn comes."""
    elements, moved = weights.elements, weights.bytes
    half = weights.params[0].element_size() == 2
    yield Sweep("dense", dense(weights), moved)
    yield Sweep("dense, rademacher", dense(weights, transform="rademacher"), moved)
    if "fast" in transforms:
        yield Sweep("dense, fast", dense(weights, transform="fast"), moved)
    for rank in RANKS:
        factors = 4 * rank * (weights.rows + weights.columns) * len(weights.params)
        yield Sweep(f"low-rank r={rank}", lowrank(weights, rank), moved + factors)
    yield Sweep("dense, 2 directions", dense(weights, 2), moved)
    if half:
        yield Sweep("dense, stochastic", dense(weights, rounds=True), moved)
        if "fast" in transforms:
            run = dense(weights, rounds=True, transform="fast")
            yield Sweep("dense, fast, stochastic", run, moved)
    yield Sweep("moments, sign", moments(weights, "sign", None), moved)
    yield Sweep(
        "moments, momentum, m fp32",
        moments(weights, "momentum", torch.float32),
        moved + 8 * elements,
    )
    yield Sweep(
        "moments, adam, m fp32", moments(weights, "adam", torch.float32), moved + 16 * elements
    )
    if not half:  # the fill is float32 anyway
        for transform in transforms:
            name = "normals" + f", {transform}" * (transform != "portable")
            yield Sweep(name, fill(weights, transform), 4 * elements)


def sweeps(dtype: str, backend: str) -> Callable[[Bench], None]:
    """Section: every sweep of one backend over weights of one dtype."""

    def section(bench: Bench) -> None:
        label = f"sweeps {dtype}"
        if dtype not in bench.dtypes or not bench.serves(backend, label):
            return
        transforms = dispatch.load(backend).TRANSFORMS
        if "fast" not in transforms:
            bench.record.skip(f"{label} fast, {backend}", "the backend has no fast transform")
        weights = Weights(bench, bench.dtypes[dtype])
        with bench.backend(backend):
            for sweep in sweeps_of(weights, transforms):
                times = bench.race({"": sweep.run}, bench.count(25, 3))[""]
                seconds = statistics.median(times)
                bench.record.row(
                    "sweeps",
                    sweep=sweep.name,
                    backend=backend,
                    dtype=dtype,
                    **{
                        "of copy": sweep.bytes / seconds / bench.copy_rate(),
                        "GB/s": 1e-9 * sweep.bytes / seconds,
                        "G elements/s": 1e-9 * weights.elements / seconds,
                    },
                    **(bench.predicted(f"{sweep.name} {dtype}") if backend == "triton" else {}),
                    **summary(times),
                )

    return section


# ---- rivals of one sweep ------------------------------------------------------------------------


def rivals(bench: Bench) -> None:
    """Section: other ways to perturb the same fp16 weights, in turns with zo_fused."""
    weights = Weights(bench, torch.float16)
    contenders: dict[str, Call] = {}
    for backend in bench.served("rivals"):
        contenders[f"zo_fused MeZO, {backend}"] = bench.on(backend, dense(weights))
        contenders[f"zo_fused LOZO, {backend}"] = bench.on(backend, lowrank(weights, LOZO_RANK))
    for method, make in METHODS.items():
        published = make([nn.Parameter(p.clone()) for p in weights.params])
        contenders[f"published {method}"] = functools.partial(published.perturb, 1e-3)
    if bench.on_gpu:
        try:
            import rivals as triton_rivals
        except ImportError as error:
            bench.record.skip("rivals, tl.randn", str(error))
        else:
            contenders["tl.randn"] = lambda: triton_rivals.perturb_(weights.params, 3, SMALL)
    else:
        bench.record.skip("rivals, tl.randn", "Triton compiles for GPUs")
    race_of_rivals(bench, weights, contenders)


def compiled(bench: Bench) -> None:
    """Section: the published perturbation of MeZO through torch.compile."""
    weights = Weights(bench, torch.float16)

    @torch.compile(backend="inductor" if bench.on_gpu else "aot_eager", dynamic=False)
    def perturb(p: Tensor) -> None:
        p.copy_(p + 1e-3 * torch.randn_like(p) * EPS)

    def everything() -> None:
        for p in weights.params:
            perturb(p)

    left = bench.record.data["deadline"] - time.time()
    with alarm(max(1, min(bench.count(45, 30), int(left)))):
        everything()
    race_of_rivals(bench, weights, {"torch.compile of published MeZO": everything})


def race_of_rivals(bench: Bench, weights: Weights, contenders: Mapping[str, Call]) -> None:
    for name, times in bench.race(contenders, bench.count(21, 3)).items():
        seconds = statistics.median(times)
        bench.record.row(
            "rivals",
            perturbation=name,
            dtype="fp16",
            **{
                "of copy": weights.bytes / seconds / bench.copy_rate(),
                "G elements/s": 1e-9 * weights.elements / seconds,
            },
            **summary(times),
        )


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in the block when the time is over."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# ---- whole steps --------------------------------------------------------------------------------


def parameters(
    bench: Bench, model: str, dtype: torch.dtype, tiny: bool = False
) -> dict[str, nn.Parameter]:
    """Random weights of a model's shapes, made on the device; `tiny`: 16 elements each."""
    return {
        name: nn.Parameter(
            torch.empty(
                ((4, 4) if len(shape) == 2 else (16,)) if tiny else shape,
                dtype=dtype,
                device=bench.device,
            ).normal_(0, 0.02)
        )
        for name, shape in opt_shapes(model).items()
    }


def weight_bytes(params: Mapping[str, Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in params.values())


def optimizer(method: str, params: Mapping[str, nn.Parameter]) -> Any:
    options: dict[str, Any] = {} if method == "MeZO" else {"rank": LOZO_RANK}
    if method == "LOZO-M":
        options["momentum"] = 0.9
    cls = getattr(zo_fused, method.removesuffix("-M"))
    return cls(list(params.items()), lr=LR, eps=EPS, **options)


def fused_step(opt: Any, device: torch.device) -> Call:
    """All of a step but its forward passes."""
    plus, minus = (torch.tensor(x, device=device) for x in (1.0, 0.9))

    def step() -> None:
        try:
            opt.perturb(+1)
            opt.perturb(-1)
            opt.step(loss_plus=plus, loss_minus=minus)
        except BaseException:  # out of time: the next optimizer starts from theta
            opt.flush()
            raise

    return step


def steps(model: str) -> Callable[[Bench], None]:
    """Section: steps of a model's shapes in fp16 against the published code."""

    def section(bench: Bench) -> None:
        shapes = [math.prod(shape) for shape in opt_shapes(model).values()]
        needed = 2 * (sum(shapes) + 8 * max(shapes))  # the published code has temporaries
        if needed > bench.free_memory():
            bench.record.skip(f"steps {model}", f"needs {needed / 1e9:.0f} GB of free GPU memory")
            return
        params = parameters(bench, model, torch.float16)
        for method in ("MeZO", "LOZO", "LOZO-M"):
            calls = {
                backend: fused_step(optimizer(method, params), bench.device)
                for backend in bench.served(f"steps {model} {method}")
            }
            published = METHODS[method](params.values()) if method in METHODS else None
            race_of_steps(
                bench,
                {"model": model, "dtype": "fp16", "method": method},
                calls,
                published and published.step_without_forward,
                3 * 2 * weight_bytes(params) / bench.copy_rate(),
            )

    return section


def race_of_steps(
    bench: Bench,
    labels: dict[str, str],
    fused: Mapping[str, Call],
    published: Call | None,
    copy_seconds: float,
) -> None:
    """Rounds of the published step once and every backend's step three times, untimed before.

    The published code puts the weights elsewhere in memory; the untimed step finds them again.
    """
    times: dict[str, list[float]] = {}
    for round_ in range(1 + bench.count(7, 1)):
        bench.check_time()
        kept = times if round_ else {}  # the first is the warm-up
        if published is not None:
            kept.setdefault("published", []).append(bench.wall(published))
        for backend, call in fused.items():
            with bench.backend(backend):
                call()
                kept.setdefault(backend, []).extend(bench.wall(call) for _ in range(3))
    slow = statistics.median(times["published"]) if published is not None else None
    calls = {**fused, **({"published": published} if published is not None else {})}
    for name, call in calls.items():
        median = statistics.median(times[name])
        with bench.backend(name if name in fused else None):
            extra = bench.peak_extra(call)
        bench.record.row(
            "steps",
            **labels,
            who=name,
            **({"times published": slow / median} if slow and name != "published" else {}),
            **{"of copy": copy_seconds / median},  # of copying all weights three times
            peak_extra_bytes=extra,
            **summary(times[name]),
        )


# ---- CUDA graphs --------------------------------------------------------------------------------


def graphs(bench: Bench) -> None:
    """Section: the three sweeps of MeZO as optimizer, as functions, and replayed from a graph."""
    if not bench.on_gpu:
        bench.record.skip("graphs", "CUDA graphs need a GPU")
        return
    model_names = ("opt-tiny",) if bench.quick else ("opt-125m", "opt-1.3b")
    for backend, model in itertools.product(bench.served("graphs"), model_names):
        params = parameters(bench, model, torch.float16)
        with bench.backend(backend):
            functions = three_sweeps(list(params.values()), bench.device)
            functions()  # compiles, writes the table
            bench.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                functions()
            contenders: dict[str, Call] = {
                "optimizer": fused_step(optimizer("MeZO", params), bench.device),
                "functions": functions,
                "graph": graph.replay,
            }
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for round_ in range(2 + bench.count(21, 3)):
                bench.check_time()
                for name, call in contenders.items():
                    seconds = bench.wall(call)
                    if round_ > 1:
                        times[name].append(seconds)
        for name, taken in times.items():
            bench.record.row("graphs", model=model, backend=backend, how=name, **summary(taken))
        del graph, contenders, functions, params


def three_sweeps(weights: Sequence[Tensor], device: torch.device) -> Call:
    """The sweeps of a MeZO step as functions of numbers that lie on the device."""
    key = int64_tensor([derive_key(0, Purpose.DENSE)], device)
    coeffs = [torch.tensor([c], device=device) for c in (EPS, -2 * EPS, EPS)]
    decay = torch.ones((), device=device)

    def sweeps() -> None:
        for coeff in coeffs:
            zo_fused.update_(weights, key, coeff, decay)

    return sweeps


# ---- launches -----------------------------------------------------------------------------------


def profiled(call: Call) -> Any:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return profiler


@functools.cache
def start_profiler() -> None:
    """The first profile of a process may miss what it is to see."""
    profiled(lambda: None)


def launches(call: Call) -> Mapping[str, int]:
    """Kernels that a call launches, by name, copies and fills by the copy engine left out."""
    from torch.autograd import DeviceType

    start_profiler()
    names = [e.name for e in profiled(call).events() if e.device_type == DeviceType.CUDA]
    return Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))


def host_waits(call: Call) -> int:
    """How often a call makes the host wait for the device, as far as torch can tell."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(w.message) for w in caught)


def overhead(bench: Bench) -> None:
    """Section: host time, kernels and waits of a sweep over as many, but tiny, parameters."""
    for model in ("opt-tiny",) if bench.quick else ("opt-125m", "opt-1.3b"):
        params = parameters(bench, model, torch.float16, tiny=True)
        labels = {"model": model, "parameters": len(params)}
        for backend in bench.served(f"overhead {model}"):
            with bench.backend(backend):
                for name, call in tiny_sweeps(params, bench.device).items():
                    host_time(bench, {**labels, "sweep": f"{name}, {backend}"}, call)
        published = METHODS["MeZO"](params.values())
        call = functools.partial(published.perturb, 1)
        host_time(bench, {**labels, "sweep": "published MeZO"}, call)


def tiny_sweeps(params: Mapping[str, nn.Parameter], device: torch.device) -> dict[str, Call]:
    """A perturbing sweep at each level of the interface."""
    weights = list(params.values())
    ids, key = int64_tensor(range(len(weights))), int64_tensor([5], device)
    offsets, one = torch.zeros_like(ids), torch.ones(len(weights), device=device)
    coeffs, coeff, decay = SMALL * one[:, None], SMALL * one[:1], one[0]

    def alternating(method: str) -> Call:
        # of its own: another optimizer must not be at work on perturbed weights
        own = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        opt, signs = optimizer(method, own), itertools.cycle((1.0, -1.0))
        return lambda: opt.perturb(next(signs))

    return {
        "dense_ operator": lambda: torch.ops.zo_fused.dense_(
            weights, ids, offsets, key, coeffs, one
        ),
        "update_, tensors": lambda: zo_fused.update_(weights, key, coeff, decay),
        "update_, numbers": lambda: zo_fused.update_(weights, [5], [SMALL], 1.0),
        **{f"{method}.perturb": alternating(method) for method in ("MeZO", "LOZO")},
    }


def host_time(bench: Bench, labels: dict[str, Any], call: Call) -> None:
    """A row: host time of a call among many, its kernels, its waits."""
    bench.check_time()
    calls = bench.count(30, 2)

    def many() -> None:
        for _ in range(calls):
            call()

    many()
    times = [bench.wall(many) / calls for _ in range(bench.count(7, 2))]
    bench.record.row(
        "overhead",
        **labels,
        **{"host us": 1e6 * statistics.median(times)},
        kernels=sum(launches(call).values()) if bench.on_gpu else None,
        waits=host_waits(call) if bench.on_gpu else None,
    )


# ---- the machine --------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """What a command prints, "" if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def gpu_state() -> str:
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    fields += ",power.draw,power.limit,temperature.gpu"
    return output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def machine(device: str) -> dict[str, Any]:
    try:
        from importlib.metadata import version

        triton = version("triton")
    except ImportError:
        triton = "none"
    described: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": "none",
        "cuda": torch.version.cuda or "none",
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
        "zo_fused": zo_fused.__version__,
        "commit": output_of("git", "describe", "--always", "--dirty") or "unknown",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        state = gpu_state()
        described |= {
            "device": properties.name,
            "driver": state.split(", ")[1] if state.count(", ") > 1 else "unknown",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "state at start": state,
        }
    return described


# ---- running ------------------------------------------------------------------------------------


def end(bench: Bench) -> None:
    """Section: the copy once more, to see whether the clocks held."""
    copy(bench)
    if bench.on_gpu:
        bench.record.data["machine"]["state at end"] = gpu_state()


def sections(bench: Bench) -> dict[str, Callable[[Bench], None]]:
    """Most important first."""

    def of_dtype(dtype: str) -> dict[str, Callable[[Bench], None]]:
        return {f"sweeps {dtype} {b}": sweeps(dtype, b) for b in bench.backends}

    large, small = ("opt-tiny", None) if bench.quick else ("opt-13b", "opt-1.3b")
    return {
        "copy": copy,
        **of_dtype("fp16"),
        f"steps {large}": steps(large),
        **({f"steps {small}": steps(small)} if small else {}),
        "rivals": rivals,
        "graphs": graphs,
        "overhead": overhead,
        **of_dtype("bf16"),
        **of_dtype("fp32"),
        "compiled": compiled,
        "end": end,
    }


def broken(bench: Bench, error: Exception) -> bool:
    """Whether after this error every further CUDA call fails."""
    if "CUDA error" in str(error):
        return True
    try:
        bench.synchronize()
    except Exception:
        return True
    return False


def run(bench: Bench) -> bool:
    """All sections that are not done. False: a fresh process must do the rest."""
    data = bench.record.data
    for name, section in sections(bench).items():
        if name in data["done"]:
            continue
        data["done"].append(name)
        started, finished = time.monotonic(), True
        try:
            if name != "end":
                bench.check_time()
            section(bench)
            bench.synchronize()  # an error may come late
        except OutOfTimeError:
            data["stopped"] = True
            bench.record.skip(name, f"the budget of {data['budget']} s was spent")
        except Exception as error:
            traceback.print_exc()
            bench.record.row("errors", section=name, error=f"{type(error).__name__}: {error}")
            if name == "copy":
                raise
            finished = not (bench.on_gpu and broken(bench, error))
        data["seconds"][name] = round(time.monotonic() - started, 1)
        bench.record.save()
        if not finished:
            return False
        gc.collect()  # optimizers lie in cycles
        if bench.on_gpu:
            torch.cuda.empty_cache()
    return True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, default=270.0, help="seconds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, few repeats")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--sass", type=Path, help="output of `sass.py --json`, for predictions")
    parser.add_argument("--resume", action="store_true", help="go on with what is not done")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "gpu.json"
    if options.resume:
        data = json.loads(path.read_text(encoding="utf-8"))
    else:
        data = {
            "machine": machine(options.device),
            "quick": options.quick,
            "budget": options.budget,
            "deadline": time.time() + options.budget,
            "stopped": False,
            "finished": False,
            "done": [],
            "seconds": {},
        }
    bench = Bench(options, Record(path, data))
    with torch.no_grad():
        if not run(bench):
            sys.stdout.flush()
            again = [argument for argument in sys.argv if argument != "--resume"]
            os.execv(sys.executable, [sys.executable, *again, "--resume"])
    data["finished"] = True
    bench.record.save()
    gpu_report.write(options.out)
    return int("errors" in data)


if __name__ == "__main__":
    sys.exit(main())
