"""The sweeps as operators: exact identities, float64 formulas, registration, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.backends import slow_in_triton
from support.equality import same_bits
from torch import Tensor

import zo_fused
from zo_fused import noise
from zo_fused.sweeps.numbers import EXACT

KEY = noise.derive_key(0, noise.Purpose.DENSE)
KEYS = [noise.derive_key(0, noise.Purpose.DENSE, step) for step in range(3)]
KEY_U = noise.derive_key(0, noise.Purpose.U)
KEY_V = noise.derive_key(0, noise.Purpose.V)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


pytestmark = pytest.mark.usefixtures("backend")


def weights(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(0.02).to(dtype)


# ---- dense --------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", EXACT)
def test_perturbing_zeros_at_scale_one_gives_the_noise(transform: str) -> None:
    params = [torch.zeros(7), torch.zeros(3, 5), torch.zeros(())]
    zo_fused.perturb_(params, KEY, 1.0, transform=transform)
    for i, p in enumerate(params):
        wanted = noise.normal(p.numel(), KEY, id=i, transform=transform)
        assert torch.equal(p.flatten(), wanted)


@pytest.mark.parametrize("transform", EXACT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_is_one_rounding_of_the_float64_formula(dtype: torch.dtype, transform: str) -> None:
    """float32 arithmetic of K = 3 terms, then one rounding to the weight's dtype.

    Each of the four float32 operations is off by at most 2**-24 of the running sum, itself below
    0.2; the last rounding by half a unit in the last place of the dtype.
    """
    p = weights(1000, dtype=dtype)
    coeffs, decay = [1e-2, -3e-3, 2e-2], 0.9
    exact = decay * p.double()
    for key, c in zip(KEYS, coeffs, strict=True):
        exact += c * noise.normal(1000, key, id=4, transform=transform).double()
    zo_fused.update_([p], KEYS, coeffs, decay, ids=[4], transform=transform)
    half_ulp = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
    assert ((p.double() - exact).abs() <= half_ulp + 4 * 2.0**-24 * 0.2).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_plus_then_minus_returns_within_two_roundings(dtype: torch.dtype) -> None:
    p = weights(4096, dtype=dtype)
    before = p.clone()
    zo_fused.perturb_([p], KEY, 1e-3)
    assert not torch.equal(p, before)
    largest = torch.maximum(before.abs(), p.abs()).double()
    zo_fused.perturb_([p], KEY, -1e-3)
    # Two roundings of half an ulp each, at the larger of the two magnitudes.
    assert ((p - before).double().abs() <= torch.finfo(dtype).eps * largest).all()


@slow_in_triton
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    order=st.randoms(use_true_random=False),
)
def test_order_and_company_of_parameters_do_not_matter(shapes, dtype, order) -> None:  # type: ignore[no-untyped-def]
    together = [weights(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    alone = [p.clone() for p in together]
    positions = list(range(len(together)))
    order.shuffle(positions)
    zo_fused.perturb_([together[i] for i in positions], KEY, 0.5, ids=positions)
    for i, p in enumerate(alone):
        zo_fused.perturb_([p], KEY, 0.5, ids=[i])
    assert all(same_bits(a, b) for a, b in zip(together, alone, strict=True))


@slow_in_triton
@given(
    numel=st.integers(1, 300),
    cut=st.integers(0, 300),
    start=st.sampled_from([0, 1, 6, 2**34 - 7]),
    dtype=st.sampled_from(DTYPES),
)
def test_shards_equal_the_whole(numel: int, cut: int, start: int, dtype: torch.dtype) -> None:
    whole = weights(numel, dtype=dtype)
    cut = min(cut, numel)
    shards = [whole[:cut].clone(), whole[cut:].clone()]
    zo_fused.update_([whole], KEYS, [0.1, 0.2, 0.3], 0.99, ids=[9], offsets=[start])
    for shard, offset in zip(shards, (start, start + cut), strict=True):
        zo_fused.update_([shard], KEYS, [0.1, 0.2, 0.3], 0.99, ids=[9], offsets=[offset])
    assert same_bits(whole, torch.cat(shards))


def test_noise_does_not_depend_on_the_dtype_of_the_weights() -> None:
    z = noise.normal(50, KEY)
    for dtype in DTYPES:
        p = torch.zeros(50, dtype=dtype)
        zo_fused.perturb_([p], KEY, 1.0)
        assert same_bits(p, z.to(dtype))


def test_neighbouring_memory_is_not_touched() -> None:
    memory = torch.full((64,), 7.0, dtype=torch.float16)
    zo_fused.perturb_([memory[5:38]], KEY, 1.0)
    assert (memory[:5] == 7).all()
    assert (memory[38:] == 7).all()
    assert (memory[5:38] != 7).all()


def test_permuted_parameter_gets_noise_by_logical_index() -> None:
    p = torch.zeros(3, 4).t()
    zo_fused.perturb_([p], KEY, 1.0)
    assert torch.equal(p.reshape(-1), noise.normal(12, KEY))


def test_coefficients_per_parameter_and_as_tensors() -> None:
    a, b = torch.zeros(6), torch.zeros(6)
    zo_fused.update_([a, b], KEYS[:1], torch.tensor([[1.0], [2.0]]), [1.0, 1.0], ids=[0, 1])
    assert torch.equal(a, noise.normal(6, KEYS[0], id=0))
    assert torch.equal(b, 2 * noise.normal(6, KEYS[0], id=1))
    c = torch.zeros(6)
    zo_fused.perturb_([c], KEYS[0], torch.tensor(2.0), ids=[1])
    assert torch.equal(b, c)


# ---- stochastic rounding ------------------------------------------------------------------------

ROUNDING = [noise.derive_key(0, noise.Purpose.ROUNDING, step) for step in range(4)]


@slow_in_triton
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """A thousandth of an ulp is lost by rounding to nearest, and kept on average by this."""
    copies = 500
    p = weights(64, dtype=dtype).expand(copies, 64)
    exact = p.double() + 1e-6 * noise.normal(p.numel(), KEY, id=0).double().view(copies, 64)
    total = torch.zeros(64, dtype=torch.float64)
    for key in ROUNDING:
        q = p.clone()
        zo_fused.update_([q], [KEY], [1e-6], rounding_key=key)
        total += (q.double() - exact).sum(0)
    # Each result is one of two neighbours an ulp apart: standard deviation at most half of it.
    n = copies * len(ROUNDING)
    ulp = torch.finfo(dtype).eps * p[0].double().abs()
    assert (total.abs() / n <= 4 * ulp / 2 / n**0.5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_of_every_sweep_goes_to_a_neighbour(dtype: torch.dtype) -> None:
    def sweeps(p: Tensor, **options: int) -> list[Tensor]:
        results = [p.clone() for _ in range(4)]
        u, v, moment = torch.ones(6, 2), torch.ones(8, 2), torch.ones(6, 2)
        zo_fused.update_(results[:1], KEYS, [1e-3] * 3, **options)
        zo_fused.lowrank_update_(results[1:2], [u], [v], 1e-3, **options)
        zo_fused.lowrank_momentum_(results[2:3], [moment], [u], [v], 1, 1e-3, 0.5, **options)
        zo_fused.moments_update_(results[3:], KEYS, [1] * 3, "momentum", 1e-3, **options)
        return results

    p = weights(6, 8, dtype=dtype)
    exact = sweeps(p.float())
    one, two = (sweeps(p, rounding_key=key) for key in ROUNDING[:2])
    for a, b, wanted in zip(one, two, exact, strict=True):
        if dtype == torch.float32:
            assert same_bits(a, wanted)
        else:
            assert not same_bits(a, b)
            ulp = torch.finfo(dtype).eps * wanted.abs() + torch.finfo(dtype).tiny
            assert ((a.float() - wanted).abs() <= ulp).all()


def test_stochastic_rounding_does_not_depend_on_sharding() -> None:
    whole = weights(100, dtype=torch.bfloat16)
    parts = [whole[:37].clone(), whole[37:].clone()]
    zo_fused.update_([whole], [KEY], [1e-4], ids=[5], rounding_key=ROUNDING[0])
    zo_fused.update_(parts, [KEY], [1e-4], ids=[5, 5], offsets=[0, 37], rounding_key=ROUNDING[0])
    assert same_bits(whole, torch.cat(parts))


# ---- moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["momentum", "sign", "adam"])
def test_moments_follow_the_float64_formula(rule: str) -> None:
    grads, restores = [0.3, -0.2, 0.1], [0.0, 1e-3, -1e-3]
    p, m, v = weights(50), torch.randn(50), torch.rand(50)
    z = torch.stack([noise.normal(50, key, id=0).double() for key in KEYS])
    g = torch.tensor(grads, dtype=torch.float64) @ z
    m_exact = 0.9 * m.double() + 0.1 * g
    v_exact = 0.99 * v.double() + 0.01 * g * g
    step = {
        "momentum": m_exact,
        "sign": m_exact.sign(),
        "adam": m_exact / (v_exact.sqrt() + 1e-8),
    }[rule]
    p_exact = 0.999 * p.double() + torch.tensor(restores, dtype=torch.float64) @ z - 0.01 * step
    zo_fused.moments_update_(
        [p], KEYS, grads, rule, -0.01,
        firsts=[m], seconds=[v] if rule == "adam" else (),
        beta=0.9, gain=0.1, beta2=0.99, gain2=0.01, eps=1e-8, restores=restores, decay=0.999,
    )  # fmt: skip
    # A handful of float32 roundings of terms of order one.
    torch.testing.assert_close(m.double(), m_exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.double(), p_exact, rtol=1e-6, atol=1e-6)
    if rule == "adam":
        torch.testing.assert_close(v.double(), v_exact, rtol=1e-6, atol=1e-6)


def float64_adam_of_squares(
    p: Tensor, keys: list[int], rows: list[list[float]], transform: str
) -> Tensor:
    """With gain 0.1, eps 1e-3, step -0.01, decay 0.999; the rows are grads, restores, squares."""
    grads, restores, squares = torch.tensor(rows).double()
    z = torch.stack([noise.normal(p.numel(), k, 0, transform=transform).double() for k in keys])
    v = squares @ z**2
    return 0.999 * p.double() + restores @ z - 0.01 * (0.1 * grads @ z) / (v.sqrt() + 1e-3)


@pytest.mark.parametrize(
    ("directions", "transform"), [(1, "portable"), (3, "portable"), (130, "signs")]
)
def test_adam_of_squares_follows_the_float64_formula(directions: int, transform: str) -> None:
    keys = [noise.derive_key(0, noise.Purpose.DENSE, step) for step in range(directions)]
    decayed = [0.99 ** (directions - k) for k in range(directions)]
    grads = [0.3 * (-1) ** k * c for k, c in enumerate(decayed)]
    restores = [0.0] * (directions - 1) + [1e-3]
    rows = [grads, restores, [0.01 * c**2 for c in decayed]]
    p = weights(50)
    exact = float64_adam_of_squares(p, keys, rows, transform)
    zo_fused.moments_update_(
        [p], keys, grads, "adam", -0.01,
        gain=0.1, eps=1e-3, restores=restores, decay=0.999, squares=rows[2], transform=transform,
        beta=0.7, beta2=0.7, gain2=7.0,  # which do not matter
    )  # fmt: skip
    # m is a sum of up to 130 terms below 0.3, each rounded in float32, and moves p by a hundredth
    # of its quotient by sqrt(v), which is about 0.1 sqrt(K) or, with one direction, 0.1 |z|.
    torch.testing.assert_close(p.double(), exact, rtol=1e-6, atol=1e-6)


def test_adam_of_squares_has_coefficients_for_every_parameter() -> None:
    together, alone = [weights(9), weights(4, 5)], [weights(9), weights(4, 5)]
    tables = [torch.rand(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def sweep(params: list[Tensor], rows: slice, ids: list[int]) -> None:
        grads, restores, squares = (table[rows] for table in tables)
        zo_fused.moments_update_(
            params, KEYS, grads, "adam", -0.1, restores=restores, squares=squares, eps=1e-6, ids=ids
        )

    sweep(together, slice(None), [0, 1])
    for i in range(2):
        sweep(alone[i : i + 1], slice(i, i + 1), [i])
        assert same_bits(together[i], alone[i])


def test_sign_without_state_moves_every_weight_by_the_step() -> None:
    p = torch.zeros(33)
    zo_fused.moments_update_([p], [KEY], [2.0], "sign", -0.5)
    assert torch.equal(p, -0.5 * noise.normal(33, KEY).sign())


def test_moments_of_a_permuted_parameter_lie_like_it() -> None:
    p, m = torch.zeros(3, 4).t(), torch.zeros(3, 4).t()
    zo_fused.moments_update_([p], [KEY], [1.0], "momentum", 2.0, firsts=[m])
    assert torch.equal(m.reshape(-1), noise.normal(12, KEY))
    assert torch.equal(p, 2 * m)


# ---- low rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (6,), (4, 3, 2, 2), (1, 9), (9, 1), ()])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_lowrank_direction_is_u_times_v(shape: tuple[int, ...], rank: int) -> None:
    p = torch.zeros(shape)
    m = shape[0] if shape else 1
    n = p.numel() // m
    u = noise.normal(m * rank, KEY_U, id=3).view(m, rank).double()
    v = noise.normal(n * rank, KEY_V, id=3).view(n, rank).double()
    zo_fused.lowrank_perturb_([p], KEY_U, KEY_V, 1.0, rank=rank, ids=[3])
    # An fma chain of `rank` terms: each rounding is 2**-24 of a partial sum.
    bound = rank * 2.0**-24 * (u.abs() @ v.abs().T).view(shape)
    assert ((p.double() - (u @ v.T).view(shape)).abs() <= bound).all()
    assert (p != 0).all()


def test_given_factors_equal_regenerated_ones() -> None:
    p, q = weights(6, 5), weights(6, 5)
    us = [noise.normal(12, KEY_U).view(6, 2)]
    vs = [noise.normal(10, KEY_V).view(5, 2)]
    zo_fused.lowrank_update_([p], us, vs, -0.1, 0.9)
    zo_fused.lowrank_update_([q], KEY_U, KEY_V, -0.1, 0.9, rank=2)
    assert same_bits(p, q)
    assert not torch.equal(p, weights(6, 5))


def test_concatenated_factors_are_several_directions() -> None:
    us = [torch.randn(6, 2), torch.randn(6, 3)]
    vs = [torch.randn(5, 2), torch.randn(5, 3)]
    p = torch.zeros(6, 5)
    zo_fused.lowrank_update_([p], [torch.cat(us, 1)], [torch.cat(vs, 1)], 2.0)
    exact = 2 * sum(u.double() @ v.double().T for u, v in zip(us, vs, strict=True))
    torch.testing.assert_close(p.double(), exact, rtol=1e-6, atol=1e-6)


def test_momentum_in_the_factor() -> None:
    p, n = weights(6, 5), torch.randn(6, 2)
    u, v = torch.randn(6, 2), torch.randn(5, 2)
    n_exact = 0.9 * n.double() + 0.1 * 3.0 * u.double()
    a = 1e-3 * u.double() - 0.01 * n_exact
    p_exact = 0.99 * p.double() + a @ v.double().T
    zo_fused.lowrank_momentum_(
        [p], [n], [u], [v], grad=3.0, lr=0.01, beta=0.9, restore=1e-3, decay=0.99
    )
    torch.testing.assert_close(n.double(), n_exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.double(), p_exact, rtol=1e-6, atol=1e-7)


# ---- registration -------------------------------------------------------------------------------


def operator_calls() -> dict[str, tuple]:
    p = [weights(4, 6), weights(5, dtype=torch.float16)]
    i64 = torch.tensor([0, 1])
    zeros = torch.zeros(2, dtype=torch.int64)
    us = [torch.randn(4, 2), torch.randn(5, 2)]
    vs = [torch.randn(6, 2), torch.randn(1, 2)]
    one = torch.ones(2)
    rows = (torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 6), one)
    firsts, seconds = [torch.randn_like(t) for t in p], [torch.ones(4, 6), torch.ones(5)]
    moments = [torch.randn(4, 2), torch.randn(5, 2)]
    script = torch.tensor([[1, -1, -1], [0, 2, 1], [0, -1, -1]])
    lines = (torch.randn(2, 3, 2), torch.randn(2, 3))
    words = [torch.empty(9, dtype=torch.int64), torch.empty(2, dtype=torch.int64)]
    moments_of = (i64, zeros, torch.tensor([1, 2, 3]), *rows, "adam")
    return {
        "bits_": (words, i64, zeros, i64),
        "normal_": ([torch.empty(9), torch.empty(2, 3)], i64, zeros, i64),
        "dense_": (p, i64, zeros, torch.tensor([1, 2, 3]), torch.randn(2, 3), one, i64[:1]),
        "shaped_": (
            *(p, [torch.tensor([5, 6, 7], dtype=torch.uint8), torch.ones(5)]),
            *(i64, zeros, torch.tensor([1, 2, 3]), torch.randn(2, 3), one, i64[:1]),
        ),
        "dense_steps_": (p, i64, zeros, torch.tensor([1, 2, 3]), script, *lines),
        "dense_steps_ of signs": (
            *(p, i64, zeros, torch.tensor([1, 2, 3]), script, *lines, "signs"),
        ),
        "moments_": (p, firsts, seconds, *moments_of),
        "moments_ of squares": (*(p, [], [], *moments_of, None, "signs", torch.rand(2, 3)),),
        "moments_ of hizoo": (
            *(p, [], seconds, *moments_of[:-1], "hizoo", None, "portable", torch.rand(2, 3)),
        ),
        "lowrank_": (p, us, vs, torch.randn(2), one, i64, zeros, i64[:1]),
        "factor_momentum_": (moments, us, torch.randn(2), one),
        "lowrank_momentum_": (p, moments, us, vs, torch.randn(2, 4), one),
    }


@pytest.mark.parametrize("name", list(operator_calls()))
def test_opcheck(name: str) -> None:
    operator = getattr(torch.ops.zo_fused, name.partition(" ")[0]).default
    torch.library.opcheck(operator, operator_calls()[name])


def test_compiles_without_graph_breaks() -> None:
    def sweep(p: Tensor) -> Tensor:
        ids = torch.zeros(1, dtype=torch.int64)
        one = torch.ones(1)
        torch.ops.zo_fused.dense_([p], ids, ids, torch.tensor([5]), one[:, None], one)
        return p * 2

    compiled = torch.compile(sweep, fullgraph=True, backend="aot_eager")
    a, b = weights(10), weights(10)
    assert torch.equal(compiled(a), sweep(b))
    assert torch.equal(a, b)


# ---- bad input leaves weights as they were ------------------------------------------------------


def by_shape(p: Tensor, shape: Tensor) -> None:
    """A sweep over a tensor that begins with element 7."""
    ids, one = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    torch.ops.zo_fused.shaped_([p], [shape], ids, ids + 7, ids, one[:, None], one)


BAD: dict[str, tuple[type[Exception], str, Callable[[Tensor], None]]] = {
    "float64": (
        TypeError,
        "float64",
        lambda p: zo_fused.perturb_([p, torch.zeros(2, dtype=torch.float64)], KEY, 1.0),
    ),
    "integer": (
        TypeError,
        "int64",
        lambda p: zo_fused.perturb_([p, torch.zeros(2, dtype=torch.int64)], KEY, 1.0),
    ),
    "same id": (
        ValueError,
        "same id",
        lambda p: zo_fused.perturb_([p, torch.zeros(2)], KEY, 1.0, ids=[5, 5]),
    ),
    "too few ids": (
        ValueError,
        "ids",
        lambda p: zo_fused.perturb_([p, torch.zeros(2)], KEY, 1.0, ids=[5]),
    ),
    "negative offset": (
        ValueError,
        r"offsets\[0\] must be a whole number in \[0, 2\*\*62\), got -1",
        lambda p: zo_fused.perturb_([p], KEY, 1.0, offsets=[-1]),
    ),
    "shared elements": (
        ValueError,
        "share memory",
        lambda p: zo_fused.perturb_([p, torch.zeros(1).expand(4)], KEY, 1.0),
    ),
    "sparse": (
        ValueError,
        "dense tensor",
        lambda p: zo_fused.perturb_([p, torch.zeros(2).to_sparse()], KEY, 1.0),
    ),
    "factor shape": (
        ValueError,
        r"us\[0\] must be \(3, rank\)",
        lambda p: zo_fused.lowrank_update_([p], [torch.zeros(4, 2)], [torch.zeros(4, 2)], 1.0),
    ),
    "factor dtype": (
        TypeError,
        "us",
        lambda p: zo_fused.lowrank_update_(
            [p], [torch.zeros(3, 2).half()], [torch.zeros(4, 2)], 1.0
        ),
    ),
    "no rank": (
        ValueError,
        "rank",
        lambda p: zo_fused.lowrank_perturb_([p], KEY_U, KEY_V, 1.0),
    ),
    "fast on a CPU": (
        ValueError,
        "portable",
        lambda p: zo_fused.perturb_([p], KEY, 1.0, transform="fast"),
    ),
    "unknown transform": (
        ValueError,
        "transform='quick'",
        lambda p: zo_fused.perturb_([p], KEY, 1.0, transform="quick"),
    ),
    "unknown rule": (
        ValueError,
        "rule='sgd'",
        lambda p: zo_fused.moments_update_([p], [KEY], [1.0], "sgd", 0.1),
    ),
    "adam without moments": (
        ValueError,
        "firsts",
        lambda p: zo_fused.moments_update_([p], [KEY], [1.0], "adam", 0.1),
    ),
    "adam of squares with moments": (
        ValueError,
        "no firsts and no seconds",
        lambda p: zo_fused.moments_update_(
            [p], [KEY], [1.0], "adam", 0.1, firsts=[p.clone()], seconds=[p.clone()], squares=[1.0]
        ),
    ),
    "adam of squares with second moments": (
        ValueError,
        "no firsts and no seconds",
        lambda p: zo_fused.moments_update_(
            [p], [KEY], [1.0], "adam", 0.1, seconds=[p.clone()], squares=[1.0]
        ),
    ),
    "squares without adam": (
        ValueError,
        "rule 'sign' has no squares",
        lambda p: zo_fused.moments_update_([p], [KEY], [1.0], "sign", 0.1, squares=[1.0]),
    ),
    "squares of a wrong shape": (
        ValueError,
        r"squares must be torch.float32 of shape \(1, 2\)",
        lambda p: torch.ops.zo_fused.moments_(
            *([p], [], [], torch.tensor([0]), torch.tensor([0]), torch.tensor([1, 2])),
            *(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 6), torch.ones(1), "adam"),
            *(None, "portable", torch.ones(1, 1)),
        ),
    ),
    "second moments without adam": (
        ValueError,
        "no second moments",
        lambda p: zo_fused.moments_update_([p], [KEY], [1.0], "sign", 0.1, seconds=[p.clone()]),
    ),
    "first moments in another dtype": (
        ValueError,
        r"firsts\[0\]",
        lambda p: zo_fused.moments_update_([p], [KEY], [1.0], "sign", 0.1, firsts=[p.half()]),
    ),
    "rounding key of a wrong shape": (
        ValueError,
        "rounding",
        lambda p: zo_fused.update_([p], [KEY], [1.0], rounding_key=torch.zeros(2).long()),
    ),
    "a mask of another size": (
        ValueError,
        r"shapes\[0\], a packed mask of 12 weights from element 7 on, must have shape \(3,\)",
        lambda p: by_shape(p, torch.zeros(2, dtype=torch.uint8)),
    ),
    "a scale of another shape": (ValueError, r"shapes\[0\]", lambda p: by_shape(p, torch.ones(12))),
    "a shape of another dtype": (
        TypeError,
        r"shapes\[0\] must be uint8, a packed mask, or float32",
        lambda p: by_shape(p, torch.ones(3, 4, dtype=torch.float64)),
    ),
    "hizoo without squares": (
        ValueError,
        "needs squares",
        lambda p: zo_fused.moments_update_([p], [KEY], [1.0], "hizoo", 0.1, seconds=[p.clone()]),
    ),
    "moment shape": (
        ValueError,
        "moments",
        lambda p: zo_fused.lowrank_momentum_(
            [p], [torch.zeros(3, 1)], KEY_U, KEY_V, 1.0, 1.0, 0.9, rank=2
        ),
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_refused_before_anything_is_written(name: str, backend: str) -> None:
    if name == "fast on a CPU" and backend == "triton":
        pytest.skip("the interpreter has this transform, for tests")
    error, message, call = BAD[name]
    p = weights(3, 4)
    before = p.clone()
    with pytest.raises(error, match=message):
        call(p)
    assert torch.equal(p, before)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        zo_fused.set_backend("gpu")


def test_set_backend_and_backend_of() -> None:
    previous = zo_fused.set_backend("reference")
    try:
        assert zo_fused.backend_of(torch.zeros(1)) == "reference"
    finally:
        assert zo_fused.set_backend(previous) == "reference"
