"""The noise contract: known answers, an independent Philox, accuracy, statistics, independence."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path

import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import zo_fused
from zo_fused import noise
from zo_fused.noise import Purpose, derive_key
from zo_fused.noise import reference as noise_reference
from zo_fused.noise.streams import MASK32, parameter_id, philox4x32
from zo_fused.sweeps.numbers import EXACT

KAT = [
    [[int(word, 16) for word in part.split()] for part in line.split(";")]
    for line in (Path(__file__).parents[1] / "data" / "philox_kat.txt").read_text().splitlines()
    if line and not line.startswith("#")
]

word = st.integers(0, MASK32)
u64 = st.integers(0, 2**64 - 1)


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), KAT)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox4x32(tuple(counter), tuple(key)) == tuple(expected)  # type: ignore[arg-type]


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_equals_randomgen(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    """randomgen is an independent implementation; it steps the counter before its first block."""
    from randomgen import Philox

    number = sum(c << 32 * i for i, c in enumerate(counter))
    before = (number - 1) % 2**128
    generator = Philox(counter=before, key=key[0] | key[1] << 32, number=4, width=32)
    assert generator.random_raw(4).tolist() == list(philox4x32(counter, key))  # type: ignore[arg-type]


@given(st.integers(0, 2**60 - 1), u64, u64)
def test_random_bits_follow_the_counter_layout(n: int, param_id: int, key: int) -> None:
    """Element e is word e % 4 of counter (n low, n high, id low, id high), n = e // 4."""
    counter = (n & MASK32, n >> 32, param_id & MASK32, param_id >> 32)
    expected = philox4x32(counter, (key & MASK32, key >> 32))
    assert noise.random_bits(4, key, param_id, 4 * n).tolist() == list(expected)


@given(u64, u64, st.integers(0, MASK32), st.sampled_from(list(Purpose)))
def test_stream_keys_are_philox_output(seed: int, step: int, query: int, purpose: Purpose) -> None:
    words = philox4x32((step & MASK32, step >> 32, query, purpose), (seed & MASK32, seed >> 32))
    assert derive_key(seed, purpose, step, query) == words[0] + (words[1] << 32)


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"step": -1}, {"query": 2**32}])
def test_derive_key_refuses_what_it_would_truncate(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        derive_key(**{"seed": 0, "purpose": 1, **bad})


def test_purposes_are_fixed() -> None:
    assert {p.name: p.value for p in Purpose} == {
        "DENSE": 1,
        "U": 2,
        "V": 3,
        "ROUNDING": 4,
        "LEFT": 5,
        "CORE": 6,
        "RIGHT": 7,
        "PROBE": 8,
        "TEST": 9,
        "SCALAR": 10,
        "INIT": 11,
        "MASK": 12,
    }


def test_the_keys_that_are_told() -> None:
    """The vectors of docs/noise.md, all with seed 42."""
    text = (Path(__file__).parents[2] / "docs" / "noise.md").read_text()
    told = re.findall(r"derive_key\(42, (\d+), (\d+), 0\)`, .* \| `(\w+) (\w+)` \|", text)
    assert {int(purpose) for purpose, _, _, _ in told} == {5, 6, 7, 8, 9, 11}
    for purpose, step, high, low in told:
        assert derive_key(42, int(purpose), int(step), 0) == int(high + low, 16)


def test_parameter_id_is_the_start_of_sha256() -> None:
    digest = hashlib.sha256(b"model.layers.0.weight").digest()
    assert parameter_id("model.layers.0.weight") == int.from_bytes(digest[:8], "little")


# ---- fma ----------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(finite, finite, finite)
def test_reference_fma_rounds_once(a: float, b: float, c: float) -> None:
    """Against exact rational arithmetic: the float32 nearest to a*b + c, ties to even."""
    from fractions import Fraction

    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = noise_reference.fma(a, b, c)
    if not torch.isfinite(got):
        # At or beyond the midpoint between the largest float32 and 2**128.
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    below = torch.nextafter(got, torch.tensor(-math.inf))
    above = torch.nextafter(got, torch.tensor(math.inf))
    error = abs(Fraction(got.item()) - exact)
    for neighbour in (below, above):
        if torch.isfinite(neighbour):
            other = abs(Fraction(neighbour.item()) - exact)
            even = got.view(torch.int32).item() % 2 == 0
            assert error < other or (error == other and even)


def test_reference_fma_avoids_double_rounding() -> None:
    """a * a is the midpoint of two float32; c decides, and is lost in a float64 sum."""
    a, c = 1 + 2**-12, 2.0**-80
    down, up = 1 + 2**-11, 1 + 2**-11 + 2**-23
    assert noise_reference.fma(a, a, c).item() == up
    assert noise_reference.fma(a, a, -c).item() == down
    assert noise_reference.fma(a, -a, -c).item() == -up
    assert noise_reference.fma(a, -a, c).item() == -down
    assert noise_reference.fma(a, a, 0.0).item() == down  # a true tie goes to even


# ---- normals ------------------------------------------------------------------------------------


def box_muller(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract's Box-Muller in float64, straight from its definition."""
    u = (a & 0x7FFFFFFF | 1).float().double() * 2.0**-31
    angle = math.pi / 4 * ((b & 0x7FFFFF).double() * 2.0**-22)
    r = torch.sqrt(-2 * torch.log(u))
    sign_a, sign_b = 1.0 - 2.0 * (a >> 31), 1.0 - 2.0 * (b >> 31)
    return sign_a * r * torch.cos(angle), sign_b * r * torch.sin(angle)


def test_normals_are_within_1e5_of_float64_box_muller() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (2, 1 << 20), generator=generator)
    edges = torch.arange(1 << 14)
    words[0, : 1 << 14] = edges  # u near 0
    words[0, 1 << 14 : 1 << 15] = 0x7FFFFFFF - edges  # u near 1
    words[1, : 1 << 14] = edges * 512  # angles over the whole quadrant
    for z, exact in zip(noise_reference.normal_pair(*words), box_muller(*words), strict=True):
        error = (z.double() - exact).abs() / exact.abs().clamp(min=1)
        assert error.max() < 5e-6  # the contract promises 1e-5


def test_normals_reach_their_documented_limit() -> None:
    a = torch.tensor([0, 1, 0x80000000, 0x7FFFFFFF])
    z, _ = noise_reference.normal_pair(a, torch.zeros_like(a))
    limit = math.sqrt(2 * 31 * math.log(2))  # 6.556
    torch.testing.assert_close(
        z.double(), torch.tensor([limit, limit, -limit, 0.0]).double(), rtol=1e-5, atol=0
    )


@pytest.mark.slow
def test_moments_up_to_the_fourth() -> None:
    """Sampling error of the k-th moment of N samples: sqrt(var(z^k) / N); five of them."""
    n = 1 << 26 if zo_fused.backend_of("cpu") == "cpu" else 1 << 22
    key = derive_key(1, Purpose.DENSE)
    sums = torch.zeros(4, dtype=torch.float64)
    largest = 0.0
    for start in range(0, n, 1 << 22):
        z = noise.normal(1 << 22, key, id=3, offset=start).double()
        largest = max(largest, z.abs().max().item())
        for k in range(4):
            sums[k] += (z ** (k + 1)).sum()
    for moment, expected, variance in zip(
        (sums / n).tolist(), (0, 1, 0, 3), (1, 2, 15, 96), strict=True
    ):
        assert abs(moment - expected) < 5 * math.sqrt(variance / n)
    assert largest > scipy.stats.norm.isf(10 / n)  # ten samples are expected beyond this


def test_kolmogorov_smirnov() -> None:
    for seed in range(4):
        z = noise.normal(1 << 18, derive_key(seed, Purpose.DENSE, step=7), id=seed)
        assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 1e-3


# ---- signs --------------------------------------------------------------------------------------


def signs(numel: int, key: int, id: int = 0, offset: int = 0) -> torch.Tensor:
    return noise.normal(numel, key, id, offset, transform="signs")


@pytest.mark.parametrize(
    ("offset", "documented"),
    [
        (0, "-1 -1 -1 -1 +1 +1 +1 +1"),
        (62, "+1 -1 -1 -1 -1 +1"),
        (2**39 - 3, "-1 -1 -1 -1 +1 +1"),
    ],
)
def test_signs_of_the_documentation(offset: int, documented: str) -> None:
    id_ = parameter_id("model.decoder.layers.0.fc1.weight")
    wanted = [float(sign) for sign in documented.split()]
    assert signs(len(wanted), derive_key(42, Purpose.DENSE, 7), id_, offset).tolist() == wanted


@given(st.integers(0, 200), st.integers(0, 2**60), u64, u64)
def test_signs_are_the_bits_of_the_words(n: int, offset: int, param_id: int, key: int) -> None:
    z = signs(n, key, param_id, offset)
    assert z.dtype == torch.float32
    for i in (0, n // 2, n - 1) if n else ():
        e = offset + i
        counter, bit = 8 * (e // 1024) + e % 64 // 8, 8 * (e % 1024 // 64) + e % 8
        word = int(noise.random_bits(1, key, param_id, 4 * counter + bit // 32))
        assert z[i] == 1.0 - 2.0 * (word >> bit % 32 & 1)


def test_signs_take_every_bit_once() -> None:
    """A tile is the bits of its eight counters."""
    key = derive_key(1, Purpose.DENSE)
    words = noise.random_bits(32, key)
    assert int((signs(1024, key) < 0).sum()) == sum(int(w).bit_count() for w in words)


def test_signs_are_fair_and_independent() -> None:
    """Eight neighbours at a time: all 256 patterns are as frequent as each other."""
    n = 1 << 20
    for seed in range(4):
        z = signs(n, derive_key(seed, Purpose.DENSE, step=7), id=seed)
        assert z.abs().eq(1).all()
        assert abs(z.double().mean()) < 5 / math.sqrt(n)
        # Neighbours, with counters cut in two ways, and the runs of one counter.
        runs = z.view(-1, 16, 8, 8).transpose(1, 2).reshape(-1, 8)
        for eights in (z.view(-1, 8), z[3 : n - 5].view(-1, 8), runs):
            patterns = ((eights > 0).long() << torch.arange(8)).sum(1)
            counts = torch.bincount(patterns, minlength=256).numpy()
            assert 1e-4 < scipy.stats.chisquare(counts).pvalue < 1 - 1e-4


STREAMS = {
    "base": {},
    "other seed": {"seed": 1},
    "next step": {"step": 1},
    "next query": {"query": 1},
    "U": {"purpose": Purpose.U},
    "V": {"purpose": Purpose.V},
}


@pytest.mark.parametrize("transform", EXACT)
def test_streams_parameters_and_neighbours_are_uncorrelated(transform: str) -> None:
    """The bug of reseeding one generator for every parameter (es-at-scale #46) fails here."""
    n = 1 << 18
    rows = {}
    for name, change in STREAMS.items():
        key = derive_key(**{"seed": 0, "purpose": Purpose.DENSE, "step": 0, "query": 0, **change})
        rows[name] = noise.normal(n, key, id=0, transform=transform)
    key = derive_key(0, Purpose.DENSE)
    for name, id_, offset in (
        ("other parameter", 1, 0),
        ("named parameter", parameter_id("a.weight"), 0),
        ("next element", 0, 1),
        ("next counter", 0, 4),
    ):
        rows[name] = noise.normal(n, key, id_, offset, transform=transform)
    table = torch.stack(list(rows.values())).double()
    # The squares would show a shared radius; those of signs are 1, those of a counter of `hadamard`
    # depend on each other a little (test_hadamard.py).
    for values in (table, table**2 - 1)[: 2 if transform == "portable" else 1]:
        correlation = torch.corrcoef(values)
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 5.5 / math.sqrt(n)  # 90 pairs at 5.5 sigma


# ---- identities ---------------------------------------------------------------------------------


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.one_of(st.integers(0, 50), st.integers(2**34 - 300, 2**34 + 10), st.integers(0, 2**61)),
    u64,
    st.sampled_from(EXACT),
)
def test_any_split_gives_the_same_bits(
    first: int, second: int, offset: int, key: int, transform: str
) -> None:
    def normal(numel: int, offset: int) -> torch.Tensor:
        return noise.normal(numel, key, 5, offset, transform=transform)

    whole = normal(first + second, offset)
    parts = [normal(first, offset), normal(second, offset + first)]
    assert torch.equal(whole.view(torch.int32), torch.cat(parts).view(torch.int32))


def test_keys_in_a_tensor_are_signed() -> None:
    """torch has no full uint64, so a tensor holds keys in two's complement."""
    p = torch.zeros(9)
    zo_fused.update_([p], torch.tensor([-5]), [1.0])
    assert torch.equal(p, noise.normal(9, 2**64 - 5))


def test_normal_refuses_bad_ranges() -> None:
    with pytest.raises(ValueError, match="numel"):
        noise.normal(-1, 0)
    with pytest.raises(ValueError, match="offset"):
        noise.normal(1, 0, offset=2**62)


# ---- stochastic rounding ------------------------------------------------------------------------


def test_rounding_bits_are_the_words_cut_in_two() -> None:
    key = derive_key(42, Purpose.ROUNDING, 7)
    id_ = parameter_id("model.decoder.layers.0.fc1.weight")
    words = noise.random_bits(8, key, id_)
    cut = [half for word in words.tolist() for half in (word & 0xFFFF, word >> 16)]
    cpu = torch.device("cpu")
    assert noise_reference.rounding_bits(16, key, id_, 0, cpu).tolist() == cut
    assert noise_reference.rounding_bits(5, key, id_, 3, cpu).tolist() == cut[3:8]
    # The vector of docs/noise.md.
    documented = "6bb6 d9d1 a9f4 831f a6da 3a42 9732 e6c2 e104 c0bf"
    assert [f"{x:04x}" for x in cut[3:13]] == documented.split()


ALL_RANDOM = torch.arange(1 << 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(x=st.floats(-1000, 1000, width=32))
@example(x=float.fromhex("0x1.7ffffep-20"))
def test_stochastic_rounding_has_no_bias(dtype: torch.dtype, x: float) -> None:
    """The mean over all random numbers is x: to the bit where at most 16 bits are cut off.

    In float16 below 2**-14, where more are, x was rounded to 2**-13 of the spacing 2**-24 before.
    """
    value = torch.tensor(x)
    rounded = noise_reference.stochastic(value.expand(1 << 16), dtype, ALL_RANDOM).double()
    before = 2.0**-38 if dtype == torch.float16 else 0
    assert abs(float(rounded.mean()) - x) <= before
    # And to no others than the neighbours.
    spacing = (rounded.max() - rounded.min()).item()
    assert rounded.min() - before <= x <= rounded.max() + before
    limits = torch.finfo(dtype)
    assert spacing <= max(limits.eps * abs(x), limits.eps * limits.smallest_normal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_keeps_what_needs_none(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    for random in (0, 0x7FFF, 0xFFFF):
        got = noise_reference.stochastic(every.float(), dtype, torch.full(every.shape, random))
        assert torch.equal(got.view(torch.int16), every.view(torch.int16))
    assert noise_reference.stochastic(torch.tensor(math.nan), dtype, torch.tensor(0xFFFF)).isnan()


def test_stochastic_rounding_vectors() -> None:
    """The table of docs/noise.md."""
    for x, random, half, brain in (
        (-0.02, 0, 0xA51E, 0xBCA3),
        (-0.02, 0x8000, 0xA51F, 0xBCA4),
        (1e-7, 0, 0x0001, 0x33D6),
        (1e-7, 0x8000, 0x0002, 0x33D7),
        (65510.0, 0, 0x7BFF, 0x477F),
        (65510.0, 0xFFFF, 0x7C00, 0x4780),
    ):
        for dtype, wanted in ((torch.float16, half), (torch.bfloat16, brain)):
            got = noise_reference.stochastic(torch.tensor(x), dtype, torch.tensor(random))
            assert int(got.view(torch.int16)) & 0xFFFF == wanted
