"""What only the Triton backend has: pieces of its kernels, the fast transform, tables, launches.

The kernels are interpreted, or compiled given a GPU. `test_parity.py` compares its sweeps with the
reference.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.calls import DTYPES, ID, KEYS, check, dense, int64, lowrank, places, random
from support.equality import assert_same_bits
from support.served import serve
from torch import Tensor

from zo_fused.noise import reference as noise_reference
from zo_fused.sweeps import dispatch, reference
from zo_fused.sweeps.backends import on_lists, table

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from zo_fused_kernels import fma, launch, normal, philox, rounding  # noqa: E402
from zo_fused_kernels import sweeps as sweeps_of_triton  # noqa: E402
from zo_fused_kernels import table as tables  # noqa: E402

from zo_fused.sweeps.backends import triton as backend  # noqa: E402

UNFIT = backend.interpreter_fails()
pytestmark = pytest.mark.skipif(UNFIT is not None, reason=str(UNFIT))

BLOCK = launch.NOISE_BLOCK


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


# ---- the fast transform -------------------------------------------------------------------------


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


# ---- tables and launches ------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grids of the launches since the test began; of those of low rank, their names."""
    from zo_fused_kernels import sweeps

    seen: list[object] = []
    for name in ("bits", "normal", "dense", "moments", "lowrank", "factor_momentum"):
        kernel = getattr(sweeps, name)

        def count(launch, *args, name=name, kernel=kernel):  # type: ignore[no-untyped-def]
            seen.append(name if name in ("lowrank", "factor_momentum") else launch.programs)
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


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) enc:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("momentum", [False, True])
def test_low_rank_is_one_launch_a_dtype(
    momentum: bool, launched: list[object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    shapes = ((9, 16), (7,), (3, 3), (5, 2, 2))
    where = places(shapes, (0,), (0,), (torch.float16, torch.float32))
    check(serve("triton", tmp_path_factory), lowrank(where, (4, 1, 2), momentum, True))
    assert launched == ["factor_momentum"] * 2 * momentum + ["lowrank"] * 2


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


def test_tables_that_a_graph_reads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, made = on_lists.Kept(2), []

    def get(key: str, recording: bool) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(on_lists, "capturing", lambda: recording)
            if recording:
                patched.setattr(torch.cuda, "is_initialized", lambda: pytest.fail("it waited"))
            kept.get(key, lambda: (made.append(key), lambda: None)[1])

    for key in ("a", "b"):
        get(key, recording=False)
    for key in ("a", "b", "c", "d"):
        get(key, recording=True)
    for key in "efghij":
        get(key, recording=False)
    for key in ("a", "b", "c", "d"):
        get(key, recording=False)
    assert made == list("abcdefghij")


def test_what_a_capture_lacks_is_told_before_anything_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make() -> None:
        raise RuntimeError("run a sweep once before")

    kept = on_lists.Kept(1)
    kept.get("a", lambda: lambda: None)
    monkeypatch.setattr(on_lists, "capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: pytest.fail("it waited"))
    with pytest.raises(RuntimeError, match="once before"):
        kept.get("b", make)  # type: ignore[arg-type]


def test_a_script_goes_to_the_device_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, one = torch.zeros(9, device=device), torch.ones(1, 2, device=device)
    script, keys = torch.tensor([[0, -1, -1], [1, -1, -1]]), int64(*KEYS[:2]).to(device)

    def run() -> None:
        backend.dense_steps_([p], int64(1), int64(0), keys, script, one[..., None] * one, one)

    run()
    copies: list[object] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **kw: (copies.append(a), to(*a, **kw))[1])
    script = script.clone()
    run()
    assert copies == []
    script[0, 0] = 1  # another script
    run()
    assert copies != []


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
    (made,) = table.launches(rows, device, launch.CHUNK)
    one = torch.ones(1, device=device)
    from zo_fused_kernels import sweeps

    sweeps.dense(made, int64(KEYS[0]).to(device), one[:, None], one, None, "portable")
    wanted = torch.zeros(n)
    reference.dense_(
        [wanted], int64(ID), int64(start), int64(KEYS[0]), torch.ones(1, 1), torch.ones(1)
    )
    assert_same_bits(p, wanted)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) enc:RuntimeWarning")  # NumPy's
@pytest.mark.parametrize("large", [True, False])
def test_the_size_of_chunks_changes_no_bit(
    large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes: set[int] = set()
    monkeypatch.setattr(launch, "FEW_WAVES", 0 if large else 10**9)
    monkeypatch.setattr(backend.sweeps.kept, "_sweeps", OrderedDict())
    run = sweeps_of_triton.dense
    monkeypatch.setattr(
        sweeps_of_triton, "dense", lambda made, *rows: (sizes.add(made.chunk), run(made, *rows))
    )
    at = launch.SMALL_CHUNK - 3
    where = places((launch.SMALL_CHUNK + 5,), (at,), (0,), DTYPES[:1])
    check(serve("triton", tmp_path_factory), dense(where))
    assert sizes == {launch.CHUNK if large else launch.SMALL_CHUNK}


def test_small_models_have_small_chunks() -> None:
    units = 132  # of an H100
    assert launch.chunk(125 * 10**6, units) == launch.SMALL_CHUNK
    assert launch.chunk(13 * 10**9, units) == launch.CHUNK
    for elements in (10**8, 10**9):  # enough waves, or nothing that can be cut
        programs = elements / launch.chunk(elements, units)
        assert programs / (launch.PLACES * units) > 7
    assert launch.SMALL_CHUNK % max(launch.noise_block(1, 2, "hadamard"), launch.STRAY) == 0


# ---- what only a GPU has room for ---------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [4, 16])
def test_large_matrices(rank: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    shapes = ((2048, 1024), (1000, 4104), (3, 300_001), (4097, 776))
    served = serve("triton", tmp_path_factory)
    half, brain = (places(shapes, (0,), (0,), (dtype,)) for dtype in DTYPES[:2])
    check(served, lowrank(half, (rank, 1, 3, rank), False, True))
    check(served, lowrank(brain, rank, True))


@pytest.mark.gpu
def test_low_rank_of_more_than_two_billion_elements(device: torch.device) -> None:
    m, n = 2**17 + 3, 2**14 + 8
    if torch.cuda.mem_get_info(device)[0] < 3 * m * n:
        pytest.skip("needs 7 GB of free GPU memory")
    got = torch.zeros(m, n, dtype=torch.float16, device=device)
    u, v, one = random(m, 4, seed=1), random(n, 4, seed=2), torch.ones(1)
    u_there, v_there, coeffs, decay = (x.to(device) for x in (u, v, one, one))
    backend.lowrank_([got], [u_there], [v_there], coeffs, decay)
    for rows in (slice(0, 3), slice(m - 5, m)):
        wanted = torch.zeros(rows.stop - rows.start, n, dtype=torch.float16)
        reference.lowrank_([wanted], [u[rows]], [v], one, one)
        assert_same_bits(got[rows].cpu(), wanted)
