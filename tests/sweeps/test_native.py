"""The C++ backend equals the reference bit for bit: every operator, dtype, ISA and thread count."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zo_fused.noise import reference as noise_reference
from zo_fused.noise.streams import as_int64, philox4x32
from zo_fused.sweeps import reference
from zo_fused.sweeps.backends import cpu
from zo_fused.sweeps.numbers import EXACT, TRANSFORMS

TESTS = Path(__file__).parents[1]
ISAS = ("portable", "avx2", "avx512")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KEYS = (0x0123456789ABCDEF, 0, 2**64 - 1, 0xDEADBEEF00000001, 42)
FAR = (2**34 - 40, 2**34 + 3, 2**40 + 1, 2**61 - 5)  # elements; 2**34 is where n passes 2**32
ROUNDING = 0xFEDCBA9876543210
ROUNDING_FAR = (2**35 - 40, 2**35 - 201, 2**35 + 3)  # where its counter, e // 8, does
RULES = ("momentum", "adam", "sign")

needs_extension = pytest.mark.skipif(cpu.why_not("cpu") is not None, reason=str(cpu.why_not("cpu")))
many = settings(deadline=None, max_examples=40)


# ---- helpers ------------------------------------------------------------------------------------


def int64(*values: int) -> Tensor:
    return torch.tensor([as_int64(v) for v in values], dtype=torch.int64)


def float32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def as_bits(tensor: Tensor) -> Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def assert_same(native: Tensor, expected: Tensor) -> None:
    assert native.dtype == expected.dtype
    assert native.shape == expected.shape
    different = as_bits(native) != as_bits(expected)
    different &= ~(native.isnan() & expected.isnan())  # the bits of a NaN are not specified
    assert not different.any(), f"{int(different.sum())} elements differ: {different.nonzero()[:9]}"


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Weights of all sizes: normal, subnormal in fp16, the largest ones, zeros and infinities."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    kind = torch.randint(0, 12, shape, generator=generator)
    x = torch.where(kind == 0, x * 2**-20, x).to(dtype)
    for i, value in enumerate(
        (0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).max, torch.finfo(dtype).tiny / 2)
    ):
        x[kind == i + 1] = value
    return x


def check(name: str, written: list[list[Tensor]], *rest: object, shift: int = 0) -> None:
    """Compare operator `name` on both backends, 1 and 2 threads; `written` is what it changes.

    `shift`: index in its storage of the native tensor's first element. Memory around the tensor
    must stay as it was.
    """
    expected = [[t.clone() for t in tensors] for tensors in written]
    getattr(reference, name)(*expected, *rest)
    for threads in (1, 2):
        bases = [[t.new_full((t.numel() + shift + 3,), 1) for t in ts] for ts in written]
        native = []
        for tensors, storages in zip(written, bases, strict=True):
            views = [
                storage[shift : shift + t.numel()].view(t.shape)
                for t, storage in zip(tensors, storages, strict=True)
            ]
            for view, t in zip(views, tensors, strict=True):
                view.copy_(t)
            native.append(views)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            getattr(cpu, name)(*native, *rest)
        finally:
            torch.set_num_threads(before)
        for views, storages, wanted in zip(native, bases, expected, strict=True):
            for view, storage, e in zip(views, storages, wanted, strict=True):
                assert_same(view, e)
                assert torch.equal(storage[:shift], storage.new_ones(shift))
                assert torch.equal(storage[shift + e.numel() :], storage.new_ones(3))


def rounding_key(rounding: bool) -> Tensor | None:
    return int64(ROUNDING) if rounding else None


def check_dense(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    offset: int = 0,
    keys: tuple[int, ...] = KEYS[:1],
    decay: float = 1.0,
    shift: int = 0,
    rounding: bool = False,
    transform: str = "portable",
) -> None:
    generator = torch.Generator().manual_seed(len(keys))
    count = len(shapes)
    check(
        "dense_",
        [[weights(s, dtype, seed=i) for i, s in enumerate(shapes)]],
        int64(*range(7, 7 + count)),
        int64(*[offset] * count),
        int64(*keys),
        torch.randn(count, len(keys), generator=generator),
        torch.full((count,), decay),
        rounding_key(rounding),
        transform,
        shift=shift,
    )


def check_moments(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    first: torch.dtype | None,
    rule: str,
    offset: int = 0,
    keys: tuple[int, ...] = KEYS[:1],
    shift: int = 0,
    rounding: bool = False,
    transform: str = "portable",
    of_squares: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(len(keys))
    count = len(shapes)
    firsts = [] if first is None else [weights(s, first, seed=9 + i) for i, s in enumerate(shapes)]
    keeps = rule == "adam" and not of_squares
    seconds = [torch.rand(s, generator=generator) for s in shapes] if keeps else []
    check(
        "moments_",
        [[weights(s, dtype, seed=i) for i, s in enumerate(shapes)], firsts, seconds],
        int64(*range(7, 7 + count)),
        int64(*[offset] * count),
        int64(*keys),
        torch.randn(count, len(keys), generator=generator),
        torch.randn(count, len(keys), generator=generator) / 16,
        float32(0.9, -0.3, 0.99, 0.02, 1e-3, -0.125).expand(count, 6).contiguous(),
        torch.full((count,), 0.75),
        rule,
        rounding_key(rounding),
        transform,
        torch.rand(count, len(keys), generator=generator) if of_squares else None,
        shift=shift,
    )


def check_lowrank(
    shape: tuple[int, ...],
    rank: int,
    dtype: torch.dtype,
    decay: float = 0.75,
    shift: int = 0,
    offset: int = 0,
    rounding: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(rank)
    rows = shape[0] if shape else 1
    columns = weights(shape, dtype).numel() // rows if rows else 0
    u, v, moment = (torch.randn(n, rank, generator=generator) for n in (rows, columns, rows))
    written = weights(shape, dtype)
    rest = [float32(decay)]
    if rounding:
        rest += [int64(5), int64(offset), int64(ROUNDING)]
    check("lowrank_", [[written]], [u], [v], float32(-0.3), *rest, shift=shift)
    table = float32(0.9, -0.2, 0.01, -0.7)[None]
    check("lowrank_momentum_", [[written], [moment]], [u], [v], table, *rest, shift=shift)
    check("factor_momentum_", [[moment]], [u], float32(-0.2), float32(decay), shift=shift)


# A direction again and again, two at once, one from before, roundings of both kinds.
SCRIPT = int64(0, -1, -1, 0, 1, 4, 1, -1, -1, 1, 2, -1, 0, 1, 3, 2, 2, 4).view(6, 3)


def check_steps(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    offset: int = 0,
    shift: int = 0,
    transform: str = "portable",
) -> None:
    """Sweeps of a script."""
    generator = torch.Generator().manual_seed(len(shapes))
    count, sweeps = len(shapes), len(SCRIPT)
    params = [weights(s, dtype, seed=i) for i, s in enumerate(shapes)]
    streams = (int64(*range(7, 7 + count)), int64(*[offset] * count), int64(*KEYS))
    coeffs = torch.randn(count, sweeps, 2, generator=generator)
    decay = 1 + torch.randn(count, sweeps, generator=generator) / 8
    check("dense_steps_", [params], *streams, SCRIPT, coeffs, decay, transform, shift=shift)


# ---- noise --------------------------------------------------------------------------------------


@needs_extension
@given(
    n=st.integers(0, 2**61 - 1),
    id_=st.integers(0, 2**64 - 1),
    key=st.integers(0, 2**64 - 1),
    words=st.integers(0, 3),
)
@many
def test_bits_are_philox(n: int, id_: int, key: int, words: int) -> None:
    """Against Philox on Python integers; `words` of the counter are skipped."""
    out = torch.zeros(4 - words, dtype=torch.int64)
    cpu.bits_([out], int64(id_), int64(4 * n + words), int64(key))
    expected = philox4x32(
        (n & 0xFFFFFFFF, n >> 32, id_ & 0xFFFFFFFF, id_ >> 32), (key & 0xFFFFFFFF, key >> 32)
    )
    assert out.tolist() == list(expected)[words:]


@needs_extension
def test_known_answer() -> None:
    out = torch.zeros(4, dtype=torch.int64)
    cpu.bits_([out], int64(0), int64(0), int64(0))
    assert out.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@needs_extension
@pytest.mark.parametrize("offset", [*range(8), *FAR])
@pytest.mark.parametrize("name", ["bits_", "normal_"])
def test_noise(name: str, offset: int) -> None:
    dtype = torch.int64 if name == "bits_" else torch.float32
    for numel in (*range(71), 127, 129, 1000):
        outs = [torch.zeros(numel, dtype=dtype), torch.zeros(3, dtype=dtype)]
        ids, offsets = int64(2**64 - 5, 9), int64(offset, offset + 1)
        check(name, [outs], ids, offsets, int64(*KEYS[:2]), shift=numel % 3)
        if name == "normal_":
            rows = (ids, offsets, int64(*KEYS[:2]), "rademacher")
            check(name, [outs], *rows, shift=numel % 3)


@needs_extension
def test_noise_over_many_chunks() -> None:
    sizes = (70_001, 0, 5, 65_536, 66_000)
    for name, dtype in (("bits_", torch.int64), ("normal_", torch.float32)):
        outs = [torch.zeros(n, dtype=dtype) for n in sizes]
        offsets = int64(65_530, 0, 1, 0, 2**34 - 30_000)
        check(name, [outs], int64(*range(5)), offsets, int64(*KEYS))


# ---- dense --------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [0, 1, 2, 3, 5])
def test_dense(dtype: torch.dtype, directions: int) -> None:
    for numel in (*range(71), 128, 257, 1000):
        offset = (*range(8), *FAR)[numel % 12]
        shift = (0, 1, 3)[numel % 3]
        check_dense([(numel,)], dtype, offset, KEYS[:directions], 0.9 + 0.1 * (numel % 2), shift)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_over_many_chunks(dtype: torch.dtype) -> None:
    shapes = [(70_001,), (0, 3), (), (3, 5, 7), (65_536,)]
    check_dense(shapes, dtype, 65_533, KEYS[:2], 0.99, shift=1)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    numel=st.integers(1, 700),
    offset=st.integers(0, 2**62 - 1000) | st.integers(2**34 - 800, 2**34 + 800),
    cuts=st.lists(st.integers(0, 700), max_size=4),
    shift=st.integers(0, 9),
    rounding=st.booleans(),
)
@many
def test_shards_get_the_noise_of_the_whole(
    dtype: torch.dtype, numel: int, offset: int, cuts: list[int], shift: int, rounding: bool
) -> None:
    whole = weights((numel + shift,), dtype)[shift:]
    parts = whole.clone()
    ends = sorted({0, numel, *(cut % numel for cut in cuts)})
    pieces = [parts[a:b] for a, b in itertools.pairwise(ends)]

    def sweep(tensors: list[Tensor], starts: list[int]) -> None:
        count = len(tensors)
        cpu.dense_(
            tensors,
            int64(*[3] * count),
            int64(*(offset + s for s in starts)),
            int64(*KEYS[:2]),
            float32(0.5, -0.25).expand(count, 2).contiguous(),
            torch.full((count,), 0.9),
            rounding_key(rounding),
        )

    sweep([whole], [0])
    sweep(pieces, ends[:-1])
    assert_same(parts, whole)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_weight(dtype: torch.dtype) -> None:
    """All 2**16 bit patterns but NaN, rounded after a multiplication that gives ties and numbers
    of all sizes between two neighbours."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for decay in (1.0, 0.5, 0.75, 1.5, 2.0**-9, 3.0):
        rest = (int64(0), int64(0), int64(), torch.zeros(1, 0), float32(decay))
        check("dense_", [[every]], *rest)
        check("dense_", [[every]], *rest, int64(ROUNDING))


@needs_extension
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype: torch.dtype, rounding: bool) -> None:
    quiet, negative, signalling = 0x7FC00000, -0x400000, 0x7F800001
    bits = torch.tensor([quiet, negative, signalling, -1] * 19, dtype=torch.int32)
    w = bits.view(torch.float32).to(dtype)
    rest = (int64(0), int64(0), int64(1), torch.ones(1, 1), float32(1))
    cpu.dense_([w], *rest, rounding_key(rounding))
    assert w.isnan().all()
    if rounding and dtype != torch.float32:
        check("dense_", [[w]], *rest, int64(ROUNDING))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", [False, True])
def test_flush_denormal_changes_nothing(dtype: torch.dtype, rounding: bool) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormal numbers")
    torch.set_flush_denormal(False)
    scale = 2.0**-14 if dtype == torch.float16 else 2.0**-126
    tiny = torch.full((100,), scale / 16, dtype=dtype)
    expected = tiny.clone()
    rest = (int64(0), int64(0), int64(5), torch.full((1, 1), scale / 512), float32(0.5))
    rest += (rounding_key(rounding),)
    reference.dense_([expected], *rest)
    torch.set_flush_denormal(True)
    try:
        cpu.dense_([tiny], *rest)
    finally:
        torch.set_flush_denormal(False)
    assert_same(tiny, expected)


# ---- stochastic rounding ------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directions", [0, 1, 2])
def test_dense_rounding(dtype: torch.dtype, directions: int) -> None:
    offsets = (*range(17), *FAR, *ROUNDING_FAR)
    for i, numel in enumerate((*range(50), 64, 127, 128, 129, 250, 257, 1000)):
        shift, keys = (0, 1, 3)[numel % 3], KEYS[:directions]
        check_dense([(numel,)], dtype, offsets[i % len(offsets)], keys, 0.9, shift, rounding=True)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [65_533, 2**35 - 40_001])
def test_dense_rounding_over_many_chunks(dtype: torch.dtype, offset: int) -> None:
    shapes = [(70_001,), (0, 3), (), (3, 5, 7), (65_536,)]
    check_dense(shapes, dtype, offset, KEYS[:1], 0.99, shift=1, rounding=True)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_floats_of_all_sizes(dtype: torch.dtype) -> None:
    """The weights become kept first moments, which are any float32 but NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (40_000,), generator=generator)
    # Half of them about as large as the numbers of float16, subnormal ones included.
    exponent = torch.randint(100, 146, bits.shape, generator=generator)
    bits[::2] = bits[::2] & -0x7F800001 | (exponent << 23)[::2]
    bits[1::4] &= -0x2000  # as they are, in float16
    special = (0.0, 2.0**-149, 2.0**-126, 2.0**-24, 2.0**-14, 65504.0, 65519.0, 65520.0, torch.inf)
    x = torch.cat(
        [bits.to(torch.int32).view(torch.float32), *(float32(s, -s).repeat(50) for s in special)]
    )
    x = x[~x.isnan()]
    check(
        "moments_",
        [[torch.zeros_like(x, dtype=dtype)], [x], []],
        *(int64(0), int64(0), int64(), torch.zeros(1, 0), torch.zeros(1, 0)),
        *(float32(1, 0, 0, 0, 0, 1)[None], float32(1), "momentum", int64(ROUNDING)),
    )


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_lowrank_rounding(dtype: torch.dtype, rank: int) -> None:
    shapes = [(), (1,), (7,), (1, 40), (40, 1), (0, 3), (9, 33), (6, 3, 3, 3), (5, 64), (9, 512)]
    offsets = (0, 1, 7, 8, 2**35 - 77, 2**35 - 160)
    for i, (shape, offset) in enumerate(itertools.product(shapes, offsets)):
        check_lowrank(shape, rank, dtype, shift=i % 3, offset=offset, rounding=True)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 10),
    columns=st.integers(1, 600) | st.integers(1, 70).map(lambda n: 8 * n),
    rank=st.integers(1, 4),
    shift=st.integers(0, 5),
    offset=st.integers(0, 16) | st.integers(2**35 - 6000, 2**35 + 8) | st.integers(0, 2**61),
)
@many
def test_lowrank_rounding_of_any_shape(
    dtype: torch.dtype, rows: int, columns: int, rank: int, shift: int, offset: int
) -> None:
    check_lowrank((rows, columns), rank, dtype, shift=shift, offset=offset, rounding=True)


@needs_extension
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((2, 67_001), 1), ((2, 35_008), 5), ((20_001, 2), 2), ((150_001,), 1), ((35, 2_100), 64)],
)
def test_lowrank_rounding_over_many_chunks(shape: tuple[int, ...], rank: int) -> None:
    check_lowrank(shape, rank, torch.bfloat16, offset=2**35 - 70_000, rounding=True)


# ---- moments ------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(
    ("rule", "first"),
    [
        (rule, first)
        for rule, first in itertools.product(RULES, ("none", "float32", "own"))
        if (rule, first) != ("adam", "none")
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments(dtype: torch.dtype, rule: str, first: str) -> None:
    kept = {"none": None, "float32": torch.float32, "own": dtype}[first]
    offsets = (*range(9), *FAR, *ROUNDING_FAR)
    sizes = (0, 1, 2, 3, 5, 8, 17, 31, 64, 100, 127, 128, 129, 300, 1000)
    for i, (numel, rounding) in enumerate(itertools.product(sizes, (False, True))):
        offset, keys = offsets[i % len(offsets)], KEYS[: (1, 0, 2, 3)[i % 4]]
        check_moments([(numel,)], dtype, kept, rule, offset, keys, i % 4, rounding)


@needs_extension
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_over_many_chunks(dtype: torch.dtype, rule: str) -> None:
    shapes = [(70_001,), (0, 3), (), (3, 5, 7)]
    for first in (dtype, torch.float32):
        check_moments(shapes, dtype, first, rule, 65_533, KEYS[:1], 1, rounding=True)


@needs_extension
@pytest.mark.parametrize("rule", RULES)
@given(
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    numel=st.integers(1, 500),
    offset=st.integers(0, 2**61) | st.integers(2**35 - 600, 2**35 + 100),
    directions=st.integers(0, 3),
    shift=st.integers(0, 5),
    rounding=st.booleans(),
)
@many
def test_moments_of_any_size(
    rule: str,
    dtype: torch.dtype,
    wide: bool,
    numel: int,
    offset: int,
    directions: int,
    shift: int,
    rounding: bool,
) -> None:
    first = torch.float32 if wide else dtype
    check_moments([(numel,)], dtype, first, rule, offset, KEYS[:directions], shift, rounding)


@needs_extension
@pytest.mark.parametrize("transform", cpu.TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_squares(dtype: torch.dtype, transform: str) -> None:
    offsets = (*range(9), *FAR, *ROUNDING_FAR)
    for i, numel in enumerate((0, 1, 3, 5, 17, 64, 100, 127, 128, 129, 300, 1000)):
        keys = KEYS[: (1, 0, 2, 5)[i % 4]]
        for rounding in (False, True):
            check_moments(
                *([(numel,)], dtype, None, "adam", offsets[i], keys, i % 4, rounding),
                *(transform, True),
            )


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_many_squares(dtype: torch.dtype) -> None:
    rest = ("adam", 7, tuple(range(130)), 0, False, "rademacher", True)
    check_moments([(300,), ()], dtype, None, *rest)
    check_moments([(70_001,)], dtype, None, "adam", 65_533, KEYS[:1], 1, True, of_squares=True)


# ---- signs --------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_signs(dtype: torch.dtype) -> None:
    for i, numel in enumerate((*range(0, 71, 3), 128, 257, 1000)):
        offset, keys = (*range(8), *FAR)[i % 12], KEYS[: (1, 2, 5, 0)[i % 4]]
        for rounding in (False, True):
            check_dense([(numel,)], dtype, offset, keys, 0.9, i % 3, rounding, "rademacher")
    shapes = [(70_001,), (0, 3), (), (3, 5, 7)]
    check_dense(shapes, dtype, 65_533, KEYS[:2], 0.99, 1, transform="rademacher")


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_scripts_of_signs(dtype: torch.dtype) -> None:
    check_steps([(3, 5), (1, 200), (9,), (2, 3, 8), (3, 0), ()], dtype, 3, 1, "rademacher")


@needs_extension
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_signs(dtype: torch.dtype, rule: str) -> None:
    for i, first in enumerate((dtype, torch.float32, None)):
        if rule == "adam" and first is None:
            continue
        for numel in (5, 128, 301):
            keys, rounding = KEYS[: i + 1], numel % 2 == 0
            check_moments(
                *([(numel,)], dtype, first, rule, FAR[i], keys, i, rounding, "rademacher")
            )


@needs_extension
@pytest.mark.parametrize("transform", [-1, len(EXACT), len(TRANSFORMS)])
def test_operators_refuse_transforms_that_they_lack(transform: int) -> None:
    out, one = torch.zeros(5), torch.ones(1)
    table = cpu.noise_table("dense_", [[out]], int64(0), int64(0))
    operators, rows = torch.ops.zo_fused_C, (table, int64(1))
    for call in (
        lambda: operators.normal(*rows, transform),
        lambda: operators.dense(*rows, one, one, None, transform),
        lambda: operators.dense_steps(*rows, int64(0, -1, -1)[None], one, one, transform),
        lambda: operators.moments(*rows, one, one, torch.ones(6), one, 0, None, transform, None),
    ):
        with pytest.raises(RuntimeError, match="no transform"):
            call()
    assert not out.any()


# ---- low rank -----------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [*range(1, 10), 16, 64])
def test_lowrank(dtype: torch.dtype, rank: int) -> None:
    shapes = [(), (1,), (7,), (1, 40), (40, 1), (3, 5), (9, 33), (6, 3, 3, 3), (5, 64), (0, 3)]
    for i, shape in enumerate(shapes):
        check_lowrank(shape, rank, dtype, decay=(1.0, 0.75)[i % 2], shift=i % 3)


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    rank=st.integers(1, 12),
    shift=st.integers(0, 5),
)
@many
def test_lowrank_of_any_shape(
    dtype: torch.dtype, rows: int, columns: int, rank: int, shift: int
) -> None:
    check_lowrank((rows, columns), rank, dtype, shift=shift)


@needs_extension
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((2, 67_001), 1), ((2, 35_001), 5), ((67_001, 2), 2), ((150_001,), 1), ((35, 2_100), 64)],
)
def test_lowrank_over_many_chunks(shape: tuple[int, ...], rank: int) -> None:
    check_lowrank(shape, rank, torch.float16)


@needs_extension
def test_lowrank_of_several_parameters() -> None:
    shapes = [(5, 70), (0, 4), (33,), (260, 300)]
    ranks = [2, 3, 1, 4]
    params = [
        weights(s, d, i)
        for i, (s, d) in enumerate(zip(shapes, [*DTYPES, torch.float16], strict=True))
    ]
    rows = [s[0] for s in shapes]
    columns = [p.numel() // r if r else 0 for p, r in zip(params, rows, strict=True)]
    us = [torch.randn(m, r) for m, r in zip(rows, ranks, strict=True)]
    vs = [torch.randn(n, r) for n, r in zip(columns, ranks, strict=True)]
    decay = torch.rand(4)
    check("lowrank_", [params], us, vs, torch.randn(4), decay)
    moments = [torch.randn_like(u) for u in us]
    check("lowrank_momentum_", [params, moments], us, vs, torch.randn(4, 4), decay)
    check("factor_momentum_", [moments], us, torch.randn(4), decay)


# ---- the build ----------------------------------------------------------------------------------


@needs_extension
def test_unsupported_dtype_raises_and_writes_nothing() -> None:
    good, bad = torch.zeros(5), torch.zeros(5, dtype=torch.float64)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        cpu.dense_([good, bad], int64(0, 1), int64(0, 0), int64(1), torch.ones(2, 1), torch.ones(2))
    with pytest.raises(TypeError, match="dtype"):
        cpu.normal_([good, bad], int64(0, 1), int64(0, 0), int64(1, 1))
    rest = (int64(0), int64(0), int64(1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 6))
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        cpu.moments_([good], [bad], [], *rest, torch.ones(1), "sign")
    with pytest.raises(TypeError, match="dtype"):
        cpu.moments_([good], [good], [bad], *rest, torch.ones(1), "adam")
    assert not good.any()


@needs_extension
def test_rounding_without_streams_raises() -> None:
    w, one = torch.zeros(5, dtype=torch.float16), torch.ones(1)
    factors = ([torch.ones(5, 1)], [torch.ones(1, 1)])
    with pytest.raises(ValueError, match="needs ids and offsets"):
        cpu.lowrank_([w], *factors, one, one, None, None, int64(1))
    assert not w.any()


@needs_extension
@pytest.mark.skipif("ZO_FUSED_ISA" in os.environ, reason="the process above runs it")
@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    """This file again, in a process that is told to use the instruction set."""
    if isa == cpu.isa():
        pytest.skip("the one that this process uses")
    if ISAS.index(isa) > ISAS.index(cpu.isa()):
        pytest.skip(f"this CPU lacks {isa}")
    rest = "not memory and not headers and not unknown and not every_instruction"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", rest, __file__],
        env={**os.environ, "ZO_FUSED_ISA": isa},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@needs_extension
def test_instruction_set_is_the_one_asked_for() -> None:
    wanted = os.environ.get("ZO_FUSED_ISA")
    assert cpu.isa() == wanted if wanted else cpu.isa() in ISAS


@needs_extension
def test_unknown_instruction_set_is_an_error() -> None:
    code = "from zo_fused.sweeps.backends import cpu; cpu.isa()"
    env = {**os.environ, "ZO_FUSED_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ZO_FUSED_ISA=mmx: choose portable, avx2 or avx512" in run.stderr


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_scripts(dtype: torch.dtype) -> None:
    check_steps([(3, 5), (1, 200), (200, 1), (9,), (2, 3, 8), (3, 0), ()], dtype, 3, shift=1)
    check_steps([(70_000,), (300, 70), (17, 2100)], dtype)


@needs_extension
@pytest.mark.parametrize("offset", [FAR[0], *ROUNDING_FAR])
def test_scripts_far_into_a_parameter(offset: int) -> None:
    check_steps([(7, 61)], torch.bfloat16, offset)


@needs_extension
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 70),
    offset=st.integers(0, 300),
    shift=st.integers(0, 8),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=15)
def test_scripts_of_any_shape(
    rows: int, columns: int, offset: int, shift: int, dtype: torch.dtype
) -> None:
    check_steps([(rows, columns)], dtype, offset, shift)


PEAK_MEMORY = """
    import resource
    import torch
    from zo_fused.sweeps.backends import cpu

    def peak():  # bytes
        try:
            with open("/proc/self/status") as status:
                line = next(line for line in status if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def growth(sweep):
        sweep()  # threads and their stacks exist after this
        try:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")
        except OSError:
            pass
        before = peak()
        sweep()
        return peak() - before

    rows, columns, rank = 8192, 8192, 4
    w = torch.zeros(rows, columns, dtype=torch.float16)
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    streams = (zero, zero, zero)
    u, v = torch.randn(rows, rank), torch.randn(columns, rank)
    print(growth(lambda: cpu.dense_([w], *streams, one[None], one)))
    print(growth(lambda: cpu.dense_([w], *streams, one[None], one, zero)))
    factor = 4 * columns * rank
    print(growth(lambda: cpu.lowrank_([w], [u], [v], one, one)) - factor)
    print(growth(lambda: cpu.lowrank_([w], [u], [v], one, one, *streams)) - factor)
    grads = (one[None], one[None])
    moments = ([torch.zeros_like(w)], [], *streams, *grads, torch.ones(1, 6), one, "sign", zero)
    print(growth(lambda: cpu.moments_([w], *moments)))
    moments = ([], [], *streams, *grads, torch.ones(1, 6), one, "adam", None, "portable", one[None])
    print(growth(lambda: cpu.moments_([w], *moments)))
"""


@needs_extension
def test_peak_memory() -> None:
    """A sweep over 64M elements needs less than 1 MB beside the weights and one factor."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(PEAK_MEMORY)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    growths = [int(line) for line in run.stdout.split()]
    assert len(growths) == 6
    assert max(growths) < 2**20, growths


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_headers_alone(compiler: str, tmp_path: Path) -> None:
    """philox.h and normal.h compile without torch and give the known answers."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    program = tmp_path / "noise"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(
        [compiler, *flags, str(TESTS / "cpp/noise.cpp"), "-o", str(program), "-lm"], check=True
    )
    lines = (TESTS / "data/philox_kat.txt").read_text().splitlines()
    known = [line.split(";") for line in lines if not line.startswith("#")]
    answers = subprocess.run(
        [str(program)],
        input="\n".join(counter + key for counter, key, _ in known),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(answers) == len(known) == 3
    for answer, (_, _, expected) in zip(answers, known, strict=True):
        words, normals, signs = (answer.split()[i : i + 4] for i in (0, 4, 8))
        assert words == expected.split()
        w = [torch.tensor([int(word, 16)]) for word in words]
        z = (*noise_reference.normal_pair(w[0], w[1]), *noise_reference.normal_pair(w[2], w[3]))
        assert [f"{as_bits(x).item() & 0xFFFFFFFF:08x}" for x in z] == normals
        assert signs == ["3f800000" if int(word, 16) < 2**31 else "bf800000" for word in words]
