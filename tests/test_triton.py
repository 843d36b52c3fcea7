"""The Triton backend equals the reference, bit for bit: interpreted, or compiled given a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_fused import dispatch, reference
from zo_fused.streams import as_int64

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from zo_fused_kernels import fma, launch, normal, philox, rounding  # noqa: E402

from zo_fused.backends import triton as backend  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = launch.NOISE_BLOCK
ID = as_int64(0xFEDC_BA98_7654_3210)
KEYS = (as_int64(0x0123_4567_89AB_CDEF), as_int64(0xFFFF_FFFF_0000_0001), 7)
CARRY = 4 * 2**32 - 5  # the low counter word wraps after five elements
FAR = 2**40 + 3
SIZES = (0, 1, 3, 7, 8, 9, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1)


# ---- helpers ------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    """The bits of a tensor as integers, on the CPU."""
    return x.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    different = (bits(got) != bits(wanted)).flatten().nonzero().flatten()
    assert not len(different), (
        f"{len(different)} of {got.numel()} elements differ, the first at {int(different[0])}: "
        f"{got.flatten()[different[0]]} for {wanted.flatten()[different[0]]}"
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


class Islands:
    """Tensors in poisoned memory: `check` fails if anything was written beside them.

    Each starts ``misalignment`` elements past a 16-byte boundary.
    """

    def __init__(self, device: torch.device, misalignment: int = 0) -> None:
        self.device, self.misalignment = device, misalignment
        self.parts: list[tuple[Tensor, Tensor, int]] = []

    def put(self, x: Tensor) -> Tensor:
        start = 64 + self.misalignment
        memory = torch.full((start + x.numel() + 64,), 77, dtype=x.dtype, device=self.device)
        assert memory.data_ptr() % 16 == 0
        view = memory[start : start + x.numel()].view(x.shape)
        view.copy_(x)
        self.parts.append((memory, view, start))
        return view

    def check(self) -> None:
        for memory, view, start in self.parts:
            assert (memory[:start] == 77).all(), "wrote before a tensor"
            assert (memory[start + view.numel() :] == 77).all(), "wrote behind a tensor"


def check_fill(
    name: str, dtype: torch.dtype, sizes: Sequence[int], offset: int, device: torch.device
) -> None:
    ids, offsets = int64(*(ID + i for i in range(len(sizes)))), int64(*[offset] * len(sizes))
    keys = int64(*(KEYS[i % 3] for i in range(len(sizes))))
    islands = Islands(device, misalignment=1)
    wanted = [torch.empty(n, dtype=dtype) for n in sizes]
    got = [islands.put(torch.zeros(n, dtype=dtype)) for n in sizes]
    getattr(reference, name)(wanted, ids, offsets, keys)
    getattr(backend, name)(got, ids, offsets, keys.to(device))
    islands.check()
    for g, w in zip(got, wanted, strict=True):
        assert_same_bits(g, w)


def check_dense(
    sizes: Sequence[int],
    offset: int,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    directions: int = 1,
    misalignment: int = 0,
) -> None:
    ids, offsets = int64(*(ID + i for i in range(len(sizes)))), int64(*[offset] * len(sizes))
    keys = int64(*KEYS[:directions])
    coeffs = random(len(sizes), directions, seed=1)
    decay = 1 + 0.1 * random(len(sizes), seed=2)
    wanted = [random(n, dtype=dtype, seed=n) for n in sizes]
    islands = Islands(device, misalignment)
    got = [islands.put(w) for w in wanted]
    reference.dense_(wanted, ids, offsets, keys, coeffs, decay)
    backend.dense_(got, ids, offsets, keys.to(device), coeffs.to(device), decay.to(device))
    islands.check()
    for g, w in zip(got, wanted, strict=True):
        assert_same_bits(g, w)


def check_lowrank(
    shapes: Sequence[tuple[int, ...]],
    rank: int,
    device: torch.device,
    dtype: torch.dtype = torch.float16,
    misalignment: int = 0,
) -> None:
    def sides(shape: tuple[int, ...]) -> tuple[int, int]:
        rows = shape[0] if shape else 1
        return rows, math.prod(shape) // rows

    decay = 1 + 0.1 * random(len(shapes), seed=2)
    us = [random(sides(s)[0], rank, seed=3) for s in shapes]
    vs = [random(sides(s)[1], rank, seed=4) for s in shapes]
    for columns in ((), (4,)):  # without momentum, and with
        coeffs = random(len(shapes), *columns, seed=1)
        wanted = [random(*s, dtype=dtype, seed=5) for s in shapes]
        moments = [random(*u.shape, seed=6) for u in us] if columns else None
        islands = Islands(device, misalignment)
        got = [islands.put(w) for w in wanted]
        factors = [[islands.put(x) for x in xs] for xs in (us, vs)]
        table = (coeffs.to(device), decay.to(device))
        if moments is None:
            reference.lowrank_(wanted, us, vs, coeffs, decay)
            backend.lowrank_(got, *factors, *table)
        else:
            got_moments = [islands.put(m) for m in moments]
            reference.lowrank_momentum_(wanted, moments, us, vs, coeffs, decay)
            backend.lowrank_momentum_(got, got_moments, *factors, *table)
            for g, w in zip(got_moments, moments, strict=True):
                assert_same_bits(g, w)
        islands.check()
        for g, w in zip(got, wanted, strict=True):
            assert_same_bits(g, w)


# ---- pieces -------------------------------------------------------------------------------------


def test_backend_serves(device: torch.device) -> None:
    assert dispatch.why_not("triton", device.type) is None


def test_backend_says_why_not() -> None:
    reason = dispatch.why_not("triton", "mps")
    assert reason is not None
    assert "TRITON_INTERPRET" in reason


def test_backend_can_be_chosen(
    use_backend: Callable[[str | None], None], device: torch.device
) -> None:
    import zo_fused

    use_backend("triton")
    assert zo_fused.backend_of(device) == "triton"
    got = zo_fused.noise.normal(10, KEYS[0], 5, 3, device)
    assert_same_bits(got, reference.normal(10, KEYS[0], 5, 3, torch.device("cpu")))


def test_constants_are_those_of_the_reference() -> None:
    for name in ("LOG", "SQRT", "SIN", "COS", "RSQRT_MAGIC"):
        assert getattr(normal, name).value == getattr(reference, name), name


@triton.jit
def _philox_kernel(in_ptr, out_ptr):
    """out[4] = philox(counter in[:4], key in[4:])"""
    c0 = tl.load(in_ptr).to(tl.uint32)
    c1 = tl.load(in_ptr + 1).to(tl.uint32)
    c2 = tl.load(in_ptr + 2).to(tl.uint32)
    c3 = tl.load(in_ptr + 3).to(tl.uint32)
    k0 = tl.load(in_ptr + 4).to(tl.uint32)
    k1 = tl.load(in_ptr + 5).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr, w0.to(tl.int64))
    tl.store(out_ptr + 1, w1.to(tl.int64))
    tl.store(out_ptr + 2, w2.to(tl.int64))
    tl.store(out_ptr + 3, w3.to(tl.int64))


def known_answers() -> list[tuple[list[int], list[int]]]:
    lines = (Path(__file__).parent / "data" / "philox_kat.txt").read_text().splitlines()
    rows = [line.split(";") for line in lines if not line.startswith("#")]
    words = [[[int(word, 16) for word in part.split()] for part in row] for row in rows]
    return [(counter + key, output) for counter, key, output in words]


@pytest.mark.parametrize(("inputs", "output"), known_answers())
def test_philox_known_answers(inputs: list[int], output: list[int], device: torch.device) -> None:
    got = torch.zeros(4, dtype=torch.int64, device=device)
    _philox_kernel[(1,)](int64(*inputs).to(device), got)
    assert got.tolist() == output


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    """out = fma(a, b, c)"""
    i = tl.arange(0, N)
    out = fma.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i))
    tl.store(out_ptr + i, out)


def test_fma_rounds_once(device: torch.device) -> None:
    n = 1 << 16
    generator = torch.Generator().manual_seed(0)
    # Any bits at all, of exponents near enough for sums to cancel and to be halfway cases.
    mantissas = torch.randint(0, 1 << 23, (3, n), generator=generator)
    mantissas &= -1 << torch.randint(0, 23, (3, n), generator=generator)
    exponents = torch.randint(-30, 31, (3, n), generator=generator) + 127
    signs = torch.randint(0, 2, (3, n), generator=generator) << 31
    a, b, c = (signs | exponents << 23 | mantissas).to(torch.int32).view(torch.float32)
    a[:3], b[:3], c[:3] = 1 + 2**-12, 1 + 2**-12, torch.tensor([2.0**-60, -(2.0**-60), 0])
    wanted = reference.fma(a, b, c)
    assert (wanted != (a.double() * b.double() + c.double()).float()).any()  # hard enough
    got = torch.zeros(n, device=device)
    _fma_kernel[(1,)](a.to(device), b.to(device), c.to(device), got, N=n)
    assert_same_bits(got, wanted)


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """out = narrow(widen(x))"""
    i = tl.arange(0, N)
    x = rounding.widen(tl.load(x_ptr + i))
    tl.store(out_ptr + i, rounding.narrow(x, out_ptr.dtype.element_ty))


def every_16_bit_float(dtype: torch.dtype) -> Tensor:
    x = torch.arange(1 << 16).to(torch.int16).view(dtype)
    return torch.where(x.isnan(), 0, x)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_widening_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    x = every_16_bit_float(dtype)
    got = torch.zeros(len(x), device=device)
    _round_kernel[(1,)](x.to(device), got, N=len(x))
    assert_same_bits(got, x.float())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy, interpreted
def test_narrowing_is_to_nearest_even(dtype: torch.dtype, device: torch.device) -> None:
    # Every value, every tie between neighbours, and both sides of every tie.
    x = every_16_bit_float(dtype).float()
    half = 1 << (12 if dtype == torch.float16 else 15)
    ties = (x.view(torch.int32) | half).view(torch.float32)
    cases = [x, ties, (ties.view(torch.int32) + 1).view(torch.float32)]
    cases.append((ties.view(torch.int32) - 1).view(torch.float32))
    for case in cases:
        case = torch.where(case.isnan(), 0, case)
        got = torch.zeros(len(case), dtype=dtype, device=device)
        _round_kernel[(1,)](case.to(device), got, N=len(case))
        assert_same_bits(got, case.to(dtype))


# ---- fills --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [*range(10), CARRY, FAR])
def test_bits_and_normals(offset: int, device: torch.device) -> None:
    check_fill("bits_", torch.int64, (0, 1, 9, 63), offset, device)
    check_fill("normal_", torch.float32, (0, 7, 64), offset, device)


@pytest.mark.parametrize("offset", [0, 4 * 2**32 - BLOCK])
def test_bits_and_normals_of_several_blocks(offset: int, device: torch.device) -> None:
    check_fill("bits_", torch.int64, (2 * BLOCK + 5,), offset, device)
    check_fill("normal_", torch.float32, (2 * BLOCK + 5,), offset, device)


# ---- dense sweeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_sizes(dtype: torch.dtype, device: torch.device) -> None:
    check_dense(SIZES, 0, device, dtype)


@pytest.mark.parametrize("offset", [*range(1, 10), CARRY, FAR])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_offsets(dtype: torch.dtype, offset: int, device: torch.device) -> None:
    check_dense((9, 300), offset, device, dtype)


@pytest.mark.parametrize("misalignment", [1, 2, 3, 5, 8])
def test_dense_misaligned(misalignment: int, device: torch.device) -> None:
    for dtype in DTYPES:
        check_dense((100,), 0, device, dtype, misalignment=misalignment)
    # A shard that begins where the full parameter is aligned, though its memory is not.
    check_dense((100,), misalignment, device, misalignment=misalignment)


@pytest.mark.parametrize("offset", [0, 3, CARRY])
@pytest.mark.parametrize("misalignment", [0, 1])
def test_dense_full_blocks(offset: int, misalignment: int, device: torch.device) -> None:
    check_dense((2 * BLOCK + 3,), offset, device, misalignment=misalignment)


@pytest.mark.parametrize("directions", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_directions(dtype: torch.dtype, directions: int, device: torch.device) -> None:
    check_dense((1, 65), 2, device, dtype, directions)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_extreme_weights(dtype: torch.dtype, device: torch.device) -> None:
    info = torch.finfo(dtype)
    extremes = [info.max, -info.max, info.tiny, info.smallest_normal, 0.0, -0.0, math.inf]
    extremes.append(info.smallest_normal / 4)
    wanted = torch.tensor(extremes * 3, dtype=dtype)
    got = wanted.to(device, copy=True)
    keys, coeffs, decay = int64(KEYS[0]), torch.tensor([[info.tiny]]), torch.tensor([1.5])
    reference.dense_([wanted], int64(1), int64(0), keys, coeffs, decay)
    backend.dense_([got], int64(1), int64(0), keys.to(device), coeffs.to(device), decay.to(device))
    assert_same_bits(got, wanted)
    assert wanted.isinf().sum() >= 9


@given(
    numel=st.integers(1, 2 * BLOCK),
    cut=st.floats(0, 1),
    offset=st.one_of(st.integers(0, 2**40), st.integers(4 * 2**32 - 2 * BLOCK, 4 * 2**32)),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=12)
@example(numel=BLOCK + 1, cut=0.5, offset=CARRY, dtype=torch.float16)
def test_dense_of_parts_is_dense_of_the_whole(
    numel: int, cut: float, offset: int, dtype: torch.dtype
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = random(numel, dtype=dtype).to(device)
    middle = round(cut * numel)
    parts = [whole[:middle].clone(), whole[middle:].clone()]
    keys, coeffs, decay = (
        x.to(device) for x in (int64(KEYS[0]), torch.tensor([[0.5], [0.5]]), torch.ones(2))
    )
    backend.dense_([whole], int64(ID), int64(offset), keys, coeffs[:1], decay[:1])
    backend.dense_(parts, int64(ID, ID), int64(offset, offset + middle), keys, coeffs, decay)
    assert_same_bits(torch.cat(parts), whole.cpu())


# ---- low-rank sweeps ----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 17])
def test_lowrank_ranks(rank: int, device: torch.device) -> None:
    check_lowrank(((3, 5), (16, 24)), rank, device)


def test_lowrank_rank_beyond_straight_line_code(device: torch.device) -> None:
    check_lowrank(((5, 7),), launch.UNROLL + 2, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_lowrank_shapes(dtype: torch.dtype, rank: int, device: torch.device) -> None:
    shapes = ((1, 200), (200, 1), (3, 5), (65, 130), (64, 64), (2, 3, 8), (9,), ())
    check_lowrank(shapes, rank, device, dtype)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_lowrank_empty(shape: tuple[int, int], device: torch.device) -> None:
    p, u, v = torch.ones(shape), torch.ones(shape[0], 2), torch.ones(shape[1], 2)
    moment = torch.full_like(u, 5)
    p, u, v, moment = (x.to(device) for x in (p, u, v, moment))
    ones = torch.ones(1, device=device)
    backend.lowrank_([p], [u], [v], ones, ones)
    backend.lowrank_momentum_([p], [moment], [u], [v], ones.expand(1, 4), ones)
    assert (moment == 5).all()


@pytest.mark.parametrize("misalignment", [1, 3, 8])
def test_lowrank_misaligned(misalignment: int, device: torch.device) -> None:
    for dtype in DTYPES:
        check_lowrank(((5, 16), (4, 9)), 2, device, dtype, misalignment)


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_no_sweep_waits_for_the_device(device: torch.device) -> None:
    params = [random(1000, dtype=torch.float16).to(device) for _ in range(2)]
    args = [x.to(device) for x in (int64(*KEYS), random(2, 3), torch.ones(2))]
    backend.dense_(params, int64(0, 1), int64(0, 0), *args)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.dense_(params, int64(2, 3), int64(5, 2**33), *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_sweep_can_be_captured_in_a_graph(device: torch.device) -> None:
    got = random(5000, dtype=torch.bfloat16).to(device)
    wanted = got.cpu()
    keys, coeffs, decay = int64(KEYS[0]).to(device), torch.ones(1, 1).to(device), torch.ones(1)
    decay = decay.to(device)
    backend.dense_([got.clone()], int64(1), int64(0), keys, coeffs, decay)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.dense_([got], int64(1), int64(0), keys, coeffs, decay)
    for key, coeff in zip(KEYS, (0.5, -2.0, 3.0), strict=True):
        keys.fill_(key)
        coeffs.fill_(coeff)
        graph.replay()
        reference.dense_(
            [wanted], int64(1), int64(0), int64(key), torch.tensor([[coeff]]), torch.ones(1)
        )
    assert_same_bits(got, wanted)


@pytest.mark.gpu
def test_more_than_two_billion_elements(device: torch.device) -> None:
    n = 2**31 + 2**20 + 3
    if torch.cuda.mem_get_info(device)[0] < 3 * n:
        pytest.skip("needs 6 GB of free GPU memory")
    got = torch.zeros(n, dtype=torch.float16, device=device)
    one = torch.ones(1, device=device)
    backend.dense_([got], int64(ID), int64(1), int64(KEYS[0]).to(device), one.view(1, 1), one)
    for start in (0, 2**31 - 10, n - 1000):
        wanted = torch.zeros(min(1000, n - start), dtype=torch.float16)
        reference.dense_(
            [wanted],
            int64(ID),
            int64(1 + start),
            int64(KEYS[0]),
            torch.ones(1, 1),
            torch.ones(1),
        )
        assert_same_bits(got[start : start + len(wanted)], wanted)
