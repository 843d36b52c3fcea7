"""A part of a parameter is swept to the bits that the whole has there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.equality import same_bits
from torch import Tensor

import zo_fused
from zo_fused import Shard, noise
from zo_fused.sweeps.shards import Run, is_sharded

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KEYS = [noise.derive_key(0, noise.Purpose.DENSE, step) for step in range(2)]
U, V = (noise.derive_key(0, purpose) for purpose in (noise.Purpose.U, noise.Purpose.V))
ROUNDING = noise.derive_key(0, noise.Purpose.ROUNDING)
ID = 2**63 + 5


pytestmark = pytest.mark.usefixtures("backend")
# Parts are rows of a table, made before any backend is asked: Triton's interpreter, which takes
# minutes for drawn ones, has them in `test_parity.py` and in the tests below.
drawn = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """A shape, and a box in it: cut along any dimensions, uneven, or empty."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    box = []
    for size in shape:
        low = draw(st.integers(0, size))
        high = draw(st.one_of(st.just(size), st.integers(low, size)))
        box.append(draw(st.sampled_from([slice(0, size), slice(low, high)])))
    return shape, tuple(box)


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(0.02).to(dtype)


def part_of(tensor: Tensor, box: tuple[slice, ...]) -> Tensor:
    return tensor[box].clone()


def shard_at(shape: tuple[int, ...], box: tuple[slice, ...]) -> Shard:
    return Shard(shape, tuple(some.start for some in box))


Case = tuple[tuple[int, ...], tuple[slice, ...]]
Call = Callable[..., None]


def dense(params: list[Tensor], shards: object, rounding: int | None, state: list[Tensor]) -> None:
    keywords = {"ids": [ID], "shards": shards}
    zo_fused.perturb_(params, KEYS[0], 0.5, transform="hadamard", **keywords)  # type: ignore[arg-type]
    zo_fused.update_(params, KEYS, [0.1, -0.2], [0.99], rounding_key=rounding, **keywords)  # type: ignore[arg-type]


def adam(params: list[Tensor], shards: object, rounding: int | None, state: list[Tensor]) -> None:
    zo_fused.moments_update_(
        params, KEYS, [0.3, 0.1], "adam", -0.01, firsts=state[:1], seconds=state[1:], beta=0.9,
        gain=0.1, beta2=0.9, gain2=0.1, eps=1e-3, restores=0.25, decay=0.99, ids=[ID],
        shards=shards, rounding_key=rounding,  # type: ignore[arg-type]
    )  # fmt: skip


@drawn
@given(
    case=boxes(),
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from([None, ROUNDING]),
    call=st.sampled_from([dense, adam]),
)
def test_part_has_the_bits_of_the_whole(
    case: Case, dtype: torch.dtype, rounding: int | None, call: Call
) -> None:
    shape, box = case
    whole = weights(shape, dtype)
    state = [weights(shape, torch.float32, seed).abs() for seed in (1, 2)]
    part, part_state = part_of(whole, box), [part_of(m, box) for m in state]
    call([part], [shard_at(shape, box)], rounding, part_state)
    call([whole], None, rounding, state)
    for mine, full in zip([part, *part_state], [whole, *state], strict=True):
        assert same_bits(mine, part_of(full, box))


@drawn
@given(
    case=boxes(),
    dtype=st.sampled_from(DTYPES),
    rounding=st.sampled_from([None, ROUNDING]),
    rank=st.integers(1, 3),
)
def test_low_rank_of_a_part(
    case: Case, dtype: torch.dtype, rounding: int | None, rank: int
) -> None:
    shape, box = case
    whole = weights(shape, dtype)
    part, shard = part_of(whole, box), shard_at(shape, box)
    rows = shape[0] if shape else 1
    moment = weights((rows, rank), torch.float32, seed=3)
    mine = (moment[box[0]] if box else moment).clone()
    for p, n, shards in ((whole, moment, None), (part, mine, [shard])):
        keywords = {"rank": rank, "ids": [ID], "shards": shards}
        zo_fused.lowrank_perturb_([p], U, V, 0.5, **keywords)  # type: ignore[arg-type]
        keywords["rounding_key"] = rounding
        zo_fused.lowrank_update_([p], U, V, -0.1, 0.99, **keywords)  # type: ignore[arg-type]
        zo_fused.lowrank_momentum_([p], [n], U, V, 0.7, 0.1, 0.9, 0.5, 0.99, **keywords)  # type: ignore[arg-type]
    assert same_bits(part, part_of(whole, box))
    if part.numel():
        assert same_bits(mine, moment[box[0]] if box else moment)


def test_rows_of_a_call_belong_to_their_parameters() -> None:
    """Shards of many runs, whole tensors and empty shards in one call, each with numbers of its
    own."""
    shapes = [(4, 6), (5,), (3, 4)]
    wholes = [weights(shape, torch.float32, i) for i, shape in enumerate(shapes)]
    parts = [wholes[0][:, 2:5].clone(), wholes[1].clone(), wholes[2][:, 4:].clone()]
    shards = [Shard((4, 6), (0, 2)), None, Shard((3, 4), (0, 4))]
    coeffs = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    decay = [0.9, 0.8, 0.7]
    zo_fused.update_(wholes, KEYS, coeffs, decay)
    zo_fused.update_(parts, KEYS, coeffs, decay, shards=shards)
    assert same_bits(parts[0], wholes[0][:, 2:5].contiguous())
    assert same_bits(parts[1], wholes[1])


def test_noise_of_two_shards_of_one_parameter_in_one_call() -> None:
    whole, parts = torch.zeros(6, 4), [torch.zeros(6, 2), torch.zeros(6, 2)]
    zo_fused.perturb_([whole], KEYS[0], 1.0, ids=[ID])
    shards = [Shard((6, 4), (0, 0)), Shard((6, 4), (0, 2))]
    zo_fused.perturb_(parts, KEYS[0], 1.0, ids=[ID, ID], shards=shards)
    assert same_bits(whole, torch.cat(parts, dim=1))


@given(case=boxes())
def test_runs_are_the_indices_of_the_elements(case: Case) -> None:
    shape, box = case
    part = torch.arange(prod(shape)).view(shape)[box]
    runs = shard_at(shape, box).runs(part.shape)
    assert [e for run in runs for e in range(run.start, run.start + run.length)] == (
        part.flatten().tolist()
    )
    assert [run.local for run in runs] == [
        sum(r.length for r in runs[:i]) for i in range(len(runs))
    ]
    # none could be longer: the next one starts elsewhere
    assert all(a.start + a.length != b.start for a, b in pairwise(runs))


def test_a_shard_cut_along_its_first_dimension_is_one_run() -> None:
    assert Shard((10, 4, 3), (6, 0, 0)).runs((3, 4, 3)) == [Run(0, 72, 36)]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([Shard((4, 6), (0, 4))], "no part of"),
        ([Shard((24,), (0,))], "no part of"),
        ([], "1 parameters but 0 shards"),
        ([((4, 6), (0, 0))], "must be a zo_fused.Shard"),
    ],
)
def test_wrong_shards_are_refused(shards: list[Shard], message: str) -> None:
    p = weights((4, 3), torch.float32)
    before = p.clone()
    with pytest.raises((TypeError, ValueError), match=message):
        zo_fused.perturb_([p], KEYS[0], 1.0, shards=shards)
    assert same_bits(p, before)


def test_shards_and_offsets_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        zo_fused.perturb_([torch.zeros(2)], 1, 1.0, offsets=[0], shards=[Shard((2,), (0,))])


def test_a_shard_with_gaps_is_refused() -> None:
    whole = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="must be contiguous"):
        zo_fused.perturb_([whole[:, 2:4]], 1, 1.0, shards=[Shard((4, 6), (0, 2))])


@pytest.mark.parametrize("starts", [(0,), (-1, 0), (0.5, 0)])
def test_starts_are_whole_numbers_one_a_dimension(starts: tuple[int, ...]) -> None:
    with pytest.raises((TypeError, ValueError)):
        Shard((4, 6), starts)


def test_a_plain_tensor_is_no_dtensor() -> None:
    assert not is_sharded(torch.zeros(2))
    assert not is_sharded(None)
