"""Calls of the sweeps over parameters of all kinds, and their comparison with the reference.

A call has many parameters, each with its own shape, dtype, offset and alignment: what is awkward
about one of them then meets what is awkward about the call (its directions, rule, rounding, ...).
"""

from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from support.equality import Islands, assert_close, assert_same_bits
from support.served import Served
from torch import Tensor

from zo_fused.noise.streams import Purpose, as_int64, derive_key
from zo_fused.sweeps import reference
from zo_fused.sweeps.arguments import mask_bytes
from zo_fused.sweeps.numbers import EXACT as EXACT

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ID = as_int64(0xFEDC_BA98_7654_3210)
KEYS = (0x0123_4567_89AB_CDEF, 0xFFFF_FFFF_0000_0001, 7, 0, 2**64 - 1, 0xDEAD_BEEF_0000_0001, 42)
CARRY = 2**34 - 5  # after five elements the low word of the counter wraps, e // 4,
ROUNDING_CARRY = 2**35 - 5  # that of the rounding stream, e // 8
ROUNDING = torch.tensor([as_int64(0xFEDC_BA98_7654_3210)])

# Over a multiple of every backend's chunks, over wraps, and far.
OFFSETS = (
    *(*range(17), 65_533, CARRY, 2**34 - 40, 2**34 + 3, ROUNDING_CARRY, 2**35 - 40, 2**35 - 201),
    *(2**35 + 3, 2**36 - 40, 2**39 - 40, 2**40 + 1, 2**40 + 3, 2**61 - 5),
)
MISALIGNMENTS = (0, 1, 8, 2, 0, 3, 4, 5, 0, 9, 0)  # elements past a 16-byte boundary

Shape = tuple[int, ...]
Rows = dict[str, Any]


# ---- numbers ------------------------------------------------------------------------------------


def int64(*values: int) -> Tensor:
    return torch.tensor([as_int64(v) for v in values], dtype=torch.int64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of all sizes: normal, subnormal in float16, the largest ones, zeros and infinities."""
    x = random(*shape, seed=seed)
    kind = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(seed + 1))
    x = torch.where(kind == 0, x * 2**-20, x).to(dtype)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2
    for i, value in enumerate((0.0, -0.0, math.inf, -math.inf, largest, -largest, smallest)):
        x[kind == i + 1] = value
    return x


# ---- parameters ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A tensor, and which elements of its full parameter it has."""

    shape: Shape
    dtype: torch.dtype
    offset: int = 0
    misalignment: int = 0

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the matrix that it is to a low-rank sweep."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape) // rows if rows else math.prod(self.shape[1:])


Places = tuple[Place, ...]


@functools.cache
def places(
    shapes: tuple[int | Shape, ...],
    offsets: tuple[int, ...] = OFFSETS,
    misalignments: tuple[int, ...] = MISALIGNMENTS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    start: int = 0,
) -> Places:
    """Every shape in every dtype; offsets and misalignments take turns, from `start` on, and each
    meets each, for their numbers and that of dtypes have no common divisor."""
    made = []
    for i, (shape, dtype) in enumerate(itertools.product(shapes, dtypes), start):
        shape = (shape,) if isinstance(shape, int) else shape
        here = offsets[i % len(offsets)], misalignments[i % len(misalignments)]
        made.append(Place(shape, dtype, *here))
    return tuple(made)


def turn(*options: object) -> int:
    """A start for a row of a matrix, so that rows differ in what is at which offset."""
    return zlib.crc32(repr(options).encode()) % 1000


# ---- calls --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Call:
    """A sweep over `places`: the lists that it writes, those that it only reads, the rest."""

    sweep: str
    places: Places
    written: dict[str, list[Tensor]]
    rest: Rows
    read: dict[str, list[Tensor]] = field(default_factory=dict)
    read_misalignment: int | None = 0  # None: that of the place

    @functools.cached_property
    def wanted(self) -> dict[str, list[Tensor]]:
        """What the reference makes of the written lists (of `fast`: what it shall be close to)."""
        made = {name: [x.clone() for x in xs] for name, xs in self.written.items()}
        transform = {"transform": "portable"} if self.is_fast else {}
        getattr(reference, self.sweep)(**made, **self.read, **self.rest | transform)
        return made

    @property
    def is_fast(self) -> bool:
        return self.rest.get("transform") == "fast"


def check(served: Served, call: Call) -> None:
    """A backend writes what the reference does, and only there."""
    for setting in served.settings:
        islands = Islands(served.device)
        got = {
            name: [islands.put(x, p.misalignment) for x, p in zip(xs, call.places, strict=bool(xs))]
            for name, xs in call.written.items()
        }
        read = {
            name: [
                islands.put(
                    x, p.misalignment if call.read_misalignment is None else call.read_misalignment
                )
                for x, p in zip(xs, call.places, strict=True)
            ]
            for name, xs in call.read.items()
        }
        with setting():
            getattr(served.sweeps, call.sweep)(**got, **read, **on(served.device, call.rest))
        islands.check()
        for name, wanted in (call.wanted | call.read).items():
            for g, w, place in zip((got | read)[name], wanted, call.places, strict=bool(wanted)):
                if call.is_fast:
                    assert_close(g, w, f"{name} of {place}:")
                else:
                    assert_same_bits(g, w, f"{name} of {place}:", any_nan=True)


def on(device: torch.device, rows: Rows) -> Rows:
    on_host = ("ids", "offsets", "script")
    return {
        name: x.to(device) if isinstance(x, Tensor) and name not in on_host else x
        for name, x in rows.items()
    }


def streams(where: Iterable[Place]) -> Rows:
    offsets = [place.offset for place in where]
    ids = [(ID, 7)[i % 2] + i for i in range(len(offsets))]
    return {"ids": int64(*ids), "offsets": int64(*offsets)}


def keys(count: int) -> Tensor:
    return int64(*itertools.islice(itertools.chain(KEYS, itertools.count(100)), count))


def decays(*shape: int, seed: int = 2) -> Tensor:
    decay = 1 + 0.1 * random(*shape, seed=seed)
    decay[::4] = 1
    return decay


def parameters(where: Sequence[Place]) -> list[Tensor]:
    return [weights(*p.shape, dtype=p.dtype, seed=i) for i, p in enumerate(where)]


@functools.lru_cache(maxsize=64)
def fill(where: Places, transform: str = "") -> Call:
    """Words, or given a transform normals."""
    dtype = torch.float32 if transform else torch.int64
    rest = {**streams(where), "keys": keys(len(where))}
    outs = {"outs": [torch.zeros(p.shape, dtype=dtype) for p in where]}
    if not transform:
        return Call("bits_", where, outs, rest)
    return Call("normal_", where, outs, {**rest, "transform": transform})


@functools.lru_cache(maxsize=64)
def dense(
    where: Places, directions: int = 1, rounding: bool = False, transform: str = "portable"
) -> Call:
    count = len(where)
    rest = {
        **streams(where),
        "keys": keys(directions),
        "coeffs": random(count, directions, seed=1),
        "decay": decays(count),
        "rounding": ROUNDING if rounding else None,
        "transform": transform,
    }
    return Call("dense_", where, {"params": parameters(where)}, rest)


def packed_mask(place: Place, seed: int) -> Tensor:
    """Random bits, and in some bytes none or all."""
    size = mask_bytes(math.prod(place.shape), place.offset)
    made = torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed))
    made[::5], made[1::5] = 0, 255
    return made.to(torch.uint8)


@functools.lru_cache(maxsize=64)
def shaped(
    where: Places,
    kinds: tuple[str, ...] = ("mask", "scale", "none"),
    directions: int = 1,
    rounding: bool = False,
    transform: str = "portable",
) -> Call:
    """Kinds of shapes take turns, not in step with dtypes."""
    call = dense(where, directions, rounding, transform)
    shapes = []
    for i, place in enumerate(where):
        kind = kinds[(i + i // len(kinds)) % len(kinds)]
        if kind == "mask":
            shapes.append(packed_mask(place, 400 + i))
        elif kind == "scale":
            shapes.append(scales(*place.shape, seed=400 + i))
        else:
            shapes.append(torch.empty(0))
    return replace(call, sweep="shaped_", read={"shapes": shapes}, read_misalignment=None)


def scales(*shape: int, seed: int) -> Tensor:
    """Of all sizes, zeros among them."""
    made = random(*shape, seed=seed).square() * random(*shape, seed=seed + 1).mul(9).exp()
    return torch.where(made > 1e-3, made, torch.zeros(()))


# A direction again and again, two at once, one from before, roundings of both kinds.
SCRIPT = ((0, -1, -1), (0, 1, 4), (1, -1, -1), (1, 2, -1), (0, 1, 3), (2, 2, 4))


@functools.lru_cache(maxsize=64)
def steps(where: Places, transform: str = "portable") -> Call:
    count, sweeps = len(where), len(SCRIPT)
    rest = {
        **streams(where),
        "keys": keys(5),
        "script": torch.tensor(SCRIPT),
        "coeffs": random(count, sweeps, 2, seed=1),
        "decay": decays(count, sweeps),
        "transform": transform,
    }
    return Call("dense_steps_", where, {"params": parameters(where)}, rest)


@functools.lru_cache(maxsize=64)
def moments(
    where: Places,
    rule: str,
    state: str,
    directions: int = 1,
    rounding: bool = False,
    transform: str = "portable",
) -> Call:
    """state: "nothing" is kept; "float32", "like weights": the dtype of first moments; "squares":
    the call has them; "hessian": seconds are that, and the call has squares."""
    count = len(where)
    numbered = list(enumerate(where))
    firsts, seconds = [], []
    if state == "hessian":
        seconds = [scales(*p.shape, seed=i + 10) for i, p in numbered]
    if state in ("float32", "like weights"):
        kept = [torch.float32 if state == "float32" else p.dtype for p in where]
        firsts = [weights(*p.shape, dtype=kept[i], seed=i + 9) for i, p in numbered]
        seconds = [random(*p.shape, seed=i + 10).square() for i, p in numbered]
    squares = random(count, directions, seed=5).square()
    coeffs = random(count, 6, seed=3)
    coeffs[:, 2:5].abs_()  # of second moments, and eps
    rest = {
        **streams(where),
        "keys": keys(directions),
        "grads": random(count, directions, seed=1),
        "restores": random(count, directions, seed=2) / 16,
        "coeffs": coeffs,
        "decay": decays(count, seed=4),
        "rule": rule,
        "rounding": ROUNDING if rounding else None,
        "transform": transform,
        "squares": squares if state in ("squares", "hessian") else None,
    }
    written = {
        "params": parameters(where),
        "firsts": firsts,
        "seconds": seconds if rule in ("adam", "hizoo") else [],
    }
    return Call("moments_", where, written, rest)


@functools.lru_cache(maxsize=64)
def lowrank(
    where: Places,
    ranks: int | tuple[int, ...],
    momentum: bool = False,
    rounding: bool | None = False,
    factor_misalignment: int = 0,
) -> Call:
    """Ranks take turns. rounding: to nearest, stochastic, or None: without ids and offsets."""
    count = len(where)
    ranks = (ranks,) if isinstance(ranks, int) else ranks
    # Not in step with dtypes, so that there are several ranks in a launch.
    of = [(*p.sides, ranks[(i + i // len(ranks)) % len(ranks)]) for i, p in enumerate(where)]
    written = {"params": parameters(where)}
    if momentum:
        written["moments"] = [random(m, r, seed=300 + i) for i, (m, _, r) in enumerate(of)]
    read = {
        "us": [random(m, r, seed=100 + i) for i, (m, _, r) in enumerate(of)],
        "vs": [random(n, r, seed=200 + i) for i, (_, n, r) in enumerate(of)],
    }
    rest: Rows = {
        "coeffs": random(count, 4, seed=1) if momentum else random(count, seed=1),
        "decay": decays(count),
    }
    if rounding is not None:
        rest |= {**streams(where), "rounding": ROUNDING if rounding else None}
    name = "lowrank_momentum_" if momentum else "lowrank_"
    return Call(name, where, written, rest, read, factor_misalignment)


@functools.lru_cache(maxsize=64)
def factor_momentum(where: Places, ranks: tuple[int, ...]) -> Call:
    sides = [(p.sides[0], ranks[i % len(ranks)]) for i, p in enumerate(where)]
    written = {"moments": [random(*side, seed=300 + i) for i, side in enumerate(sides)]}
    read = {"us": [random(*side, seed=100 + i) for i, side in enumerate(sides)]}
    rest = {"coeffs": random(len(where), seed=1), "decay": decays(len(where))}
    return Call("factor_momentum_", where, written, rest, read)


def check_keys(served: Served, seed: int) -> None:
    """Keys of streams whose step is on the device alone."""
    made = torch.zeros(3, dtype=torch.int64, device=served.device)
    for step, ahead, interval, query in (
        (7, 0, 1, 0),
        (2**40 - 1, 1, 1, 2**32 - 1),
        (99, 1, 50, 3),
    ):
        counter = torch.full((), step, dtype=torch.int64, device=served.device)
        name = as_int64(query | Purpose.V << 32)
        served.sweeps.key_(made[1:2], counter, ahead, interval, name, as_int64(seed))
        wanted = derive_key(seed, Purpose.V, (step + ahead) // interval, query)
        assert made.tolist() == [0, as_int64(wanted), 0]
