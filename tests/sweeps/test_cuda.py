"""The CUDA backend: its kernels equal the reference, emulated on the CPU or on a GPU if there is
one; nvcc's code for them has the shape it should have; the extension builds.

Emulated are the same kernels, launchers and operators, compiled by g++.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.emulated_cuda import Served, emulation
from torch import Tensor

from zo_fused.noise.streams import as_int64
from zo_fused.sweeps import dispatch, reference
from zo_fused.sweeps.backends import cuda, table
from zo_fused.sweeps.numbers import TRANSFORMS

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHUNK = 1 << 15
ID = as_int64(0xFEDC_BA98_7654_3210)
KEYS = tuple(as_int64(k) for k in (0x0123_4567_89AB_CDEF, 0xFFFF_FFFF_0000_0001, 7))
CARRY = 4 * 2**32 - 5  # the low counter word wraps after five elements,
ROUNDING_CARRY = 8 * 2**32 - 5  # that of the rounding stream
FAR = 2**40 + 3
ROUNDING = torch.tensor([as_int64(0xDEAD_BEEF_0000_0001)])


# ---- what runs the kernels ----------------------------------------------------------------------


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    if request.param == "emulated":
        return emulation(tmp_path_factory)
    reason = cuda.why_not("cuda")
    if reason is not None:
        pytest.skip(reason)
    return Served(cuda, torch.ops.zo_fused_CUDA, cuda._kernels(), torch.device("cuda"))


# ---- helpers ------------------------------------------------------------------------------------


def int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of all sizes: small ones that are subnormal in float16, the largest, infinities, zeros."""
    x = random(*shape, seed=seed)
    kind = torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(seed + 1))
    x = torch.where(kind == 0, x * 2**-20, x).to(dtype)
    largest = torch.finfo(dtype).max
    for i, value in enumerate((0.0, -0.0, math.inf, -math.inf, largest, -largest)):
        x[kind == i + 1] = value
    return x


def as_bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same(got: Tensor, wanted: Tensor) -> None:
    """Of the same bits; a NaN is a NaN."""
    got = got.cpu()
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    different = (as_bits(got) != as_bits(wanted)) & ~(got.isnan() & wanted.isnan())
    where = different.flatten().nonzero().flatten()
    assert not len(where), (
        f"{len(where)} of {got.numel()} elements differ, the first at {int(where[0])}: "
        f"{got.flatten()[where[0]]} for {wanted.flatten()[where[0]]}"
    )


@dataclass
class Islands:
    """Tensors in poisoned memory, each ``misalignment`` elements past a 16-byte boundary."""

    device: torch.device
    misalignment: int = 0
    parts: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

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


Lists = dict[str, list[Tensor]]


def check(
    served: Served,
    name: str,
    written: Lists,
    misalignment: int = 0,
    read_misalignment: int = 0,
    **rest: Any,
) -> None:
    """A sweep and the reference of that name write the same into ``written``, and only there."""
    islands = Islands(served.device, misalignment)
    read = Islands(served.device, read_misalignment)
    got = {key: [islands.put(x) for x in xs] for key, xs in written.items()}

    def moved(key: str, x: Any) -> Any:
        if isinstance(x, list):
            return [read.put(y) for y in x]
        on_host = ("ids", "offsets", "script")
        return x.to(served.device) if isinstance(x, Tensor) and key not in on_host else x

    there = {key: moved(key, x) for key, x in rest.items()}
    getattr(served.sweeps, name)(**got, **there)
    islands.check()
    wanted = {key: [x.clone() for x in xs] for key, xs in written.items()}
    getattr(reference, name)(**wanted, **rest)
    for key, xs in wanted.items():
        for g, w in zip(got[key], xs, strict=True):
            assert_same(g, w)


def streams(count: int, offset: int) -> dict[str, Tensor]:
    return {"ids": int64(*range(ID, ID + count)), "offsets": int64(*[offset] * count)}


def check_dense(
    served: Served,
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    offset: int = 0,
    directions: int = 1,
    rounding: Tensor | None = None,
    misalignment: int = 0,
    transform: str = "portable",
) -> None:
    params = [weights(n, dtype=dtypes[i % len(dtypes)], seed=i) for i, n in enumerate(sizes)]
    check(
        served,
        "dense_",
        {"params": params},
        misalignment,
        **streams(len(sizes), offset),
        keys=int64(*KEYS[:directions]),
        coeffs=random(len(sizes), directions, seed=1),
        decay=1 + 0.1 * random(len(sizes), seed=2),
        rounding=rounding,
        transform=transform,
    )


def check_moments(
    served: Served,
    sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    rule: str,
    state: str,
    offset: int = 0,
    rounding: Tensor | None = None,
    misalignment: int = 0,
    transform: str = "portable",
    keys: Sequence[int] = KEYS[:2],
    of_squares: bool = False,
) -> None:
    params = [random(n, dtype=dtypes[i % len(dtypes)], seed=i) for i, n in enumerate(sizes)]
    count = len(params)
    firsts = [random(*p.shape, seed=i + 9) for i, p in enumerate(params)]
    if state == "like weights":
        firsts = [m.to(p.dtype) for m, p in zip(firsts, params, strict=True)]
    check(
        served,
        "moments_",
        {
            "params": params,
            "firsts": [] if state == "nothing" else firsts,
            "seconds": [] if rule != "adam" or of_squares else [x.float().square() for x in firsts],
        },
        misalignment,
        **streams(count, offset),
        keys=int64(*keys),
        grads=random(count, len(keys), seed=1),
        restores=random(count, len(keys), seed=2),
        coeffs=random(count, 6, seed=3).abs(),
        decay=1 + 0.1 * random(count, seed=4),
        rule=rule,
        rounding=rounding,
        transform=transform,
        squares=random(count, len(keys), seed=5).square() if of_squares else None,
    )


def check_lowrank(
    served: Served,
    shapes: Sequence[tuple[int, ...]],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype],
    offset: int = 0,
    rounding: Tensor | None = None,
    misalignment: int = 0,
    factor_misalignment: int = 0,
    momentum: bool = False,
) -> None:
    params, us, vs = [], [], []
    for i, shape in enumerate(shapes):
        params.append(weights(*shape, dtype=dtypes[i % len(dtypes)], seed=i))
        rows = shape[0] if shape else 1
        rank = ranks[i % len(ranks)]
        us.append(random(rows, rank, seed=i + 3))
        vs.append(random(math.prod(shape) // rows if rows else 0, rank, seed=i + 4))
    count = len(params)
    written: Lists = {"params": params}
    if momentum:
        written["moments"] = [random(*u.shape, seed=6) for u in us]
    check(
        served,
        "lowrank_momentum_" if momentum else "lowrank_",
        written,
        misalignment,
        factor_misalignment,
        us=us,
        vs=vs,
        coeffs=random(count, 4, seed=1) if momentum else random(count, seed=1),
        decay=1 + 0.1 * random(count, seed=2),
        **streams(count, offset),
        rounding=rounding,
    )


# ---- the backend --------------------------------------------------------------------------------


def test_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NVIDIA" in str(dispatch.why_not("cuda", "cpu"))
    missing = ModuleNotFoundError("it is missing", name="zo_fused._CUDA")
    monkeypatch.setattr(cuda, "import_error", missing)
    assert "_CUDA is not built (it is missing)" in str(cuda.why_not("cuda"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in str(cuda.why_not("cuda"))


def test_backend_says_that_a_gpu_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "import_error", None)
    monkeypatch.setattr(cuda, "architectures", lambda: [(8, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 5), "this one has 7.5"), ((12, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        reason = cuda.why_not("cuda")
        assert reason is None if expected is None else expected in str(reason)


def test_backend_comes_behind_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"cuda", "reference"}
    monkeypatch.setattr(dispatch, "why_not", lambda name, _: None if name in served else "broken")
    dispatch.select.cache_clear()
    try:
        assert dispatch.backend_of("cuda") == "cuda"
        served.add("triton")
        dispatch.select.cache_clear()
        assert dispatch.backend_of("cuda") == "triton"
    finally:
        dispatch.select.cache_clear()


def test_sizes(served: Served) -> None:
    assert served.kernels.CHUNK == CHUNK
    assert served.kernels.TILE == (64, 256)


# ---- fills --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [*range(9), CARRY, FAR])
def test_fills(served: Served, offset: int) -> None:
    for name, dtype in (("bits_", torch.int64), ("normal_", torch.float32)):
        for misalignment in (0, 1):
            outs = [torch.zeros(n, dtype=dtype) for n in (0, 1, 9, 300)]
            keys = int64(*KEYS, KEYS[0])
            check(served, name, {"outs": outs}, misalignment, **streams(4, offset), keys=keys)


def test_fills_of_several_chunks(served: Served) -> None:
    for name, dtype in (("bits_", torch.int64), ("normal_", torch.float32)):
        outs = [torch.zeros(2 * CHUNK + 5, dtype=dtype)]
        check(served, name, {"outs": outs}, **streams(1, 4 * 2**32 - CHUNK), keys=int64(KEYS[0]))


def test_fills_of_signs(served: Served) -> None:
    for offset, misalignment in ((0, 0), (3, 0), (8, 1), (CARRY, 0), (FAR, 1)):
        outs = [torch.zeros(n) for n in (0, 1, 9, 300, CHUNK + 5)]
        keys = int64(*KEYS, *KEYS[:2])
        rest = {**streams(5, offset), "keys": keys, "transform": "rademacher"}
        check(served, "normal_", {"outs": outs}, misalignment, **rest)


@pytest.mark.parametrize("number", [-1, len(TRANSFORMS)])
def test_operators_refuse_transforms_that_they_lack(served: Served, number: int) -> None:
    out = torch.zeros(5, device=served.device)
    rows = table.noise_rows([out], [ID], [0], (), CHUNK)
    (launch,) = table.launches(rows, served.device)
    keys, one = int64(KEYS[0]).to(served.device), torch.ones(1, device=served.device)
    operators, noise = served.operators, (launch.table, launch.programs)
    for call in (
        lambda: operators.normal(*noise, keys, number, 0),
        lambda: operators.dense(*noise, 2, keys, one, one, None, number, 0),
        lambda: operators.moments(
            *(*noise, 2, 0, keys, one, one, torch.ones(6), one, 0, None, number, None, 0)
        ),
    ):
        with pytest.raises(RuntimeError, match="no transform number"):
            call()
    assert not out.any()


def test_fast_is_close_to_portable(served: Served) -> None:
    sizes = (3 * CHUNK + 1, 100)
    made = {}
    for transform in ("portable", "fast"):
        outs = [torch.zeros(n, device=served.device) for n in sizes]
        keys = int64(*KEYS[:2]).to(served.device)
        served.sweeps.normal_(outs, **streams(2, 3), keys=keys, transform=transform)
        made[transform] = torch.cat(outs).cpu()
    portable, fast = made["portable"], made["fast"]
    error = (fast - portable).abs()
    assert error[portable.abs() > 0.05].max() < 3e-5
    assert error.max() < 1e-3  # near u = 1 the root magnifies the error of the logarithm


@pytest.mark.parametrize("directions", [1, 2])
def test_fast_sweeps_add_fast_normals(served: Served, directions: int) -> None:
    n, device = 1000, served.device
    where = streams(1, 5)
    normals = [torch.zeros(n, device=device) for _ in range(directions)]
    keys = int64(*KEYS[:directions]).to(device)
    for k, z in enumerate(normals):
        served.sweeps.normal_([z], **where, keys=keys[k : k + 1], transform="fast")
    one = torch.ones(1, device=device)
    only_last = torch.zeros(1, directions, device=device)
    only_last[0, -1] = 1
    rest = {"keys": keys, "decay": one, "transform": "fast"}
    got = torch.zeros(n, device=device)
    served.sweeps.dense_([got], **where, coeffs=only_last, **rest)
    assert_same(got + 0.0, normals[-1].cpu() + 0.0)
    got = torch.zeros(n, device=device)
    coeffs = torch.tensor([[0.0, 1, 0, 0, 0, 1]], device=device)
    zeros = torch.zeros_like(only_last)
    served.sweeps.moments_(
        [got],
        [],
        [],
        **where,
        grads=only_last,
        restores=zeros,
        coeffs=coeffs,
        rule="momentum",
        **rest,
    )
    assert_same(got + 0.0, normals[-1].cpu() + 0.0)


# ---- dense sweeps -------------------------------------------------------------------------------

SIZES = (0, 1, 3, 7, 8, 9, 63, 1000)


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("offset", [*range(9), CARRY, ROUNDING_CARRY, FAR])
def test_dense_offsets(served: Served, offset: int, rounding: Tensor | None) -> None:
    check_dense(served, SIZES * 3, DTYPES, offset, rounding=rounding)


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("misalignment", [1, 2, 3, 4, 5, 8])
def test_dense_misaligned(served: Served, misalignment: int, rounding: Tensor | None) -> None:
    check_dense(served, (100, 9) * 3, DTYPES, 0, rounding=rounding, misalignment=misalignment)
    # Shards: where the full parameter is aligned, their memory is or is not.
    shift = misalignment % 8
    check_dense(served, (100, 9) * 3, DTYPES, shift, rounding=rounding, misalignment=misalignment)


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_chunks(served: Served, dtype: torch.dtype, rounding: Tensor | None) -> None:
    sizes = (CHUNK, 2 * CHUNK + 3, CHUNK - 1)
    check_dense(served, sizes, (dtype,), 4 * 2**32 - CHUNK - 8, rounding=rounding)
    check_dense(served, (CHUNK + 9,), (dtype,), 5, rounding=rounding, misalignment=5)


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("directions", [0, 2, 3])
def test_dense_directions(served: Served, directions: int, rounding: Tensor | None) -> None:
    check_dense(served, (1, 65, 300) * 2, DTYPES, 2, directions, rounding)


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("directions", [1, 3])
def test_dense_signs(served: Served, directions: int, rounding: Tensor | None) -> None:
    for offset, misalignment in ((0, 0), (3, 0), (5, 5), (CARRY, 1)):
        rest = (offset, directions, rounding, misalignment, "rademacher")
        check_dense(served, (*SIZES, 300), DTYPES, *rest)
    check_dense(served, (CHUNK + 9,), DTYPES[:1], 5, directions, rounding, 0, "rademacher")


def test_scripts_of_signs(served: Served) -> None:
    check(
        served,
        "dense_steps_",
        {"params": [weights(n, dtype=d, seed=n) for n in (9, 300) for d in DTYPES]},
        **streams(6, 3),
        keys=int64(*KEYS),
        script=int64(0, -1, -1, 0, 1, 2, 1, -1, -1).view(3, 3),
        coeffs=random(6, 3, 2),
        decay=1 + 0.1 * random(6, 3, seed=1),
        transform="rademacher",
    )


def test_one_launch_for_each_dtype(served: Served) -> None:
    if served.launches is None:
        pytest.skip("launches are counted under emulation")
    before = served.launches()
    check_dense(served, (9, 0, 100, 8, 5), DTYPES[:1])
    assert served.launches() - before == 1
    check_dense(served, (9, 0, 100, 8, 5, 70), DTYPES)
    assert served.launches() - before == 4
    check_lowrank(served, [(5, 8)] * 3, (2,), DTYPES[:1], momentum=True)
    assert served.launches() - before == 7  # the factors twice, the weights
    check_dense(served, (0,), DTYPES)
    assert served.launches() - before == 7


# ---- moments ------------------------------------------------------------------------------------

STATES = ("nothing", "float32", "like weights")
RULES = [(rule, state) for rule in ("momentum", "sign", "adam") for state in STATES]
RULES.remove(("adam", "nothing"))


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("rule", "state"), RULES)
def test_moments(served: Served, rule: str, state: str, rounding: Tensor | None) -> None:
    for offset in (0, 3, CARRY):
        check_moments(served, (*SIZES, 300), DTYPES, rule, state, offset, rounding)
    for misalignment in (1, 4, 8):
        sizes, offset = (9, 100, 40), misalignment % 8
        check_moments(served, sizes, DTYPES, rule, state, offset, rounding, misalignment)


@pytest.mark.parametrize(("rule", "state"), [("momentum", "like weights"), ("adam", "float32")])
def test_moments_over_chunks(served: Served, rule: str, state: str) -> None:
    check_moments(served, (CHUNK + 70,) * 3, DTYPES, rule, state, CHUNK - 1, ROUNDING)


@pytest.mark.parametrize(("rule", "state"), RULES)
def test_moments_of_signs(served: Served, rule: str, state: str) -> None:
    for offset, rounding in ((3, None), (CARRY, ROUNDING)):
        check_moments(
            *(served, (9, 300) * 3, DTYPES, rule, state, offset, rounding),
            transform="rademacher",
        )


@pytest.mark.parametrize("rounding", [None, ROUNDING], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("transform", ["portable", "rademacher"])
def test_adam_of_squares(served: Served, transform: str, rounding: Tensor | None) -> None:
    sizes = (*SIZES, 300)
    for offset, misalignment, directions in ((0, 0, 2), (3, 0, 3), (CARRY, 0, 1), (5, 5, 2)):
        rest = (offset, rounding, misalignment, transform, KEYS[:directions], True)
        check_moments(served, sizes, DTYPES, "adam", "nothing", *rest)
    rest = (7, rounding, 0, transform, (), True)  # of no directions, 0 / eps
    check_moments(served, (9,) * 3, DTYPES, "adam", "nothing", *rest)


def test_adam_of_many_squares(served: Served) -> None:
    rest = (CHUNK - 1, ROUNDING, 0, "rademacher", range(130), True)
    check_moments(served, (300,) * 3, DTYPES, "adam", "nothing", *rest)
    rest = (CHUNK - 1, ROUNDING, 0, "portable", KEYS[:1], True)
    check_moments(served, (CHUNK + 70,) * 3, DTYPES, "adam", "nothing", *rest)


# ---- low-rank sweeps ----------------------------------------------------------------------------

SHAPES = [(), (1,), (9,), (5, 7), (3, 8), (64, 256), (70, 264), (4, 0), (33, 12), (2, 3, 16)]


@pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 12, 16, 33, 64])
def test_lowrank_ranks(served: Served, rank: int, momentum: bool) -> None:
    for dtype in DTYPES:
        check_lowrank(served, SHAPES, (rank,), (dtype,), momentum=momentum)


@pytest.mark.parametrize("rank", [1, 4, 8, 12])
def test_lowrank_stochastic(served: Served, rank: int) -> None:
    for offset in (0, 1, 6, ROUNDING_CARRY, FAR):
        check_lowrank(served, SHAPES, (rank,), DTYPES, offset, ROUNDING)
    check_lowrank(served, SHAPES, (rank,), DTYPES, 3, ROUNDING, momentum=True)
    # All of one dtype, so that those with 128-bit accesses are among them.
    for offset in (0, 3, 4, 7):
        check_lowrank(served, [(70, 264)], (rank,), DTYPES[:1], offset, ROUNDING)


@pytest.mark.parametrize("misalignment", [1, 2, 4, 8])
def test_lowrank_misaligned(served: Served, misalignment: int) -> None:
    for rank in (1, 4, 16):
        for dtype in DTYPES:
            check_lowrank(served, SHAPES, (rank,), (dtype,), misalignment=misalignment)
            check_lowrank(served, SHAPES, (rank,), (dtype,), factor_misalignment=misalignment)


@pytest.mark.parametrize("rank", [1, 3, 4, 16])
def test_lowrank_keeps_the_sign_of_zero(served: Served, rank: int) -> None:
    params = [torch.full((8, 8), -0.0, dtype=dtype) for dtype in DTYPES]
    for u, v in ((0.0, 1.0), (-0.0, 1.0), (-1e-30, 1e-30)):
        us = [torch.full((8, rank), u)] * 3
        vs = [torch.full((8, rank), v)] * 3
        rest = {"coeffs": torch.tensor([1.0, -1.0, 1.0]), "decay": torch.ones(3)}
        check(served, "lowrank_", {"params": params}, us=us, vs=vs, **rest)


@pytest.mark.parametrize("ranks", [(4, 4, 1), (8, 3, 2, 16), (33, 4)])
def test_lowrank_mixed_ranks(served: Served, ranks: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        check_lowrank(served, SHAPES, ranks, (dtype,))
        check_lowrank(served, SHAPES, ranks, (dtype,), 5, ROUNDING, momentum=True)


def test_more_programs_than_blocks(served: Served) -> None:
    check_lowrank(served, [(3, 9), (1, 256 * 2100 + 5), (9, 8)], (1,), DTYPES[:1])


def at_end_of_memory(x: Tensor) -> Tensor:
    """A copy that ends where the memory of the process does: reading behind it kills it."""
    page = mmap.PAGESIZE
    size = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes)
    return copy.view(x.shape).copy_(x)


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_nothing_behind_a_tensor(served: Served, dtype: torch.dtype, rank: int) -> None:
    if served.device.type != "cpu":
        pytest.skip("compute-sanitizer tells on a GPU")
    one = torch.ones(1)
    for shape in ((5, 7), (9, 24), (3, 300)):
        p, first = (at_end_of_memory(random(*shape, dtype=dtype)) for _ in range(2))
        u, v = (at_end_of_memory(random(n, rank)) for n in shape)
        served.sweeps.lowrank_([p], [u], [v], one, one)
        rest = {"keys": int64(1), "decay": one}
        served.sweeps.dense_([p], **streams(1, 3), coeffs=one[None], **rest)
        rest |= {"grads": one[None], "restores": one[None], "coeffs": torch.ones(1, 6)}
        served.sweeps.moments_([p], [first], [], **streams(1, 0), rule="sign", **rest)


# ---- beyond 32 bits -----------------------------------------------------------------------------
# Parameters too large to exist. A row whose first program has a negative number makes a launch
# begin in the middle of it, and there is memory.


def row(**cells: int) -> Tensor:
    numbers = [0] * table.WIDTH
    for name, value in cells.items():
        numbers[getattr(table, name)] = value
    return int64(*numbers)[None]


@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_beyond_32_bits(served: Served, dtype: torch.dtype, shift: int) -> None:
    offset, program = 2**34 + 3 * CHUNK + shift, 2**33 // CHUNK + 1
    inside = program * CHUNK - shift  # index in the tensor of what the program begins with
    start = offset + inside
    wanted = random(CHUNK, dtype=dtype)
    memory = wanted.to(served.device, copy=True)
    rows = row(
        FIRST=-program,
        ADDRESS=memory.data_ptr() - inside * memory.element_size(),
        ID=ID,
        OFFSET=offset,
        ALIGNED=1,
        NUMEL=2**35,
    )
    launch = table.Launch(rows.to(served.device), 1, dtype, ())
    keys, coeffs, decay = int64(KEYS[0]), torch.tensor([[0.3]]), torch.tensor([0.9])
    args = [x.to(served.device) for x in (keys, coeffs, decay, ROUNDING)]
    served.kernels.dense(launch, *args, "portable")
    reference.dense_([wanted], int64(ID), int64(start), keys, coeffs, decay, ROUNDING)
    assert_same(memory, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [4, 5])
def test_lowrank_beyond_32_bits(served: Served, rank: int, dtype: torch.dtype) -> None:
    columns, top, offset = 512, 64 * (2**18 + 1), 2**34 + 3
    wanted = random(64, columns, dtype=dtype)
    u, v = random(64, rank, seed=1), random(columns, rank, seed=2)
    memory, us, vs = (x.to(served.device, copy=True) for x in (wanted, u, v))
    rows = row(
        FIRST=-(top // 64 * columns // 256),
        ADDRESS=memory.data_ptr() - top * columns * memory.element_size(),
        ID=ID,
        OFFSET=offset,
        ALIGNED=1,
        ROWS=2 * top,
        COLUMNS=columns,
        RANK=rank,
        U=us.data_ptr() - top * rank * 4,
        V=vs.data_ptr(),
    )
    launch = table.Launch(rows.to(served.device), columns // 256, dtype, (), rank)
    coeffs, decay = torch.tensor([0.3]), torch.tensor([0.9])
    served.kernels.lowrank(launch, *(x.to(served.device) for x in (coeffs, decay, ROUNDING)))
    start = int64(offset + top * columns)
    reference.lowrank_([wanted], [u], [v], coeffs, decay, int64(ID), start, ROUNDING)
    assert_same(memory, wanted)


# ---- what nvcc makes of the kernels -------------------------------------------------------------

ARCHITECTURES = ("8.0", "9.0", "10.0")
BUILD = """
import runpy, sys
from setuptools import setup

build = runpy.run_path("setup.py", run_name="build")
options = build["native"]()
options["ext_modules"] = [e for e in options["ext_modules"] if e.name == build["CUDA"]]
words = ["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1] + "/objects"]
setup(packages=[], long_description="none", script_args=words, **options)
"""


@functools.cache
def tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit; Triton brings some."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    return shutil.which(name) or (shutil.which(name, path=folder) if folder else None)


@dataclass
class Code:
    """A kernel as it was compiled for one architecture."""

    ops: list[str]
    loop: list[str]  # the innermost loop that has the 128-bit store
    registers: int
    stack: int


def loop_with_store(code: list[tuple[int, str, str]]) -> list[str]:
    position = {address: i for i, (address, *_) in enumerate(code)}
    stores = [i for i, (_, op, _) in enumerate(code) if op.startswith("STG.E.128")]
    loops = []
    for i, (address, op, operands) in enumerate(code):
        found = re.findall(r"0x([0-9a-f]+)", operands) if op.startswith("BRA") else []
        start = position.get(int(found[-1], 16), i) if found else i
        if found and int(found[-1], 16) < address and any(start <= s <= i for s in stores):
            loops.append((i - start, start, i))
    if not loops:
        return []
    _, start, end = min(loops)
    return [op for _, op, _ in code[start : end + 1]]


def disassemble(library: Path, architecture: str) -> dict[str, Code]:
    sm = "sm_" + architecture.replace(".", "")
    cuobjdump = str(tool("cuobjdump"))

    def parts(option: str, name: str) -> list[str]:
        command = [cuobjdump, "-arch", sm, option, str(library)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return re.split(name, text)[1:]

    line = re.compile(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.M
    )
    sass, usage = parts("-sass", r"Function : (\S+)"), parts("-res-usage", r"Function (\S+):")
    used = dict(zip(usage[::2], usage[1::2], strict=True))
    kernels = {}
    for name, text in zip(sass[::2], sass[1::2], strict=True):
        code = [(int(address, 16), op, rest) for address, op, rest in line.findall(text)]
        numbers = re.search(r"REG:(\d+) STACK:(\d+)", used[name])
        assert numbers is not None
        loop = loop_with_store(code)
        kernels[name] = Code([op for _, op, _ in code], loop, int(numbers[1]), int(numbers[2]))
    return kernels


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zo_fused._CUDA, built by setup.py with nvcc's warnings as errors."""
    if tool("nvcc") is None:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("extension")
    env = {
        **os.environ,
        "ZO_FUSED_NATIVE": "cuda",
        "TORCH_CUDA_ARCH_LIST": " ".join(ARCHITECTURES),
        "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xcompiler=-Werror",
    }
    command = [sys.executable, "-c", BUILD, str(folder)]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (library,) = (folder / "zo_fused").glob("_CUDA*")
    return library


@pytest.mark.slow  # nvcc
def test_extension_builds_and_imports(extension: Path) -> None:
    """Against any torch, and it needs no CUDA library of torch's."""
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("zo_fused._CUDA", {str(extension)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
from zo_fused.sweeps.backends import cuda
print(cuda.architectures())
kernels = cuda.CudaKernels(torch.ops.zo_fused_CUDA)
print(kernels.CHUNK, kernels.TILE)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.splitlines() == ["[(8, 0), (9, 0), (10, 0)]", "32768 (64, 256)"], run.stderr


def by(transform: str) -> str:
    """A transform in the name of a kernel."""
    return f"LNS_9TransformE{cuda.TRANSFORMS.index(transform)}E"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.slow  # nvcc
def test_machine_code(extension: Path, architecture: str) -> None:
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump")
    kernels = disassemble(extension, architecture)
    assert len(kernels) == 62
    # Local memory is where registers are spilled; generic accesses cost more than global ones.
    bad = re.compile(r"LDL|STL|(LD|ST)\.E|D(ADD|MUL|FMA|SETP|MNMX)|[FI]2F\S*F64|LDS|STS|BAR")
    for name, code in kernels.items():
        assert code.stack == 0, name
        assert not list(filter(bad.match, code.ops)), name
        assert "STG.E.128" in code.ops, name
        assert "LDG.E.128" in code.ops or "4bits" in name or "6normal" in name, name
        assert code.registers <= (80 if "5dense" in name else 128), name
    # Instructions per element, in the loop that a thread's whole groups go through.
    for part, most in (
        (f"denseINS_4HalfELb1ELb0E{by('portable')}", 34),
        (f"denseINS_8BFloat16ELb1ELb0E{by('portable')}", 34),
        (f"denseIfLb1ELb0E{by('portable')}", 34),
        (f"denseINS_4HalfELb1ELb0E{by('rademacher')}", 16.5),
        (f"denseIfLb1ELb0E{by('rademacher')}", 16.5),
        (f"denseINS_4HalfELb1ELb0E{by('fast')}", 24),
        ("lowrankINS_4HalfELi4ELb0E", 11),
        ("lowrankINS_4HalfELi8ELb0E", 18),
    ):
        (code,) = [code for name, code in kernels.items() if part in name]
        elements = code.loop.count("STG.E.128") * (4 if "If" in part else 8)
        assert 0 < len(code.loop) <= most * elements, (part, len(code.loop), elements)
