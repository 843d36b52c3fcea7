"""Every backend equals the reference bit for bit, in every sweep.

A row is a call over parameters of many shapes, dtypes, offsets and alignments (`support.calls`).
What only one backend has is in the file of that backend.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.calls import (
    CARRY,
    DTYPES,
    EXACT,
    ID,
    OFFSETS,
    ROUNDING,
    Call,
    Place,
    Places,
    check,
    check_keys,
    dense,
    factor_momentum,
    fill,
    int64,
    keys,
    lowrank,
    moments,
    on,
    places,
    shaped,
    steps,
    turn,
    weights,
)
from support.equality import Islands, assert_same_bits
from support.matrix import covering
from support.served import NAMES, Served, long_in_triton, serve, too_long_in_triton
from torch import Tensor

from zo_fused.sweeps import reference

# Weights of all sizes overflow, scales are zero, and NumPy warns of it in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) enc:RuntimeWarning"
)

ROUNDED = {"rounding": (False, True)}
SIZES = (0, 9, 300)
EVERY_SIZE = (*range(71), 100, 127, 128, 129, 250, 257, 300, 1000)
MATRICES = (
    *((), (1,), (9,), (1, 40), (40, 1), (3, 5), (17, 24), (5, 48)),
    *((4, 3, 2, 2), (2, 8, 1, 1), (0, 3), (3, 0)),
)
MORE_MATRICES = (
    *(*MATRICES, (9, 33), (6, 3, 2, 4), (33, 12), (64, 256), (70, 264), (70, 300), (9, 512)),
)


@pytest.fixture(params=NAMES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(request.param, tmp_path_factory)


def blocks(edge: int, start: int = 0) -> Places:
    """A tensor in each dtype with whole blocks of so many elements, in step with counters and not,
    where low words of counters wrap, aligned and not."""
    offsets = (0, 5, 2**34 - edge - 8, 2**35 - edge - 8)
    return places((2 * edge + 3,), offsets, (0, 5, 8, 0, 1), start=start)


def chunks(served: Served, start: int = 0) -> Places:
    """Tensors of several chunks, and of parts of them."""
    edge = served.chunk
    near = ((70_001, 65_533), (0, 0), (edge, 0), (edge - 1, 2**34 - 30_000), (105, 2**35 - 40))
    return (
        *(Place((n,), DTYPES[(i + start) % 3], at, i) for i, (n, at) in enumerate(near)),
        *blocks(edge, start),
    )


def drawn(served: Served, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Runs the function below it on as many examples as the backend has time for."""

    def run(function: Callable[..., None]) -> None:
        settings(max_examples=served.examples)(given(**strategies)(function))()

    return run


# ---- noise --------------------------------------------------------------------------------------

of_noise = pytest.mark.parametrize("transform", ["", *EXACT], ids=["words", *EXACT])
NO_DTYPE = {"dtypes": DTYPES[:1]}  # what is filled has one


@of_noise
def test_fills(served: Served, transform: str) -> None:
    check(served, fill(places((0, 1, 63, *[9] * 28), **NO_DTYPE), transform))
    check(served, fill(blocks(served.block), transform))


@long_in_triton
@of_noise
def test_fills_of_every_size(served: Served, transform: str) -> None:
    for start in range(0, 280, 78):
        check(served, fill(places(EVERY_SIZE, start=start, **NO_DTYPE), transform))
    check(served, fill(chunks(served), transform))


@pytest.mark.slow
@too_long_in_triton
@of_noise
def test_fills_of_every_size_at_every_offset(served: Served, transform: str) -> None:
    for offset in OFFSETS:
        check(served, fill(places(EVERY_SIZE, (offset,), **NO_DTYPE), transform))


# ---- dense sweeps -------------------------------------------------------------------------------


@covering(directions=(0, 1, 2, 3), **ROUNDED, transform=EXACT)
def test_dense(served: Served, directions: int, rounding: bool, transform: str) -> None:
    start = turn(directions, rounding, transform)
    where = places(SIZES, start=start) + blocks(served.block, start)
    where += (Place((9,), DTYPES[start % 3], served.chunk - 3),)
    check(served, dense(where, directions, rounding, transform))


@long_in_triton
@covering(directions=(0, 1, 2, 5), **ROUNDED, transform=EXACT)
def test_dense_of_every_size(
    served: Served, directions: int, rounding: bool, transform: str
) -> None:
    where = places(EVERY_SIZE, start=turn(directions, rounding, transform))
    check(served, dense(where, directions, rounding, transform))


@long_in_triton
@covering(misalignment=range(10), **ROUNDED)
def test_dense_at_every_offset(served: Served, misalignment: int, rounding: bool) -> None:
    where = places((9, 100) * (len(OFFSETS) // 2), OFFSETS, (misalignment,))
    check(served, dense(where, 1, rounding))


@long_in_triton
@covering(**ROUNDED, transform=EXACT, start=range(3))
def test_dense_over_chunks(served: Served, rounding: bool, transform: str, start: int) -> None:
    check(served, dense(chunks(served, start), 2, rounding, transform))


SHAPES = ("mask", "scale", "none")


@covering(kind=SHAPES[:2], directions=(0, 1, 2), **ROUNDED, transform=EXACT)
def test_shaped(served: Served, kind: str, directions: int, rounding: bool, transform: str) -> None:
    start = turn(kind, directions, rounding, transform)
    where = places((0, 9), start=start) + blocks(served.block // 2, start)
    check(served, shaped(where, (kind,), directions, rounding, transform))


@long_in_triton
@covering(directions=(0, 1, 3), **ROUNDED, transform=EXACT)
def test_shaped_of_every_size(
    served: Served, directions: int, rounding: bool, transform: str
) -> None:
    where = places(EVERY_SIZE, start=turn(directions, rounding, transform))
    check(served, shaped(where, SHAPES, directions, rounding, transform))


@long_in_triton
@covering(**ROUNDED, transform=EXACT, start=range(2))
def test_shaped_over_chunks(served: Served, rounding: bool, transform: str, start: int) -> None:
    check(served, shaped(chunks(served, start), SHAPES, 2, rounding, transform))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_get_the_noise_of_the_whole(served: Served, dtype: torch.dtype) -> None:
    """Shards that lie side by side; the reference takes the whole."""

    @drawn(
        served,
        numel=st.integers(1, 700),
        offset=st.integers(0, 2**62 - 1000) | st.integers(2**34 - 800, 2**34 + 800),
        cuts=st.lists(st.integers(0, 700), max_size=4),
        misalignment=st.integers(0, 9),
        rounding=st.booleans(),
    )
    def run(numel: int, offset: int, cuts: list[int], misalignment: int, rounding: bool) -> None:
        whole = weights(numel, dtype=dtype)
        islands = Islands(served.device)
        parts = islands.put(whole, misalignment)
        ends = sorted({0, numel, *(cut % numel for cut in cuts)})

        def rows(starts: list[int]) -> dict[str, Any]:
            count = len(starts)
            return {
                "ids": int64(*[ID] * count),
                "offsets": int64(*(offset + start for start in starts)),
                "keys": keys(2),
                "coeffs": torch.tensor([[0.5, -0.25]]).repeat(count, 1),
                "decay": torch.full((count,), 0.9),
                "rounding": ROUNDING if rounding else None,
            }

        pieces = [parts[a:b] for a, b in itertools.pairwise(ends)]
        served.sweeps.dense_(pieces, **on(served.device, rows(ends[:-1])))
        islands.check()
        reference.dense_([whole], **rows([0]))
        assert_same_bits(parts, whole, any_nan=True)


@pytest.mark.parametrize("seed", [5, 2**40 + 1, 2**64 - 3])
def test_keys_of_a_counter_on_the_device(served: Served, seed: int) -> None:
    """Captured steps make their keys so."""
    check_keys(served, seed)


@pytest.mark.parametrize("transform", EXACT)
def test_scripts(served: Served, transform: str) -> None:
    check(served, steps(places(((3, 5), (3, 0)), start=turn(transform)), transform))


@too_long_in_triton
@pytest.mark.parametrize("transform", EXACT)
def test_scripts_of_every_size(served: Served, transform: str) -> None:
    shapes = ((), (9,), (1, 200), (200, 1), (2, 3, 8), (7, 61), (300,), *range(0, 71, 5))
    check(served, steps(places(shapes, start=turn(transform)), transform))
    check(served, steps(places(((70_000,), (300, 70), (17, 2100)), (0,), (0,)), transform))


@long_in_triton
def test_scripts_of_any_shape(served: Served) -> None:
    @drawn(
        served,
        rows=st.integers(0, 40),
        columns=st.integers(1, 70),
        offset=st.integers(0, 300),
        misalignment=st.integers(0, 8),
        dtype=st.sampled_from(DTYPES),
    )
    def run(rows: int, columns: int, **rest: Any) -> None:
        check(served, steps((Place((rows, columns), **rest),)))


# ---- weights of all sizes -----------------------------------------------------------------------


def of_weights(weights: Tensor, decay: float, coeff: float | None, rounding: bool) -> Call:
    """A dense sweep of one direction, or none, over these weights."""
    rest = {
        "ids": int64(ID),
        "offsets": int64(0),
        "keys": keys(coeff is not None),
        "coeffs": torch.tensor([[] if coeff is None else [coeff]], dtype=torch.float32),
        "decay": torch.tensor([decay]),
        "rounding": ROUNDING if rounding else None,
    }
    where = (Place(tuple(weights.shape), weights.dtype),)
    return Call("dense_", where, {"params": [weights]}, rest)


@long_in_triton
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_16_bit_weight(served: Served, dtype: torch.dtype) -> None:
    """All 2**16 bit patterns, rounded after a multiplication that gives ties and numbers of all
    sizes between two neighbours."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for decay in (1.0, 0.5, 0.75, 1.5, 2.0**-9, 3.0):
        for rounding in (False, True):
            check(served, of_weights(every, decay, None, rounding))


@long_in_triton
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_rounding_of_floats_of_all_sizes(served: Served, dtype: torch.dtype) -> None:
    """The weights become kept first moments, which are any float32 but NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=generator)
    # Half of them about as large as the numbers of float16, subnormal ones included.
    exponent = torch.randint(100, 146, bits.shape, generator=generator)
    bits[::2] = bits[::2] & -0x7F800001 | (exponent << 23)[::2]
    bits[1::4] &= -0x2000  # as they are, in float16
    special = (0.0, 2.0**-149, 2.0**-126, 2.0**-24, 2.0**-14, 65504.0, 65519.0, 65520.0, math.inf)
    both = torch.tensor([(s, -s) * 50 for s in special]).flatten()
    x = torch.cat([bits.to(torch.int32).view(torch.float32), both])
    x = x[~x.isnan()]
    none = torch.zeros(1, 0)
    rest = {
        "ids": int64(0),
        "offsets": int64(0),
        "keys": int64(),
        "grads": none,
        "restores": none,
        "coeffs": torch.tensor([[1.0, 0, 0, 0, 0, 1]]),
        "decay": torch.ones(1),
        "rule": "momentum",
        "rounding": ROUNDING,
    }
    written = {"params": [torch.zeros_like(x, dtype=dtype)], "firsts": [x], "seconds": []}
    check(served, Call("moments_", (Place((len(x),), dtype),), written, rest))


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(served: Served, dtype: torch.dtype, rounding: bool) -> None:
    quiet, negative, signalling = 0x7FC00000, -0x400000, 0x7F800001
    patterns = torch.tensor([quiet, negative, signalling, -1] * 19, dtype=torch.int32)
    call = of_weights(patterns.view(torch.float32).to(dtype), 1.0, 1.0, rounding)
    assert call.wanted["params"][0].isnan().all()
    check(served, call)


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes(served: Served, dtype: torch.dtype, rounding: bool) -> None:
    info = torch.finfo(dtype)
    extremes = [info.max, -info.max, info.tiny, info.tiny / 4, 0.0, -0.0, math.inf, -math.inf]
    call = of_weights(torch.tensor(extremes * 3, dtype=dtype), 1.5, info.tiny, rounding)
    assert call.wanted["params"][0].isinf().sum() == 12
    check(served, call)
    written = {"params": [torch.tensor([extremes] * 2, dtype=dtype)]}
    read = {"us": [torch.tensor([[info.tiny], [-0.0]])], "vs": [torch.ones(8, 1)]}
    rest = {
        "coeffs": torch.ones(1),
        "decay": torch.tensor([1.25]),
        "ids": int64(0),
        "offsets": int64(0),
        "rounding": ROUNDING if rounding else None,
    }
    check(served, Call("lowrank_", (Place((2, 8), dtype),), written, rest, read))


@long_in_triton
@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_lowrank_keeps_the_sign_of_zero(served: Served, rank: int) -> None:
    where = places(((8, 8),), (0,), (0,))
    for u, v in ((0.0, 1.0), (-0.0, 1.0), (-1e-30, 1e-30)):
        read = {name: [torch.full((8, rank), x)] * 3 for name, x in (("us", u), ("vs", v))}
        written = {"params": [torch.full((8, 8), -0.0, dtype=dtype) for dtype in DTYPES]}
        rest = {"coeffs": torch.tensor([1.0, -1.0, 1.0]), "decay": torch.ones(3)}
        check(served, Call("lowrank_", where, written, rest, read))


# ---- moments ------------------------------------------------------------------------------------

KINDS = (
    *itertools.product(("momentum", "sign"), ("nothing", "float32", "like weights")),
    *itertools.product(("adam",), ("float32", "like weights", "squares")),
    ("hizoo", "hessian"),
)
moment_options = covering(kind=KINDS, directions=(1, 2), **ROUNDED, transform=EXACT)


@moment_options
def test_moments(
    served: Served, kind: tuple[str, str], directions: int, rounding: bool, transform: str
) -> None:
    start = turn(kind, directions, rounding, transform)
    where = places((0, 3), start=start) + blocks(served.block // 2, start)
    check(served, moments(where, *kind, directions, rounding, transform))


@covering(kind=(("sign", "like weights"), ("adam", "float32")), directions=(0, 3), **ROUNDED)
def test_moments_of_no_and_more_directions(
    served: Served, kind: tuple[str, str], directions: int, rounding: bool
) -> None:
    where = places((9,), start=turn(kind, directions))
    check(served, moments(where, *kind, directions, rounding))


@pytest.mark.parametrize("directions", [0, 130])
def test_adam_of_no_and_many_squares(served: Served, directions: int) -> None:
    where = places((9, 100), (5,), dtypes=DTYPES[1:2])
    check(served, moments(where, "adam", "squares", directions, False, "signs"))


@long_in_triton
@pytest.mark.parametrize("kind", KINDS)
def test_moments_of_many_directions(served: Served, kind: tuple[str, str]) -> None:
    check(served, moments(places((300, ())), *kind, 130, False, "signs"))


@long_in_triton
@moment_options
def test_moments_of_every_size(
    served: Served, kind: tuple[str, str], directions: int, rounding: bool, transform: str
) -> None:
    sizes = (0, 1, 2, 3, 5, 7, 8, 9, 17, 31, 63, 64, 100, 127, 128, 129, 300, 1000)
    for more in (-1, 1):
        start = turn(kind, directions, rounding, transform, more)
        where = places(sizes, start=start)
        check(served, moments(where, *kind, directions + more, rounding, transform))


@too_long_in_triton
@pytest.mark.parametrize("kind", KINDS)
def test_moments_over_chunks(served: Served, kind: tuple[str, str]) -> None:
    check(served, moments(chunks(served, turn(kind)), *kind, 1, True))


@long_in_triton
@pytest.mark.parametrize("rule", ["momentum", "adam", "sign"])
def test_moments_of_any_size(served: Served, rule: str) -> None:
    @drawn(
        served,
        dtype=st.sampled_from(DTYPES),
        state=st.sampled_from(("float32", "like weights")),
        numel=st.integers(1, 500),
        offset=st.integers(0, 2**61) | st.integers(2**35 - 600, 2**35 + 100),
        directions=st.integers(0, 3),
        misalignment=st.integers(0, 5),
        rounding=st.booleans(),
    )
    def run(numel: int, dtype: torch.dtype, offset: int, misalignment: int, **options: Any) -> None:
        check(served, moments((Place((numel,), dtype, offset, misalignment),), rule, **options))


# ---- low rank -----------------------------------------------------------------------------------

RANKS = (1, 2, 3, 4, 8, 12, 16, 17, 33, 64)


@covering(momentum=(False, True), **ROUNDED)
def test_lowrank(served: Served, momentum: bool, rounding: bool) -> None:
    check(served, lowrank(places(MATRICES, start=turn(momentum, rounding)), 2, momentum, rounding))


@pytest.mark.parametrize("momentum", [False, True])
def test_lowrank_without_streams(served: Served, momentum: bool) -> None:
    check(served, lowrank(places(((5, 7),)), 2, momentum, None))


@covering(rank=RANKS, dtype=DTYPES, momentum=(False, True), **ROUNDED)
def test_lowrank_ranks(
    served: Served, rank: int, dtype: torch.dtype, momentum: bool, rounding: bool
) -> None:
    where = (Place((16, 256), dtype), Place((5, 40), dtype, CARRY))
    check(served, lowrank(where, rank, momentum, rounding))


@long_in_triton
@covering(rank=(*RANKS, 5, 6, 7, 9), **ROUNDED, momentum=(False, True))
def test_lowrank_of_every_shape(served: Served, rank: int, rounding: bool, momentum: bool) -> None:
    where = places(MORE_MATRICES, start=turn(rank, rounding, momentum))
    check(served, lowrank(where, rank, momentum, rounding))


@long_in_triton
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(
    "offset",
    [pytest.param(n, marks=() if n in (0, 7, 2**35 - 40) else pytest.mark.slow) for n in OFFSETS],
)
def test_lowrank_at_offsets(served: Served, offset: int, rank: int) -> None:
    check(served, lowrank(places(MORE_MATRICES, (offset,)), rank, rounding=True))


@pytest.mark.parametrize("momentum", [False, True])
def test_lowrank_of_mixed_ranks(served: Served, momentum: bool) -> None:
    shapes = ((9, 16), (7,), (3, 3), (5, 2, 2), (1, 1), (2, 64))
    check(served, lowrank(places(shapes, start=turn(momentum)), (4, 1, 2), momentum, True))


@long_in_triton
@pytest.mark.parametrize("ranks", [(4, 4, 1), (8, 3, 2, 16), (33, 4)])
def test_lowrank_of_more_mixed_ranks(served: Served, ranks: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        where = places(MORE_MATRICES, dtypes=(dtype,), start=turn(ranks, dtype))
        check(served, lowrank(where, ranks))
        check(served, lowrank(where, ranks, True, True))


@covering(dtype=DTYPES, **ROUNDED)
def test_lowrank_tiles(served: Served, dtype: torch.dtype, rounding: bool) -> None:
    """Groups of rows and columns beyond the edges, and more than a tile both ways."""
    where = places(((18, 300), (146, 296)), (0,), (0,), (dtype,))
    check(served, lowrank(where, 2, rounding=rounding))


@pytest.mark.parametrize("misalignment", [1, 2, 4, 8])
def test_lowrank_of_misaligned_factors(served: Served, misalignment: int) -> None:
    where = places(((5, 48), (5, 48)), (0,), (0, misalignment))
    check(served, lowrank(where, (4, 4, 2), True, True, misalignment))


@long_in_triton
@covering(misalignment=(1, 2, 4, 8), rank=(1, 4, 16))
def test_lowrank_misaligned(served: Served, misalignment: int, rank: int) -> None:
    check(served, lowrank(places(MORE_MATRICES, (0,), (misalignment,)), rank))
    where = places(MORE_MATRICES, (0,), (0,))
    check(served, lowrank(where, rank, factor_misalignment=misalignment))


@long_in_triton
@pytest.mark.parametrize("rounding", [False, True])
def test_lowrank_of_any_shape(served: Served, rounding: bool) -> None:
    @drawn(
        served,
        rows=st.integers(1, 40),
        columns=st.integers(1, 70) | st.integers(1, 70).map(lambda n: 8 * n),
        rank=st.integers(1, 12),
        misalignment=st.integers(0, 5),
        offset=st.integers(0, 16) | st.integers(2**35 - 6000, 2**35 + 8) | st.integers(0, 2**61),
        dtype=st.sampled_from(DTYPES),
        momentum=st.booleans(),
    )
    def run(rows: int, columns: int, rank: int, momentum: bool, **rest: Any) -> None:
        check(served, lowrank((Place((rows, columns), **rest),), rank, momentum, rounding))


@too_long_in_triton
@covering(**ROUNDED, momentum=(False, True), dtype=DTYPES[:2])
def test_lowrank_over_chunks(
    served: Served, rounding: bool, momentum: bool, dtype: torch.dtype
) -> None:
    for shape, rank in (
        *(((2, 67_001), 1), ((2, 35_001), 5), ((2, 35_008), 5), ((67_001, 2), 2)),
        *(((150_001,), 1), ((35, 2_100), 64)),
    ):
        where = (Place(shape, dtype, 2**35 - 70_000),)
        check(served, lowrank(where, rank, momentum, rounding))


@pytest.mark.parametrize("ranks", [(1,), (8,), (64,), (2, 3, 1, 5)])
def test_factor_momentum(served: Served, ranks: tuple[int, ...]) -> None:
    check(served, factor_momentum(places(((5,), (1, 9), (260, 3), (1100, 2), (0, 3))), ranks))
