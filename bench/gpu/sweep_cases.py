"""Calls of every operator over awkward tensors: aligned and not, odd sizes, empty ones, and through
every branch of the kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.models import DTYPES
from zo_fused.noise import Purpose, derive_key
from zo_fused.sweeps.arguments import mask_bytes
from zo_fused.sweeps.conversions import int64_tensor
from zo_fused.sweeps.numbers import EXACT, TRANSFORMS

SIZES = (1, 7, 0, 4099)
LONG = (*SIZES, 2**15 + 13)  # longer than the chunk of a program; the reference is slow
OFFSETS = (0, 3, 4 * 2**32 - 5)  # at the last the low counter word wraps
SHAPES = ((65, 130), (3, 5), (1, 200), (200, 1), (9,), (64, 264), (2, 3, 8), (3, 0))
RANKS = (1, 2, 3, 4, 8, 16, 17, 32, 64)
IDS = 0xFEDC_BA98_7654_3210
KEYS = [derive_key(7, Purpose.DENSE, step) for step in range(3)]
ROUNDING = int64_tensor([derive_key(7, Purpose.ROUNDING)])


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


def _shaped() -> Iterator[Case]:
    offsets = itertools.cycle(OFFSETS)
    for (label, dtype), masked in itertools.product(DTYPES.items(), (True, False)):
        for directions, transform in ((1, "portable"), (2, "portable"), (1, "hadamard")):
            offset = next(offsets)
            bits = [int64_tensor(range(mask_bytes(n, offset))) * 37 % 256 for n in SIZES]
            scales = [_random(n, seed=n + 1).abs() + 0.1 for n in SIZES]
            yield Case(
                f"shaped {label}, {'mask' if masked else 'scale'}, K={directions}, {transform}, "
                f"offset {offset}",
                "shaped_",
                {
                    "params": [_random(n, dtype=dtype, seed=n) for n in SIZES],
                    "shapes": [b.to(torch.uint8) for b in bits] if masked else scales,
                    **_streams(len(SIZES), offset),
                    "keys": int64_tensor(KEYS[:directions]),
                    "coeffs": _random(len(SIZES), directions, seed=1),
                    "decay": _decay(len(SIZES)),
                    "transform": transform,
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
            *([(1, None, "fast"), (2, None, "signs")] if rule == "momentum" else []),
            *([(1, None, "hadamard")] if rule != "sign" else []),
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
        count, transform = len(sizes), ("portable", "signs")[directions == 3]
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
    "shaped": _shaped,
    "moments": _moments,
    "lowrank": _lowrank,
    "lowrank_momentum": _lowrank_momentum,
    "scripts": _scripts,
}
