"""The Triton backend equals the reference, bit for bit: interpreted, or compiled given a GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.equality import Islands, assert_same_bits
from torch import Tensor

from zo_fused.noise import reference as noise_reference
from zo_fused.noise.streams import as_int64
from zo_fused.sweeps import dispatch, reference
from zo_fused.sweeps.backends import on_lists, table

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from zo_fused_kernels import fma, launch, normal, philox, rounding  # noqa: E402
from zo_fused_kernels import table as tables  # noqa: E402

from zo_fused.sweeps.backends import triton as backend  # noqa: E402

UNFIT = backend.interpreter_fails()
pytestmark = pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = launch.NOISE_BLOCK
ID = as_int64(0xFEDC_BA98_7654_3210)
KEYS = (as_int64(0x0123_4567_89AB_CDEF), as_int64(0xFFFF_FFFF_0000_0001), 7)
CARRY = 4 * 2**32 - 5  # the low counter word wraps after five elements
FAR = 2**40 + 3
SIZES = (0, 1, 3, 7, 8, 9, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1)


# ---- helpers ------------------------------------------------------------------------------------


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def check_fill(
    name: str,
    dtype: torch.dtype,
    sizes: Sequence[int],
    offset: int,
    device: torch.device,
    *transform: str,
) -> None:
    ids, offsets = int64(*(ID + i for i in range(len(sizes)))), int64(*[offset] * len(sizes))
    keys = int64(*(KEYS[i % 3] for i in range(len(sizes))))
    islands = Islands(device, misalignment=1)
    wanted = [torch.empty(n, dtype=dtype) for n in sizes]
    got = [islands.put(torch.zeros(n, dtype=dtype)) for n in sizes]
    getattr(reference, name)(wanted, ids, offsets, keys, *transform)
    getattr(backend, name)(got, ids, offsets, keys.to(device), *transform)
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
    rounding: bool = False,
    transform: str = "portable",
) -> None:
    ids, offsets = int64(*(ID + i for i in range(len(sizes)))), int64(*[offset] * len(sizes))
    keys = int64(*KEYS[:directions])
    coeffs = random(len(sizes), directions, seed=1)
    decay = 1 + 0.1 * random(len(sizes), seed=2)
    wanted = [random(n, dtype=dtype, seed=n) for n in sizes]
    islands = Islands(device, misalignment)
    got = [islands.put(w) for w in wanted]
    key = int64(KEYS[2]) if rounding else None
    reference.dense_(wanted, ids, offsets, keys, coeffs, decay, key, transform)
    rows = [x if x is None else x.to(device) for x in (keys, coeffs, decay, key)]
    backend.dense_(got, ids, offsets, *rows, transform)
    islands.check()
    for g, w in zip(got, wanted, strict=True):
        assert_same_bits(g, w)


def check_moments(
    sizes: Sequence[int],
    offset: int,
    device: torch.device,
    rule: str,
    dtype: torch.dtype,
    m_dtype: torch.dtype | None,
    directions: int = 1,
    rounding: bool = False,
    transform: str = "portable",
    of_squares: bool = False,
) -> None:
    ids, offsets = int64(*(ID + i for i in range(len(sizes)))), int64(*[offset] * len(sizes))
    keys = int64(*KEYS[:directions], *range(8, 5 + directions))
    rows = [random(len(sizes), columns, seed=columns) for columns in (directions, directions, 6)]
    rows[2].abs_()
    rows.append(1 + 0.1 * random(len(sizes), seed=2))
    params = [random(n, dtype=dtype, seed=n) for n in sizes]
    firsts = [random(n, dtype=m_dtype, seed=n + 1) for n in sizes] if m_dtype else []
    keeps = rule == "adam" and not of_squares
    seconds = [random(n, seed=n + 2).square() for n in sizes] if keeps else []
    squares = random(len(sizes), directions, seed=3).square() if of_squares else None
    islands = Islands(device)
    lists = [[islands.put(x) for x in xs] for xs in (params, firsts, seconds)]
    key = int64(KEYS[2]) if rounding else None
    rest = (transform, squares)
    reference.moments_(params, firsts, seconds, ids, offsets, keys, *rows, rule, key, *rest)
    backend.moments_(
        *lists,
        ids,
        offsets,
        keys.to(device),
        *(row.to(device) for row in rows),
        rule,
        key if key is None else key.to(device),
        transform,
        squares if squares is None else squares.to(device),
    )
    islands.check()
    for got, wanted in zip(itertools.chain(*lists), params + firsts + seconds, strict=True):
        assert_same_bits(got, wanted)


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
    assert_same_bits(got, noise_reference.normal(10, KEYS[0], 5, 3, torch.device("cpu")))


def test_constants_are_those_of_the_reference() -> None:
    for name in ("LOG", "SQRT", "SIN", "COS", "RSQRT_MAGIC"):
        assert getattr(normal, name).value == getattr(noise_reference, name), name


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
    lines = (Path(__file__).parents[1] / "data" / "philox_kat.txt").read_text().splitlines()
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
    wanted = noise_reference.fma(a, b, c)
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


@pytest.mark.parametrize("offset", [0, 3, CARRY, FAR])
def test_signs(offset: int, device: torch.device) -> None:
    check_fill("normal_", torch.float32, (0, 7, 64, BLOCK), offset, device, "rademacher")


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


@pytest.mark.parametrize("offset", [0, 5])
def test_dense_several_chunks(offset: int, device: torch.device) -> None:
    check_dense((launch.CHUNK + 3, 5), offset, device)


@pytest.mark.parametrize("directions", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_directions(dtype: torch.dtype, directions: int, device: torch.device) -> None:
    check_dense((1, 65, BLOCK), 0, device, dtype, directions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3, 8 * 2**32 - 5])
def test_dense_rounding_stochastically(
    dtype: torch.dtype, offset: int, device: torch.device
) -> None:
    check_dense((0, 1, 9, BLOCK + 3), offset, device, dtype, 2, rounding=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [1, 2, 3])
def test_dense_signs(dtype: torch.dtype, directions: int, device: torch.device) -> None:
    rounding = directions == 2
    for offset in (0, CARRY):
        sizes = (0, 9, BLOCK + 3)
        check_dense(sizes, offset, device, dtype, directions, 0, rounding, "rademacher")


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_extreme_weights(dtype: torch.dtype, rounding: bool, device: torch.device) -> None:
    info = torch.finfo(dtype)
    extremes = [info.max, -info.max, info.tiny, info.smallest_normal, 0.0, -0.0, math.inf]
    extremes.append(info.smallest_normal / 4)
    wanted = torch.tensor(extremes * 3, dtype=dtype)
    got = wanted.to(device, copy=True)
    keys, coeffs, decay = int64(KEYS[0]), torch.tensor([[info.tiny]]), torch.tensor([1.5])
    rows = [keys, coeffs, decay, *([int64(KEYS[1])] if rounding else [])]
    reference.dense_([wanted], int64(1), int64(0), *rows)
    backend.dense_([got], int64(1), int64(0), *(row.to(device) for row in rows))
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


def test_fast_normals_are_near_the_portable_ones(device: torch.device) -> None:
    n = 1 << 17
    portable, fast = torch.empty(n), torch.empty(n, device=device)
    reference.normal_([portable], int64(ID), int64(0), int64(KEYS[0]))
    backend.normal_([fast], int64(ID), int64(0), int64(KEYS[0]).to(device), "fast")
    error = (fast.cpu() - portable).abs()
    # The radius is the root of 62 ln 2 - 2 ln(u 2**31): numbers up to 43, whose last places make
    # 2**-18 of its square at most. Portable normals are exact to 5e-6 max(1, |z|), units for sine
    # and cosine to 2**-20 (CUDA programming guide, intrinsic functions).
    radius = portable.view(-1, 2).norm(dim=1).repeat_interleave(2)
    bound = 2.0**-18 / radius + (5e-6 + 2.0**-20) * radius.clamp(min=1)
    assert (error <= bound).all()
    assert fast.mean().abs() < 4 / n**0.5
    assert abs(fast.var() - 1) < 4 * (2 / n) ** 0.5


def test_fast_sweeps_add_fast_normals(device: torch.device) -> None:
    z = torch.empty(BLOCK + 5, device=device)
    p = torch.zeros_like(z)
    one = torch.ones(1, device=device)
    keys = int64(KEYS[0]).to(device)
    backend.normal_([z], int64(ID), int64(0), keys, "fast")
    backend.dense_([p], int64(ID), int64(0), keys, one[:, None], one, None, "fast")
    assert_same_bits(p, z.cpu())


# ---- moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "m"), [("momentum", "float32"), ("momentum", ""), ("adam", "float32"), ("adam", "")]
)
def test_moments(rule: str, m: str, dtype: torch.dtype, device: torch.device) -> None:
    m_dtype = getattr(torch, m) if m else dtype
    check_moments((0, 3, launch.MOMENTS_BLOCK + 9), 0, device, rule, dtype, m_dtype)


@pytest.mark.parametrize("rule", ["momentum", "sign"])
def test_moments_without_state(rule: str, device: torch.device) -> None:
    check_moments((7, launch.MOMENTS_BLOCK), 0, device, rule, torch.float16, None)


@pytest.mark.parametrize("offset", [3, CARRY])
@pytest.mark.parametrize("directions", [0, 1, 3])
def test_moments_directions_and_offsets(directions: int, offset: int, device: torch.device) -> None:
    check_moments((65,), offset, device, "adam", torch.bfloat16, torch.float32, directions, True)


@pytest.mark.parametrize("rule", ["momentum", "sign", "adam"])
def test_moments_of_signs(rule: str, device: torch.device) -> None:
    sizes = (3, launch.MOMENTS_BLOCK + 9)
    for directions, dtype in ((1, torch.float16), (2, torch.float32)):
        rest = (rule, dtype, torch.float32, directions, False, "rademacher")
        check_moments(sizes, 0, device, *rest)


@pytest.mark.parametrize("transform", ["portable", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_squares(dtype: torch.dtype, transform: str, device: torch.device) -> None:
    sizes = (0, 3, launch.MOMENTS_BLOCK + 9)
    for directions, offset in ((1, 0), (3, CARRY)):
        rest = ("adam", dtype, None, directions, True, transform, True)
        check_moments(sizes, offset, device, *rest)


@pytest.mark.parametrize("directions", [0, 130])
def test_adam_of_many_squares(directions: int, device: torch.device) -> None:
    rest = ("adam", torch.bfloat16, None, directions, False, "rademacher", True)
    check_moments((9, 100), 5, device, *rest)


# ---- tables and launches ------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grids of the launches since the test began."""
    from zo_fused_kernels import sweeps

    seen: list[object] = []
    for name in ("bits", "normal", "dense", "moments"):
        kernel = getattr(sweeps, name)

        def count(launch, *args, kernel=kernel):  # type: ignore[no-untyped-def]
            seen.append(launch.programs)
            kernel(launch, *args)

        monkeypatch.setattr(sweeps, name, count)
    return seen


def test_one_launch_serves_all_parameters_of_a_dtype(
    launched: list[object], device: torch.device
) -> None:
    params = [random(n, dtype=d).to(device) for n in (1, 5, 9) for d in DTYPES]
    n = len(params)
    rows = (torch.ones(n, 1, device=device), torch.ones(n, device=device))
    keys = int64(KEYS[0]).to(device)
    backend.dense_(params, int64(*range(n)), int64(*[0] * n), keys, *rows)
    assert launched == [3, 3, 3]
    del launched[:]
    halves = params[::3]
    firsts = [torch.zeros_like(p) for p in halves]
    rows = tuple(torch.ones(3, columns, device=device) for columns in (1, 1, 6))
    backend.moments_(
        halves, firsts, [], int64(1, 2, 3), int64(0, 0, 0), keys, *rows, rows[0][:, 0], "sign"
    )
    assert launched == [3]


def test_a_table_is_made_when_parameters_change_and_not_otherwise(device: torch.device) -> None:
    kept = backend.sweeps.kept
    rows = [torch.full((1,), KEYS[0], device=device), torch.ones(1, 1), torch.ones(1)]
    rows = [row.to(device) for row in rows]

    def made(p: Tensor, id: int = 1, offset: int = 0) -> int:
        before = kept.made
        backend.dense_([p], int64(id), int64(offset), *rows)
        return kept.made - before

    p = torch.zeros(64, device=device)
    assert made(p) == 1
    assert made(p) == 0
    rows[1].fill_(0.5)  # a step with another coefficient
    assert made(p) == 0
    assert made(p[:63]) == 1
    assert made(p[1:]) == 1
    assert made(p.clone()) == 1
    assert made(p.half()) == 1
    assert made(p, id=2) == 1
    assert made(p, offset=4) == 1
    assert made(p) == 0


def test_old_tables_are_dropped() -> None:
    kept = on_lists.Kept(2)
    for key in ("a", "b", "a", "c", "a"):
        kept.get(key, lambda: lambda: None)
    assert kept.made == 3
    kept.get("b", lambda: lambda: None)
    assert kept.made == 4


@triton.jit
def _find_kernel(table_ptr, rows, out_ptr):
    """out[program] = the parameter's number, the program's within it"""
    row_ptr, program = tables.find(table_ptr, rows)
    out_ptr += 2 * tl.program_id(0)
    tl.store(out_ptr, tl.load(row_ptr + tables.INDEX))
    tl.store(out_ptr + 1, program)


@pytest.mark.parametrize("counts", [[1], [3], [1, 1], [2, 5, 1], [1, 2, 3, 4, 5, 6, 7]])
def test_programs_find_their_parameter(counts: list[int], device: torch.device) -> None:
    rows = [table.Row((torch.float32,), count, {table.INDEX: i}) for i, count in enumerate(counts)]
    (made,) = table.launches([*rows, table.Row((torch.float32,), 0, {})], device)
    assert made.programs == sum(counts)
    out = torch.zeros(made.programs, 2, dtype=torch.int64, device=device)
    _find_kernel[(made.programs,)](made.table, made.rows, out)
    assert out.tolist() == [[i, j] for i, count in enumerate(counts) for j in range(count)]


def test_programs_beyond_two_billion_elements(device: torch.device) -> None:
    """The addresses and counters of a program whose elements lie past 2**31, without the memory."""
    n = 300
    start = 2**33  # where a chunk begins
    p = torch.zeros(n, device=device)
    rows = table.noise_rows([p], [ID], [start], (), launch.CHUNK)
    # As if p were the end of a parameter that begins at element 7 of the full one.
    cells = rows[0].cells
    first = 7
    cells[table.ADDRESS] -= (start - first) * p.element_size()
    cells[table.OFFSET] = first
    cells[table.NUMEL] = start - first + n
    cells[table.ALIGNED] = table.aligned(cells[table.ADDRESS], first, p.element_size())
    cells[table.FIRST] = -(start // launch.CHUNK - first // launch.CHUNK)  # those before never run
    (made,) = table.launches(rows, device)
    one = torch.ones(1, device=device)
    from zo_fused_kernels import sweeps

    sweeps.dense(made, int64(KEYS[0]).to(device), one[:, None], one, None, "portable")
    wanted = torch.zeros(n)
    reference.dense_(
        [wanted], int64(ID), int64(start), int64(KEYS[0]), torch.ones(1, 1), torch.ones(1)
    )
    assert_same_bits(p, wanted)
