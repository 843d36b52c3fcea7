"""Every kernel of a GPU backend over awkward tensors, compared with the reference bit for bit.

``python bench/sanitize.py`` is made to run under ``compute-sanitizer``: many small launches over
aligned, misaligned, odd-sized and empty tensors, through every branch of the kernels. It exits with
1 if a result differs or memory beside a tensor was written. With ``--guard 0`` and
``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` a tensor ends where its memory does, so that memcheck sees
every read beyond it. The GPU tests run the same cases.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from models import DTYPES
from torch import Tensor

import zo_fused
from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps import dispatch
from zo_fused.sweeps.functions import int64_tensor

SIZES = (1, 7, 0, 4099)
LONG = (*SIZES, 2**15 + 13)  # longer than the chunk of a program; the reference is slow
OFFSETS = (0, 3, 4 * 2**32 - 5)  # at the last the low counter word wraps
SHAPES = ((65, 130), (3, 5), (1, 200), (200, 1), (9,), (64, 264), (2, 3, 8), (3, 0))
RANKS = (1, 2, 3, 4, 8, 16, 17, 32, 64)
IDS = 0xFEDC_BA98_7654_3210
KEYS = [derive_key(7, Purpose.DENSE, step) for step in range(3)]
ROUNDING = int64_tensor([derive_key(7, Purpose.ROUNDING)])
EXACT = ("portable", "rademacher")
TRANSFORMS = (*EXACT, "fast")
POISON = 77

# What each operator writes.
WRITTEN = {
    "bits_": ("outs",),
    "normal_": ("outs",),
    "dense_": ("params",),
    "dense_steps_": ("params",),
    "moments_": ("params", "firsts", "seconds"),
    "lowrank_": ("params",),
    "factor_momentum_": ("moments",),
    "lowrank_momentum_": ("params", "moments"),
}


@dataclass(frozen=True)
class Case:
    """One call of an operator, its arguments by name on the CPU."""

    name: str
    operator: str
    arguments: dict[str, Any]
    exact: bool = True  # else the fast transform, which is only close to the reference


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _streams(count: int, offset: int) -> dict[str, Tensor]:
    return {
        "ids": int64_tensor([IDS + i for i in range(count)]),
        "offsets": int64_tensor([offset] * count),
    }


def _decay(count: int) -> Tensor:
    return 1 + 0.1 * _random(count, seed=2)


# ---- the cases ----------------------------------------------------------------------------------


def _fills() -> Iterator[Case]:
    for offset in OFFSETS:
        sizes = SIZES if offset else LONG
        given = {**_streams(len(sizes), offset), "keys": int64_tensor((KEYS * 2)[: len(sizes)])}
        words = [torch.zeros(n, dtype=torch.int64) for n in sizes]
        yield Case(f"bits, offset {offset}", "bits_", {"outs": words, **given})
        for transform in TRANSFORMS:
            outs = [torch.zeros(n) for n in sizes]
            yield Case(
                f"normal, {transform}, offset {offset}",
                "normal_",
                {"outs": outs, **given, "transform": transform},
                transform != "fast",
            )


def _roundings(dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return (None,) if dtype == torch.float32 else (None, ROUNDING)


def _dense() -> Iterator[Case]:
    offsets = itertools.cycle(OFFSETS)
    for (label, dtype), directions in itertools.product(DTYPES.items(), (0, 1, 2, 3)):
        transforms = TRANSFORMS if directions in (1, 2) else ("portable",)
        for rounding, transform in itertools.product(_roundings(dtype), transforms):
            offset = next(offsets)
            sizes = LONG if directions == 1 and rounding is None else SIZES
            yield Case(
                f"dense {label}, K={directions}, {transform}, offset {offset}"
                + (", stochastic" if rounding is not None else ""),
                "dense_",
                {
                    "params": [_random(n, dtype=dtype, seed=n) for n in sizes],
                    **_streams(len(sizes), offset),
                    "keys": int64_tensor(KEYS[:directions]),
                    "coeffs": _random(len(sizes), directions, seed=1),
                    "decay": _decay(len(sizes)),
                    "rounding": rounding,
                    "transform": transform,
                },
                transform != "fast",
            )
    mixed = [_random(100, dtype=dtype) for dtype in DTYPES.values()]
    yield Case(
        "dense, three dtypes in one call",
        "dense_",
        {
            "params": mixed,
            **_streams(3, 1),
            "keys": int64_tensor(KEYS[:1]),
            "coeffs": _random(3, 1, seed=1),
            "decay": _decay(3),
        },
    )


def _moments() -> Iterator[Case]:
    kinds = [
        *(("momentum", first) for first in ("none", "float32", "like the weights")),
        *(("sign", first) for first in ("none", "float32", "like the weights")),
        *(("adam", first) for first in ("float32", "like the weights")),
    ]
    offsets = itertools.cycle(OFFSETS)
    for (label, dtype), (rule, first) in itertools.product(DTYPES.items(), kinds):
        if dtype == torch.float32 and first == "like the weights":
            continue
        forms: list[tuple[int, Tensor | None, str]] = [
            *((1, rounding, "portable") for rounding in _roundings(dtype)),
            *([(2, None, "portable")] if first == "float32" else []),
            *([(1, None, "fast"), (2, None, "rademacher")] if rule == "momentum" else []),
        ]
        state = {"float32": torch.float32, "like the weights": dtype}.get(first)
        for directions, rounding, transform in forms:
            sizes = LONG if first == "none" else SIZES
            offset, count = next(offsets), len(sizes)
            yield Case(
                f"moments {label}, {rule}, m {first}, K={directions}, {transform}, offset {offset}"
                + (", stochastic" if rounding is not None else ""),
                "moments_",
                {
                    "params": [_random(n, dtype=dtype, seed=n) for n in sizes],
                    "firsts": [_random(n, dtype=state, seed=3) for n in sizes] if state else [],
                    "seconds": [_random(n, seed=4).square() for n in sizes]
                    if rule == "adam"
                    else [],
                    **_streams(count, offset),
                    "keys": int64_tensor(KEYS[:directions]),
                    "grads": _random(count, directions, seed=5),
                    "restores": _random(count, directions, seed=6),
                    "coeffs": torch.tensor([[0.9, 0.1, 0.99, 0.01, 1e-3, -0.1]] * count),
                    "decay": _decay(count),
                    "rule": rule,
                    "rounding": rounding,
                    "transform": transform,
                },
                transform != "fast",
            )
    for (label, dtype), directions in itertools.product(DTYPES.items(), (1, 3, 130)):
        sizes = SIZES if directions < 100 else SIZES[:3]
        count, transform = len(sizes), ("portable", "rademacher")[directions == 3]
        for rounding in _roundings(dtype):
            offset = next(offsets)
            yield Case(
                f"moments {label}, adam of squares, K={directions}, {transform}, offset {offset}"
                + (", stochastic" if rounding is not None else ""),
                "moments_",
                {
                    "params": [_random(n, dtype=dtype, seed=n) for n in sizes],
                    "firsts": [],
                    "seconds": [],
                    **_streams(count, offset),
                    "keys": int64_tensor(range(directions)),
                    "grads": _random(count, directions, seed=5),
                    "restores": _random(count, directions, seed=6),
                    "coeffs": torch.tensor([[0.9, 0.1, 0.99, 0.01, 1e-3, -0.1]] * count),
                    "decay": _decay(count),
                    "rule": "adam",
                    "rounding": rounding,
                    "transform": transform,
                    "squares": _random(count, directions, seed=7).square(),
                },
            )


def _matrix(dtype: torch.dtype, rank: int, rounding: Tensor | None) -> dict[str, Any]:
    """Arguments of a low-rank sweep over all shapes, without coefficients."""
    sides = [(s[0], torch.Size(s[1:]).numel()) for s in SHAPES]
    return {
        "params": [_random(*s, dtype=dtype, seed=5) for s in SHAPES],
        "us": [_random(m, rank, seed=3) for m, _ in sides],
        "vs": [_random(n, rank, seed=4) for _, n in sides],
        "decay": _decay(len(SHAPES)),
        **_streams(len(SHAPES), 0),
        "rounding": rounding,
    }


def _lowrank() -> Iterator[Case]:
    for (label, dtype), rank in itertools.product(DTYPES.items(), RANKS):
        for rounding in _roundings(dtype) if rank in (1, 4, 16, 32) else (None,):
            arguments = _matrix(dtype, rank, rounding)
            yield Case(
                f"low rank {label}, r={rank}" + (", stochastic" if rounding is not None else ""),
                "lowrank_",
                {**arguments, "coeffs": _random(len(SHAPES), seed=1)},
            )


def _lowrank_momentum() -> Iterator[Case]:
    for rank in (1, 2, 8):
        us = _matrix(torch.float32, rank, None)["us"]
        given = {"us": us, "coeffs": _random(len(us), seed=1), "decay": _decay(len(us))}
        moments = [_random(*u.shape, seed=6) for u in us]
        name = f"momentum of factors, r={rank}"
        yield Case(name, "factor_momentum_", {"moments": moments, **given})
    for (label, dtype), rank in itertools.product(DTYPES.items(), (1, 2, 8)):
        for rounding in _roundings(dtype):
            arguments = _matrix(dtype, rank, rounding)
            moments = [_random(*u.shape, seed=6) for u in arguments["us"]]
            yield Case(
                f"momentum in the factor {label}, r={rank}"
                + (", stochastic" if rounding is not None else ""),
                "lowrank_momentum_",
                {**arguments, "moments": moments, "coeffs": _random(len(SHAPES), 4, seed=1)},
            )


def _scripts() -> Iterator[Case]:
    rows = torch.tensor([[0, -1, -1], [0, 1, 2], [1, -1, -1]])
    for (label, dtype), transform in zip(DTYPES.items(), itertools.cycle(EXACT), strict=False):
        yield Case(
            f"script {label}, {transform}",
            "dense_steps_",
            {
                "params": [_random(n, dtype=dtype, seed=n) for n in SIZES],
                **_streams(len(SIZES), 3),
                "keys": int64_tensor(KEYS),
                "decay": 1 + 0.1 * _random(len(SIZES), 3, seed=2),
                "script": rows,
                "coeffs": _random(len(SIZES), 3, 2, seed=1),
                "transform": transform,
            },
        )


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "fill": _fills,
    "dense": _dense,
    "moments": _moments,
    "lowrank": _lowrank,
    "lowrank_momentum": _lowrank_momentum,
    "scripts": _scripts,
}

# ---- running and comparing ----------------------------------------------------------------------


class Islands:
    """Tensors in poisoned memory, each `misalignment` elements past a 16-byte boundary."""

    def __init__(self, device: torch.device, misalignment: int, guard: int) -> None:
        self.device, self.start, self.guard = device, guard + misalignment, guard
        self.made: list[tuple[Tensor, int]] = []

    def put(self, x: Tensor) -> Tensor:
        end = self.start + x.numel()
        memory = torch.full((end + self.guard,), POISON, dtype=x.dtype).to(self.device)
        memory[self.start : end].copy_(x.flatten())
        self.made.append((memory, end))
        return memory[self.start : end].view(x.shape)

    def intact(self) -> bool:
        """Whether nothing was written beside a tensor."""
        beside = [(memory[: self.start], memory[end:]) for memory, end in self.made]
        return all(bool((x.cpu() == POISON).all()) for pair in beside for x in pair)


def run(
    case: Case, backend: str, device: torch.device, misalignment: int = 0, guard: int = 64
) -> tuple[list[Tensor], bool]:
    """What a backend makes of a case, on the CPU, and whether it wrote nothing else."""
    islands = Islands(device, misalignment, guard)

    def placed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [islands.put(x) for x in value]
        if isinstance(value, Tensor) and name not in ("ids", "offsets", "script"):
            return value.to(device)
        return value

    arguments = {name: placed(name, value) for name, value in case.arguments.items()}
    previous = zo_fused.set_backend(backend)
    try:
        getattr(torch.ops.zo_fused, case.operator)(**arguments)
    finally:
        zo_fused.set_backend(previous)
    written = [x.cpu() for name in WRITTEN[case.operator] for x in arguments[name]]
    return written, islands.intact()


def expected(case: Case) -> list[Tensor]:
    """What the reference makes of a case (of the fast transform: what it is close to)."""
    given = dict(case.arguments)
    if not case.exact:
        given["transform"] = "portable"
    slow = Case(case.name, case.operator, given)
    return run(slow, "reference", torch.device("cpu"))[0]


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def difference(got: Tensor, wanted: Tensor, exact: bool = True) -> str | None:
    """How a result differs from what was wanted, or None."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return f"{got.dtype} {tuple(got.shape)} for {wanted.dtype} {tuple(wanted.shape)}"
    if exact:
        different = _bits(got) != _bits(wanted)
    else:  # normals are within 1e-3; coefficients below 5, of three directions
        rtol = 2 * torch.finfo(wanted.dtype).eps  # one step of stochastic rounding
        different = ~torch.isclose(got.double(), wanted.double(), rtol=rtol, atol=2e-2)
    places = different.flatten().nonzero().flatten()
    if not len(places):
        return None
    first = int(places[0])
    return (
        f"{len(places)} of {got.numel()} elements differ, the first at {first}: "
        f"{got.flatten()[first]} for {wanted.flatten()[first]}"
    )


def differences(
    case: Case,
    backend: str,
    device: torch.device,
    misalignments: tuple[int, ...] = (0, 1),
    guard: int = 64,
) -> list[str]:
    """Everything in which a backend departs from the reference."""
    wanted = expected(case)
    found = []
    for misalignment in misalignments:
        got, intact = run(case, backend, device, misalignment, guard)
        label = f"{case.name}, misaligned by {misalignment}"
        if not intact:
            found.append(f"{label}: wrote beside a tensor")
        for number, (g, w) in enumerate(zip(got, wanted, strict=True)):
            problem = difference(g, w, case.exact)
            if problem is not None:
                found.append(f"{label}, tensor {number}: {problem}")
    return found


def served(case: Case, backend: str) -> bool:
    """Whether the backend knows the transform of a case."""
    return case.arguments.get("transform", "portable") in dispatch.load(backend).TRANSFORMS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--guard", type=int, default=64, help="poisoned elements round tensors")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.backend not in dispatch.BACKENDS:
        print(f"no backend {options.backend!r}", file=sys.stderr)
        return 2
    reason = dispatch.why_not(options.backend, device.type)
    if reason is not None:
        print(f"{options.backend}: {reason}", file=sys.stderr)
        return 2
    failures = 0
    for family in options.families:
        start, count = time.monotonic(), 0
        for case in FAMILIES[family]():
            if served(case, options.backend):
                count += 1
                found = differences(case, options.backend, device, guard=options.guard)
                failures += len(found)
                print("\n".join(found), end="\n" * bool(found), flush=True)
        seconds = time.monotonic() - start
        print(f"{family}: {count} cases, {seconds:.1f} s", flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{failures} differences from the reference")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
