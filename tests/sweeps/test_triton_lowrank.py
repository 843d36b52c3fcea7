"""Low-rank sweeps of the Triton backend equal the reference, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from zo_fused.noise.streams import as_int64
from zo_fused.sweeps import reference

pytest.importorskip("triton")


from support.equality import Islands, assert_same_bits
from zo_fused_kernels import launch, sweeps

from zo_fused.sweeps.backends import triton as backend

UNFIT = backend.interpreter_fails()
pytestmark = pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))

HALF, BRAIN, SINGLE = DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS, COLUMNS = launch.TILE
ID = as_int64(0xFEDC_BA98_7654_3210)
KEY = torch.tensor([as_int64(0xFFFF_FFFF_0000_0001)])

Shape = tuple[int, ...]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sides(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape) // rows if rows else math.prod(shape[1:])


def check(
    device: torch.device,
    shapes: Sequence[Shape],
    ranks: Sequence[int] = (2,),
    dtypes: Sequence[torch.dtype] = (HALF,),
    rounds: bool = False,
    momentum: bool = False,
    offsets: Sequence[int] = (0,),
    misalignment: int = 0,
    factor_misalignment: int = 0,
) -> None:
    """One call with every shape; ranks, dtypes and offsets take turns."""
    count = len(shapes)
    ranks = [ranks[i % len(ranks)] for i in range(count)]
    wanted = [random(*shape, seed=i).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    us = [random(sides(s)[0], ranks[i], seed=100 + i) for i, s in enumerate(shapes)]
    vs = [random(sides(s)[1], ranks[i], seed=200 + i) for i, s in enumerate(shapes)]
    moments = [random(*u.shape, seed=300 + i) for i, u in enumerate(us)] if momentum else []
    coeffs = random(count, *((4,) if momentum else ()), seed=1)
    decay = 1 + 0.1 * random(count, seed=2)
    ids = torch.tensor([ID + i for i in range(count)])
    starts = torch.tensor([offsets[i % len(offsets)] for i in range(count)])
    stream = (ids, starts, KEY) if rounds else ()

    islands = Islands(device, misalignment)
    got = [islands.put(w) for w in wanted]
    beside = Islands(device, factor_misalignment)
    got_moments, got_us, got_vs = ([beside.put(x) for x in xs] for xs in (moments, us, vs))
    key = () if not rounds else (ids, starts, KEY.to(device))
    scalars = (coeffs.to(device), decay.to(device))
    if momentum:
        reference.lowrank_momentum_(wanted, moments, us, vs, coeffs, decay, *stream)
        backend.lowrank_momentum_(got, got_moments, got_us, got_vs, *scalars, *key)
    else:
        reference.lowrank_(wanted, us, vs, coeffs, decay, *stream)
        backend.lowrank_(got, got_us, got_vs, *scalars, *key)

    islands.check()
    beside.check()
    for shape, rank, g, w in zip(shapes, ranks, got, wanted, strict=True):
        assert_same_bits(g, w, f"{shape} of rank {rank}:")
    for case in ((got_moments, moments), (got_us, us), (got_vs, vs)):
        for g, w in zip(*case, strict=True):
            assert_same_bits(g, w, "a factor:")


SMALL: tuple[Shape, ...] = (
    (1, 1), (1, 37), (37, 1), (3, 5), (17, 24), (), (9,), (0, 3), (3, 0), (4, 3, 2, 2),
    (2, 8, 1, 1),
)  # fmt: skip
ALL = pytest.mark.parametrize("dtype", DTYPES)
ROUNDING = pytest.mark.parametrize("rounds", [False, True], ids=["nearest", "stochastic"])
MOMENTUM = pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])


@ALL
@ROUNDING
@MOMENTUM
def test_shapes(dtype: torch.dtype, rounds: bool, momentum: bool, device: torch.device) -> None:
    check(device, SMALL, (2,), (dtype,), rounds, momentum)


@ALL
@ROUNDING
def test_tiles(dtype: torch.dtype, rounds: bool, device: torch.device) -> None:
    # Whole tiles, groups of rows and columns beyond the edges, and more than a tile both ways.
    check(device, ((64, 256), (70, 300), (ROWS + 18, COLUMNS + 40)), (2,), (dtype,), rounds)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 17, 33, 64])
def test_ranks(rank: int, device: torch.device) -> None:
    shapes = ((launch.GROUP, COLUMNS), (5, 40))
    check(device, shapes, (rank,), (HALF if rank % 2 else SINGLE,), momentum=rank == 4)


def test_rank_of_loop_in_every_dtype(device: torch.device) -> None:
    check(device, ((5, 40),) * 3, (12,), DTYPES, rounds=True)


@pytest.mark.parametrize("misalignment", [1, 4, 8])
def test_misaligned_weights(misalignment: int, device: torch.device) -> None:
    check(device, ((5, 48),) * 3, (4,), DTYPES, rounds=True, misalignment=misalignment)


@pytest.mark.parametrize("misalignment", [1, 2])
def test_misaligned_factors(misalignment: int, device: torch.device) -> None:
    check(device, ((5, 48),) * 2, (4, 2), momentum=True, factor_misalignment=misalignment)


def test_offsets(device: torch.device) -> None:
    # In and out of step with counters, and where their low words wrap.
    offsets = (1, 8, 8 * 2**32 - 48, 8 * 2**32 - 37, 2**40 + 3)
    check(device, ((6, 24),) * 5, (1,), (BRAIN,), rounds=True, offsets=offsets)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the low-rank kernels launched so far."""
    made: list[str] = []

    def count(name: str) -> None:
        run = getattr(sweeps, name)
        monkeypatch.setattr(sweeps, name, lambda *args: (made.append(name), run(*args))[1])

    count("lowrank")
    count("factor_momentum")
    return made


@MOMENTUM
def test_one_launch_a_dtype(momentum: bool, launches: list[str], device: torch.device) -> None:
    shapes = ((9, 16), (7,), (3, 3), (5, 2, 2), (4, 8), (6,), (1, 1), (2, 64))
    dtypes = (HALF, HALF, SINGLE, SINGLE)
    check(device, shapes, (4, 1, 2), dtypes, rounds=True, momentum=momentum)
    assert launches == ["factor_momentum"] * 2 * momentum + ["lowrank"] * 2


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@ALL
@ROUNDING
def test_extremes(dtype: torch.dtype, rounds: bool, device: torch.device) -> None:
    info = torch.finfo(dtype)
    extremes = [info.max, -info.max, info.tiny, info.tiny / 4, 0.0, -0.0, math.inf, -math.inf]
    wanted = torch.tensor([extremes] * 2, dtype=dtype)
    u, v = torch.tensor([[info.tiny], [-0.0]]), torch.ones(8, 1)
    one, decay = torch.ones(1), torch.tensor([1.25])
    got = wanted.to(device, copy=True)
    zero = torch.zeros(1, dtype=torch.int64)
    stream = (zero, zero, KEY) if rounds else ()
    reference.lowrank_([wanted], [u], [v], one, decay, *stream)
    backend.lowrank_(
        [got], [u.to(device)], [v.to(device)], one.to(device), decay.to(device),
        *stream[:2], *(x.to(device) for x in stream[2:]),
    )  # fmt: skip
    assert_same_bits(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 16])
def test_large_matrices(rank: int, device: torch.device) -> None:
    shapes = ((2048, 1024), (1000, 4104), (3, 300_001), (4097, 776))
    check(device, shapes, (rank, 1, 3, rank), (HALF,), rounds=True)
    check(device, shapes, (rank,), (BRAIN,), momentum=True)


@pytest.mark.gpu
def test_more_than_two_billion_elements(device: torch.device) -> None:
    m, n = 2**17 + 3, 2**14 + 8
    if torch.cuda.mem_get_info(device)[0] < 3 * m * n:
        pytest.skip("needs 7 GB of free GPU memory")
    got = torch.zeros(m, n, dtype=HALF, device=device)
    u, v, one = random(m, 4, seed=1), random(n, 4, seed=2), torch.ones(1)
    on_device = (x.to(device) for x in (u, v, one, one))
    u_there, v_there, coeffs, decay = on_device
    backend.lowrank_([got], [u_there], [v_there], coeffs, decay)
    for rows in (slice(0, 3), slice(m - 5, m)):
        wanted = torch.zeros(rows.stop - rows.start, n, dtype=HALF)
        reference.lowrank_([wanted], [u[rows]], [v], one, one)
        assert_same_bits(got[rows], wanted)
