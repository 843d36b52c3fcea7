"""The calls that compiled kernels are put to: every form of a kernel, over parameters whose blocks
are whole and aligned, begin one element late, or are short, and over wraps of counters.

A row is a call or two with weights of one dtype, so that it takes few kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from support.calls import (
    DTYPES,
    EXACT,
    Call,
    Place,
    Places,
    check_keys,
    dense,
    factor_momentum,
    fill,
    lowrank,
    moments,
    places,
    shaped,
    steps,
    turn,
)
from support.matrix import combinations, name_of
from support.served import Served

from zo_fused.sweeps.numbers import TRANSFORMS

STOCHASTIC = "stochastic"
KEPT = ("nothing", "momentum")
ROUNDINGS = ("nearest", STOCHASTIC)
KINDS = (
    *("momentum, nothing", "momentum, float32", "momentum, like weights"),
    *("sign, nothing", "sign, float32", "sign, like weights"),
    *("adam, float32", "adam, like weights", "adam, squares"),
    "hizoo, hessian",
)
RANKS = (1, 2, 3, 4, 8, 16, 17, 64)
SHAPES = ((17, 256), (5, 40), (1, 200), (200, 1), (9,), (2, 8, 1, 1), (3, 0), (3, 5))

Row = Callable[[Served], Iterator[Call]]


def noise(served: Served, dtype: torch.dtype, start: int) -> Places:
    """Whole blocks, aligned and not, short tensors, wraps of low words of counters."""
    edge = served.block
    offset = (0, 5, 2**34 - edge - 8, 2**35 - edge - 8)[start % 4]
    return (
        Place((2 * edge + 3,), dtype, offset, offset % 8),
        Place((edge + 9,), dtype, offset, offset % 8 + 1),
        *places((0, 1, 9, 63, 300), dtypes=(dtype,), start=start),
    )


def _fills(served: Served, transform: str) -> Iterator[Call]:
    where = noise(served, torch.float32, turn(transform))
    yield fill(where, "" if transform == "words" else transform)


def _dense(
    served: Served, dtype: torch.dtype, directions: int, rounding: str, transform: str
) -> Iterator[Call]:
    start = turn(dtype, directions, rounding, transform)
    yield dense(noise(served, dtype, start), directions, rounding == STOCHASTIC, transform)


def _shaped(
    served: Served, kind: str, dtype: torch.dtype, directions: int, rounding: str, transform: str
) -> Iterator[Call]:
    start = turn(kind, dtype, directions, rounding, transform)
    where = noise(served, dtype, start)
    yield shaped(where, (kind,), directions, rounding == STOCHASTIC, transform)


def _steps(served: Served, dtype: torch.dtype, transform: str, rounding: str) -> Iterator[Call]:
    call = steps(noise(served, dtype, turn(dtype, transform, rounding)), transform)
    if rounding != STOCHASTIC:
        script = call.rest["script"].clone()
        script[:, 2] = -1
        call = replace(call, rest=call.rest | {"script": script})
    yield call


def _moments(
    served: Served,
    kind: str,
    dtype: torch.dtype,
    directions: int,
    rounding: str,
    transform: str,
) -> Iterator[Call]:
    start = turn(kind, dtype, directions, rounding, transform)
    rule, state = kind.split(", ")
    where, stochastic = noise(served, dtype, start), rounding == STOCHASTIC
    yield moments(where, rule, state, directions, stochastic, transform)


def _lowrank(
    served: Served, rank: int, dtype: torch.dtype, kept: str, rounding: str
) -> Iterator[Call]:
    start = turn(rank, dtype, kept, rounding)
    tiles = (130 if rank <= 8 else 34, 264)  # whole ones, and parts; of higher ranks they take long
    # Weights aligned or not, and factors.
    for weights, factors, shapes in ((0, 0, (tiles, *SHAPES)), (1, 0, SHAPES[1:3]), (0, 1, SHAPES)):
        where = places(shapes, misalignments=(weights,), dtypes=(dtype,), start=start)
        yield lowrank(where, rank, kept == "momentum", rounding == STOCHASTIC, factors)


def _factors(served: Served, ranks: str) -> Iterator[Call]:
    where = places(((2100,), (3, 5)), (0,), (0, 1, 0), DTYPES[2:])
    yield factor_momentum(where, tuple(map(int, ranks.split())))


def _keys(served: Served, seed: int) -> Iterator[Call]:
    check_keys(served, seed)
    return iter(())


# Functions of calls, and what is combined.
FAMILIES: dict[str, tuple[Callable[..., Iterator[Call]], dict[str, Iterable[Any]]]] = {
    "keys": (_keys, {"seed": (5, 2**64 - 3)}),
    "fills": (_fills, {"transform": ("words", *TRANSFORMS)}),
    "dense": (
        _dense,
        {
            "dtype": DTYPES,
            "directions": (0, 1, 2, 3),
            "rounding": ROUNDINGS,
            "transform": TRANSFORMS,
        },
    ),
    "shaped": (
        _shaped,
        {
            "kind": ("mask", "scale"),
            "dtype": DTYPES,
            "directions": (1, 2),
            "rounding": ROUNDINGS,
            "transform": EXACT,
        },
    ),
    "steps": (_steps, {"dtype": DTYPES, "transform": EXACT, "rounding": ROUNDINGS}),
    "moments": (
        _moments,
        {
            "kind": KINDS,
            "dtype": DTYPES,
            "directions": (1, 2, 3),
            "rounding": ROUNDINGS,
            "transform": EXACT,
        },
    ),
    "moments, fast": (
        _moments,
        {
            "kind": KINDS[1:2],  # where errors stay small
            "dtype": DTYPES,
            "directions": (1,),
            "rounding": ROUNDINGS[:1],
            "transform": ("fast",),
        },
    ),
    "low rank": (
        _lowrank,
        {"rank": RANKS, "dtype": DTYPES, "kept": KEPT, "rounding": ROUNDINGS},
    ),
    "factors": (_factors, {"ranks": ("1 2 8",)}),
    # Kernels of CUDA that pairs leave out.
    "moments, squares": (
        _moments,
        {
            "kind": KINDS[-2:-1],
            "dtype": DTYPES,
            "directions": (3,),
            "rounding": ROUNDINGS,
            "transform": EXACT[:1],
        },
    ),
    "moments, hizoo": (
        _moments,
        {
            "kind": KINDS[-1:],
            "dtype": DTYPES,
            "directions": (2,),
            "rounding": ROUNDINGS,
            "transform": EXACT[:1],
        },
    ),
    "shaped, scale": (
        _shaped,
        {
            "kind": ("scale",),
            "dtype": DTYPES,
            "directions": (2,),
            "rounding": ROUNDINGS,
            "transform": EXACT[:1],
        },
    ),
    "low rank, rank known": (
        _lowrank,
        {"rank": (1, 2, 4, 8), "dtype": DTYPES, "kept": KEPT[1:], "rounding": ROUNDINGS[:1]},
    ),
}


CUDA_ONLY = ("moments, squares", "moments, hizoo", "shaped, scale", "low rank, rank known")


@functools.cache
def rows(family: str, every: bool = False) -> dict[str, Row]:
    """The rows of a family by name: those in which every two values of different axes meet, or
    every combination."""
    calls, axes = FAMILIES[family]
    return {
        f"{family}: {', '.join(map(name_of, values))}": functools.partial(
            calls, **dict(zip(axes, values, strict=True))
        )
        for values, needed in combinations(**axes)
        if every or needed
    }


def row(name: str) -> Row:
    """The row of a name."""
    return rows(name.partition(":")[0], every=True)[name]
