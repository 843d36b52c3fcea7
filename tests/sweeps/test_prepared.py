"""Prepared sweeps: the bits of the operators, wherever the tensors move, in little Python."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.backends import slow_in_triton
from support.equality import assert_same_bits
from torch import Tensor

from zo_fused import noise
from zo_fused.noise.streams import as_int64
from zo_fused.sweeps import arguments, dispatch, operators
from zo_fused.sweeps.prepared import Prepared, prepare
from zo_fused.sweeps.signatures import SWEEPS

NAMES = tuple(SWEEPS)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = ((5, 7), (0, 3), (9,), (), (1, 40), (40, 1), (2, 3, 4))
KEYS = [as_int64(noise.derive_key(0, noise.Purpose.DENSE, step)) for step in range(9)]
ROUNDING = torch.tensor([as_int64(noise.derive_key(0, noise.Purpose.ROUNDING))])

Call = tuple[list[list[Tensor]], tuple[Any, ...]]  # the lists and the rows of a sweep
needs_cpu = pytest.mark.skipif(
    dispatch.why_not("cpu", "cpu") is not None, reason="no C++ extension"
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_of(name: str, count: int, seed: int = 0) -> tuple[Any, ...]:
    """Rows of a sweep; they differ from seed to seed."""
    keys = torch.tensor([KEYS[(i + seed) % len(KEYS)] for i in range(count)], dtype=torch.int64)
    two = torch.tensor(KEYS[seed : seed + 2])
    decay = 1 + 0.1 * random(count, seed=seed)
    rows: dict[str, tuple[Any, ...]] = {
        "bits_": (keys,),
        "normal_": (keys, "portable"),
        "dense_": (two, random(count, 2, seed=seed), decay, ROUNDING, "portable"),
        "moments_": (
            *(two, random(count, 2, seed=seed), random(count, 2, seed=seed + 1)),
            *(random(count, 6, seed=seed).abs(), decay, "adam", ROUNDING),
        ),
        "shaped_": (two, random(count, 2, seed=seed), decay, ROUNDING, "portable"),
        "dense_steps_": (
            *(two, torch.tensor([[0, -1, -1], [0, 1, -1], [1, -1, 0]])),
            *(random(count, 3, 2, seed=seed), random(count, 3, seed=seed), "portable"),
        ),
        "lowrank_": (random(count, seed=seed), decay, ROUNDING),
        "factor_momentum_": (random(count, seed=seed), decay),
        "lowrank_momentum_": (random(count, 4, seed=seed), decay, ROUNDING),
    }
    return rows[name]


def shape_of(p: Tensor, i: int) -> Tensor:
    """A scale, or where there are more weights than one a packed mask; `i` is the offset."""
    if p.numel() < 2:
        return torch.ones_like(p, dtype=torch.float32)
    return torch.arange(90, 90 + arguments.mask_bytes(p.numel(), i)).to(torch.uint8)


def call_of(name: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Call:
    numbered = list(enumerate(shapes))
    params = [random(*s, dtype=DTYPES[i % 3], seed=i) for i, s in numbered]
    matrices = [arguments.matrix_shape(p) for p in params]
    us, moments = ([random(m, 3, seed=s + m) for m, _ in matrices] for s in (1, 2))
    vs = [random(n, 3, seed=n) for _, n in matrices]
    lists: dict[str, list[list[Tensor]]] = {
        "bits_": [[torch.zeros(s, dtype=torch.int64) for s in shapes]],
        "normal_": [[torch.zeros(s) for s in shapes]],
        "dense_": [params],
        "moments_": [
            params,
            [random(*s, dtype=DTYPES[i % 3], seed=i + 1) for i, s in numbered],
            [random(*s, seed=i + 2).abs() for i, s in numbered],
        ],
        "shaped_": [params, [shape_of(p, i) for i, p in enumerate(params)]],
        "dense_steps_": [params],
        "lowrank_": [params, us, vs],
        "factor_momentum_": [moments, us],
        "lowrank_momentum_": [params, moments, us, vs],
    }
    return lists[name], rows_of(name, len(shapes))


def streams(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(7, 7 + count), torch.arange(count)


def copies(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def by_operator(name: str, lists: list[list[Tensor]], rows: tuple[Any, ...]) -> None:
    operator = getattr(operators, name)
    SWEEPS[name].bind(operator, lists, *streams(len(lists[0])))(*rows)


def assert_same_lists(got: list[list[Tensor]], wanted: list[list[Tensor]]) -> None:
    for tensors, others in zip(got, wanted, strict=True):
        for tensor, other in zip(tensors, others, strict=True):
            assert_same_bits(tensor, other)


class Watched(Prepared):
    """Counts how often it looked at its lists, and made a sweep."""

    looked = made = 0

    def _look(self) -> None:
        self.looked += 1
        super()._look()

    def _made_by(self, backend: Any) -> Callable[..., None]:
        self.made += 1
        return super()._made_by(backend)


# ---- bits ---------------------------------------------------------------------------------------


@slow_in_triton
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_operator(name: str, backend: str) -> None:
    lists, rows = call_of(name)
    wanted, before = copies(lists), copies(lists)
    sweep = Watched(name, lists, *streams(len(SHAPES)))
    for seed in range(3):
        rows = rows_of(name, len(SHAPES), seed)
        sweep(*rows)
        by_operator(name, wanted, rows)
        assert_same_lists(lists, wanted)
    assert not torch.equal(lists[0][0], before[0][0])
    assert (sweep.looked, sweep.made) == (1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_no_parameters(name: str, backend: str) -> None:
    lists: list[list[Tensor]] = [[] for _ in SWEEPS[name].lists]
    sweep = prepare(name, lists, *streams(0))
    sweep(*rows_of(name, 0))
    with pytest.raises(ValueError, match=r"of shape \(0"):
        sweep(*rows_of(name, 1))


@pytest.mark.parametrize("name", NAMES)
def test_no_elements(name: str, backend: str) -> None:
    lists, rows = call_of(name, ((0,), (0, 3), (2, 0)))
    if name == "factor_momentum_":  # the factors of such a parameter may have elements
        lists = [[tensor[:0] for tensor in tensors] for tensors in lists]
    before = copies(lists)
    prepare(name, lists, *streams(3))(*rows)
    assert_same_lists(lists, before)


@slow_in_triton
@pytest.mark.parametrize("rule", ["momentum", "sign"])
def test_moments_that_are_not_kept(rule: str, backend: str) -> None:
    (params, firsts, _), (*rows, _, rounding) = call_of("moments_")
    for lists in ([params, firsts, []], [params, [], []]):
        wanted = copies(lists)
        prepare("moments_", lists, *streams(len(params)))(*rows, rule, rounding=rounding)
        by_operator("moments_", wanted, (*rows, rule, rounding))
        assert_same_lists(lists, wanted)


def test_adam_of_squares(backend: str) -> None:
    (params, firsts, seconds), (*rows, rule, rounding) = call_of("moments_")
    squares = random(len(params), 2, seed=5).square()
    wanted = copies([params, [], []])
    sweep = prepare("moments_", [params, [], []], *streams(len(params)))
    strided = torch.stack([squares, squares], dim=-1)[..., 0]
    for given in (squares, strided):
        sweep(*rows, rule, rounding, "signs", squares=given)
        by_operator("moments_", wanted, (*rows, rule, rounding, "signs", squares))
        assert_same_lists([params], wanted[:1])
    with pytest.raises(ValueError, match="firsts"):
        sweep(*rows, rule, rounding)
    for bad in (squares[:, :1], squares[:1], squares.double(), squares.to("meta")):
        with pytest.raises(ValueError, match="squares"):
            sweep(*rows, rule, rounding, squares=bad)
    with pytest.raises(ValueError, match="no squares"):
        sweep(*rows, "sign", squares=squares)
    kept = prepare("moments_", [params, firsts, seconds], *streams(len(params)))
    with pytest.raises(ValueError, match="no firsts"):
        kept(*rows, rule, squares=squares)
    assert_same_lists([params], wanted[:1])


@pytest.mark.parametrize("name", ["normal_", "dense_", "dense_steps_", "moments_"])
def test_signs(name: str, backend: str) -> None:
    lists, rows = call_of(name)
    wanted, normals = copies(lists), copies(lists)
    rows = rows if name == "moments_" else rows[:-1]
    sweep = prepare(name, lists, *streams(len(SHAPES)))
    sweep(*rows, transform="signs")
    by_name = SWEEPS[name].bind(getattr(operators, name), wanted, *streams(len(SHAPES)))
    by_name(*rows, transform="signs")
    assert_same_lists(lists, wanted)
    by_operator(name, normals, rows)
    assert not torch.equal(lists[0][0], normals[0][0])
    assert name != "normal_" or all(z.abs().eq(1).all() for z in lists[0])


def test_low_rank_without_streams(backend: str) -> None:
    for name in ("lowrank_", "lowrank_momentum_"):
        lists, (coeffs, decay, _) = call_of(name)
        wanted = copies(lists)
        prepare(name, lists, None, None)(coeffs, decay)
        by_operator(name, wanted, (coeffs, decay, None))
        assert_same_lists(lists, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_be_strided(name: str, backend: str) -> None:
    lists, rows = call_of(name)
    wanted = copies(lists)
    strided = [
        torch.stack([row, row], dim=-1)[..., 0] if isinstance(row, Tensor) else row for row in rows
    ]
    prepare(name, lists, *streams(len(SHAPES)))(*strided)
    by_operator(name, wanted, rows)
    assert_same_lists(lists, wanted)


def test_ids_and_offsets_are_those_that_were_given() -> None:
    lists, rows = call_of("dense_")
    wanted = copies(lists)
    ids, offsets = streams(len(SHAPES))
    sweep = prepare("dense_", lists, ids, offsets)
    ids.zero_()
    offsets.zero_()
    sweep(*rows)
    by_operator("dense_", wanted, rows)
    assert_same_lists(lists, wanted)


# ---- tensors that move --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_rebound_tensors(name: str, backend: str) -> None:
    lists, rows = call_of(name)
    sweep = Watched(name, lists, *streams(len(SHAPES)))
    sweep(*rows)
    for tensors in lists[: SWEEPS[name].written]:
        old = tensors[0].data
        tensors[0].data = old.clone()
        wanted, old_bits = copies(lists), old.clone()
        sweep(*rows)
        by_operator(name, wanted, rows)
        assert_same_lists(lists, wanted)
        assert_same_bits(old, old_bits)
    assert sweep.looked == 1 + SWEEPS[name].written


def test_another_dtype_and_shape() -> None:
    p = random(6, 4)
    sweep = prepare("dense_", [[p]], *streams(1))
    rows = rows_of("dense_", 1)
    sweep(*rows)
    p.data = p.data.half()[:, 1:].clone()
    wanted = [[p.clone()]]
    sweep(*rows)
    by_operator("dense_", wanted, rows)
    assert_same_lists([[p]], wanted)
    p.data = p.data.double()
    for _ in range(2):
        with pytest.raises(TypeError, match="float64"):
            sweep(*rows)


@needs_cpu
def test_an_address_that_comes_back(use_backend: Callable[[str], None]) -> None:
    """Freed memory may become that of a smaller tensor at the same address."""
    use_backend("cpu")
    memory = torch.zeros(64)
    p = torch.empty(0)

    def lie(count: int, dtype: torch.dtype) -> None:
        """p gets a storage of its own at the beginning of `memory`."""
        p.data = torch.frombuffer(memory.numpy(), dtype=dtype, count=count)

    lie(64, torch.float32)
    sweep = Watched("dense_", [[p]], *streams(1))
    rows = (torch.tensor(KEYS[:1]), torch.ones(1, 1), torch.ones(1))
    sweep(*rows)
    p.data = torch.empty(0)  # frees the storage
    memory.zero_()
    lie(3, torch.float16)
    address = p.data_ptr()
    assert address == memory.data_ptr()
    sweep(*rows)
    assert sweep.looked == 2
    assert p.all()
    assert not memory.view(torch.float16)[3:].any()


def test_memory_of_moved_tensors_is_freed() -> None:
    p = torch.zeros(5)
    sweep = prepare("dense_", [[p]], *streams(1))
    sweep(*rows_of("dense_", 1))
    freed: list[Any] = []
    watch = weakref.ref(p.untyped_storage(), freed.append)
    p.data = torch.ones(5)
    assert freed == [watch]


def test_factors_are_read_where_they_were(backend: str) -> None:
    lists, rows = call_of("lowrank_")
    wanted = copies(lists)
    sweep = prepare("lowrank_", lists, *streams(len(SHAPES)))
    for i, u in enumerate(lists[1]):
        u.mul_(2)
        wanted[1][i].mul_(2)
        u.data = torch.full_like(u, torch.nan)
    sweep(*rows)
    by_operator("lowrank_", wanted, rows)
    assert_same_lists(lists[:1], wanted[:1])


@pytest.mark.parametrize("name", NAMES)
def test_permuted_tensors(name: str, backend: str) -> None:
    lists, rows = call_of(name, ((5, 7), (4, 6)))
    written = lists[: SWEEPS[name].written]
    if name == "factor_momentum_":
        pytest.skip("moments are contiguous")
    if name == "lowrank_momentum_":
        written = written[:1]
    for tensors in written:
        tensors[1] = tensors[1].t().contiguous().t()
        assert not tensors[1].is_contiguous()
    wanted = copies(lists)
    sweep = Watched(name, lists, *streams(2))
    for _ in range(2):
        sweep(*rows)
        by_operator(name, wanted, rows)
        assert_same_lists([[t.contiguous() for t in ts] for ts in lists], wanted)
    assert sweep.looked == 1


def test_parameters_that_require_gradients(backend: str) -> None:
    lists, rows = call_of("dense_")
    wanted = copies(lists)
    params = [torch.nn.Parameter(p) for p in lists[0]]
    prepare("dense_", [params], *streams(len(SHAPES)))(*rows)
    by_operator("dense_", wanted, rows)
    assert_same_lists([[p.detach() for p in params]], wanted)
    assert all(p.requires_grad and p.is_leaf for p in params)


# ---- backends -----------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("name", NAMES)
def test_another_backend_between_calls(name: str, use_backend: Callable[[str], None]) -> None:
    lists, rows = call_of(name)
    wanted = copies(lists)
    sweep = Watched(name, lists, *streams(len(SHAPES)))
    for number, other in enumerate(("cpu", "reference", "reference", "cpu")):
        use_backend(other)
        sweep(*rows)
        assert sweep.made == (1, 2, 2, 3)[number]
        by_operator(name, wanted, rows)
        assert_same_lists(lists, wanted)


def test_a_backend_that_cannot_serve(use_backend: Callable[[str], None]) -> None:
    p = random(5)
    sweep, rows, before = prepare("dense_", [[p]], *streams(1)), rows_of("dense_", 1), p.clone()
    use_backend("cuda")
    with pytest.raises(RuntimeError, match="cuda"):
        sweep(*rows)
    assert_same_bits(p, before)
    use_backend("reference")
    sweep(*rows)
    assert not torch.equal(p, before)


def test_transform_that_the_backend_lacks(use_backend: Callable[[str], None]) -> None:
    use_backend("reference")
    for name in ("normal_", "dense_", "dense_steps_", "moments_"):
        lists, rows = call_of(name)
        before = copies(lists)
        sweep = prepare(name, lists, *streams(len(SHAPES)))
        if rows[-1] == "portable":
            rows = rows[:-1]
        for transform, message in (("fast", 'use transform="portable"'), ("quick", "choose one")):
            with pytest.raises(ValueError, match=message):
                sweep(*rows, transform=transform)
        assert_same_lists(lists, before)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bad_rows_are_refused_before_anything_is_written(name: str, backend: str) -> None:
    lists, rows = call_of(name)
    before = copies(lists)
    sweep = prepare(name, lists, *streams(len(SHAPES)))
    for i, row in enumerate(rows):
        if isinstance(row, Tensor):
            for bad in (row[:-1], row[None], row.double(), row.to("meta")):
                with pytest.raises((TypeError, ValueError)):
                    sweep(*rows[:i], bad, *rows[i + 1 :])
    with pytest.raises(TypeError):
        sweep()
    with pytest.raises(TypeError):
        sweep(*rows, "portable", "portable", "portable")
    assert_same_lists(lists, before)


def test_rules() -> None:
    (params, firsts, seconds), (*rows, _, rounding) = call_of("moments_")
    ids = streams(len(params))
    for lists, rule, message in (
        ([params, firsts, seconds], "sgd", "rule='sgd'"),
        ([params, firsts, seconds], "sign", "no second moments"),
        ([params, [], seconds], "adam", "firsts"),
        ([params, firsts, []], "adam", "seconds"),
    ):
        before = copies(lists)
        with pytest.raises(ValueError, match=message):
            prepare("moments_", lists, *ids)(*rows, rule, rounding)
        assert_same_lists(lists, before)


def test_bad_lists_are_refused() -> None:
    ids, offsets = streams(2)
    p = [random(3, 4), random(5)]
    with pytest.raises(ValueError, match="no sweep over 1 lists"):
        prepare("lowrank_", [p], ids, offsets)
    with pytest.raises(ValueError, match="no sweep"):
        prepare("sparse_", [p], ids, offsets)
    with pytest.raises(ValueError, match="ids and offsets are needed"):
        prepare("dense_", [p], None, None)
    with pytest.raises(ValueError, match="offsets"):
        prepare("dense_", [p], ids, offsets[:1])
    with pytest.raises(TypeError, match="int64"):
        prepare("normal_", [[ids]], ids[:1], offsets[:1])
    with pytest.raises(ValueError, match=r"us\[0\]"):
        prepare("lowrank_", [p, [random(4, 2)] * 2, [random(4, 2)] * 2], ids, offsets)


def test_rounding_needs_streams(backend: str) -> None:
    for name in ("lowrank_", "lowrank_momentum_"):
        lists, rows = call_of(name)
        with pytest.raises(ValueError, match="needs ids and offsets"):
            prepare(name, lists, None, None)(*rows)


# ---- cost ---------------------------------------------------------------------------------------


def python_events(call: Callable[[], None]) -> int:
    """Calls and returns that the interpreter sees."""
    events = 0

    def count(*_: Any) -> None:
        nonlocal events
        events += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return events


@needs_cpu
@pytest.mark.parametrize("name", NAMES)
def test_python_does_not_depend_on_the_number_of_parameters(
    name: str, use_backend: Callable[[str], None]
) -> None:
    use_backend("cpu")
    events = []
    for count in (5, 300):
        lists, rows = call_of(name, ((1,), (2, 1), (1, 3), (), (2, 2)) * (count // 5))
        sweep = prepare(name, lists, *streams(count))
        sweep(*rows)
        events.append(python_events(lambda: sweep(*rows)))  # noqa: B023
    assert events[0] == events[1] < 200


def test_launches_of_gpu_backends_are_kept(
    use_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    if dispatch.why_not("triton", "cpu") is not None:
        pytest.skip("Triton's interpreter is off")
    from zo_fused.sweeps.backends import multi_tensor

    use_backend("triton")
    for name in NAMES:
        lists, rows = call_of(name, ((3, 4), (5,)))
        sweep = prepare(name, lists, *streams(2))
        sweep(*rows)
        monkeypatch.setattr(multi_tensor, "_launches", None)
        sweep(*rows)
        monkeypatch.undo()
