"""Whole steps: against their rivals, in CUDA graphs, and what the host does in them."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zo_fused
from bench.gpu.measure import LOZO_RANK, SMALL, Bench, Call, summary
from bench.gpu.rivals import rivals_of
from bench.models import opt_shapes
from bench.published import EPS, LR, METHODS
from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps.conversions import int64_tensor


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
    """Section: steps of a model's shapes in fp16 against the published code and its rivals."""

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
            rivals = rivals_of(bench, method, params.values(), f"steps {model} {method}")
            race_of_steps(
                bench,
                {"model": model, "dtype": "fp16", "method": method},
                calls,
                {name: rival.step_without_forward for name, rival in rivals.items()},
                3 * 2 * weight_bytes(params) / bench.copy_rate(),
            )

    return section


def race_of_steps(
    bench: Bench,
    labels: dict[str, str],
    fused: Mapping[str, Call],
    rivals: Mapping[str, Call],
    copy_seconds: float,
) -> None:
    """Rounds of every rival's step once and every backend's three times, untimed before.

    The published code puts the weights elsewhere in memory; the untimed step finds them again.
    """
    times: dict[str, list[float]] = {}
    for round_ in range(1 + bench.count(7, 1)):
        bench.check_time()
        kept = times if round_ else {}  # the first is the warm-up
        for name, call in rivals.items():
            kept.setdefault(name, []).append(bench.wall(call))
        for backend, call in fused.items():
            with bench.backend(backend):
                call()
                kept.setdefault(backend, []).extend(bench.wall(call) for _ in range(3))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, call in {**fused, **rivals}.items():
        with bench.backend(name if name in fused else None):
            extra = bench.peak_extra(call)
        ratios = {}
        if rivals and name != "published":
            ratios["times published"] = medians["published"] / medians[name]
        if rivals and name in fused:
            ratios["times fastest rival"] = min(medians[r] for r in rivals) / medians[name]
        bench.record.row(
            "steps",
            **labels,
            who=name,
            rival=name in rivals,
            **ratios,
            **{"of copy": copy_seconds / medians[name]},  # of copying all weights three times
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
