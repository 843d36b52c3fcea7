"""Every sweep over the weights, of every backend."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu.measure import SMALL, Bench, Call, summary
from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps import dispatch, operators
from zo_fused.sweeps.conversions import int64_tensor

RANKS = (1, 2, 4, 8, 16, 32, 64)


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
    return lambda: operators.dense_(
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
    return lambda: operators.lowrank_(weights.params, us, vs, coeffs, one)


def moments(
    weights: Weights, rule: str, first: torch.dtype | None, transform: str = "portable"
) -> Call:
    """First moments in the given dtype, none if None; second moments of Adam in float32."""
    firsts = weights.like(first) if first else []
    seconds = weights.like(torch.float32) if rule == "adam" else []
    grads, restores = weights.table(0.5, 1), weights.table(SMALL, 1)
    row = torch.tensor([0.9, 0.1, 0.999, 0.001, 1e-8, -SMALL], device=weights.device)
    coeffs, one = row.expand(len(weights.params), 6).contiguous(), weights.table(1.0)
    streams = (weights.ids, weights.offsets, weights.keys[:1])
    rows = (grads, restores, coeffs, one, rule, None, transform)
    return lambda: operators.moments_(weights.params, firsts, seconds, *streams, *rows)


def fill(weights: Weights, transform: str) -> Call:
    outs = weights.like(torch.float32)
    return lambda: operators.normal_(outs, weights.ids, weights.offsets, weights.keys, transform)


def sweeps_of(weights: Weights, transforms: Sequence[str]) -> Iterator[Sweep]:
    """All sweeps over the weights; what each needs is made when its turn comes."""
    elements, moved = weights.elements, weights.bytes
    half = weights.params[0].element_size() == 2
    yield Sweep("dense", dense(weights), moved)
    yield Sweep("dense, signs", dense(weights, transform="signs"), moved)
    yield Sweep("dense, hadamard", dense(weights, transform="hadamard"), moved)
    if "fast" in transforms:
        yield Sweep("dense, fast", dense(weights, transform="fast"), moved)
    for rank in RANKS:
        factors = 4 * rank * (weights.rows + weights.columns) * len(weights.params)
        yield Sweep(f"low-rank r={rank}", lowrank(weights, rank), moved + factors)
    yield Sweep("dense, 2 directions", dense(weights, 2), moved)
    run = dense(weights, 2, transform="hadamard")
    yield Sweep("dense, hadamard, 2 directions", run, moved)
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
    run = moments(weights, "momentum", torch.float32, "hadamard")
    yield Sweep("moments, momentum, m fp32, hadamard", run, moved + 8 * elements)
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
