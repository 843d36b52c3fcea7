"""Steps that processes take together: the same weights everywhere, and errors everywhere."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import parallel_runs as runs
from support.methods import CASES
from support.models import network, same, snapshot
from support.ranks import together
from torch import Tensor

import zo_fused
from zo_fused.parallel.agreement import checksum


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, runs.of_two, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(4, runs.of_four, tmp_path_factory.mktemp("four"))


def of(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    return [rank[name] for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_equal_and_take_the_step_of_the_global_batch(
    name: str, two: list[dict[str, Any]]
) -> None:
    """Every row's output is rounded in products of other sizes, 2**-24 of its size each. The
    difference of two losses, over 2 eps = 2e-3, has that 1000 times, which lr takes down again."""
    check_ranks(name, two)


def check_ranks(name: str, ranks: list[dict[str, Any]]) -> None:
    first, *others = (methods[name] for methods in of(ranks, "methods"))
    for weights in others:
        assert same(first, weights)
    alone, start = runs.weights_of(name, 0, 1), snapshot(network())
    moved = distance(alone, start)
    assert moved > 0
    assert distance(first, alone) <= 2e-3 * moved + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.SOME)
def test_so_do_four(name: str, four: list[dict[str, Any]]) -> None:
    check_ranks(name, four)


@pytest.mark.slow
def test_with_losses_that_add_up_exactly_two_ranks_give_the_bits_of_one(
    two: list[dict[str, Any]],
) -> None:
    for weights in of(two, "exactly"):
        assert same(weights, runs.exactly(0, 1))


@pytest.mark.slow
def test_and_so_do_four(four: list[dict[str, Any]]) -> None:
    for weights in of(four, "exactly"):
        assert same(weights, runs.exactly(0, 1))


# ---- query parallel -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_query(two: list[dict[str, Any]]) -> tuple[Any, Any]:
    """Of two ranks and of one process, bfloat16, 200 steps, with dropout."""
    return of(two, "queries"), runs.by_query(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", runs.BY_QUERY)
def test_ranks_that_share_the_queries_have_the_bits_of_one_process(
    name: str, by_query: tuple[Any, Any]
) -> None:
    ranks, alone = by_query
    weights, calls = alone[name]
    for theirs, _ in (rank[name] for rank in ranks):
        assert same(theirs, weights)
    assert distance(weights, snapshot(network(torch.bfloat16))) > 1e-2  # a run that moves
    if name == "ZOConservative":  # its candidates follow each other
        return
    assert sum(theirs for _, theirs in (rank[name] for rank in ranks)) <= calls * 1.02
    assert max(theirs for _, theirs in (rank[name] for rank in ranks)) <= calls * 0.67


@pytest.mark.slow
def test_both_kinds_over_a_mesh_are_data_parallel_with_less_work(
    two: list[dict[str, Any]], four: list[dict[str, Any]]
) -> None:
    for weights in [*of(two, "data"), *of(four, "both")]:
        assert same(weights, two[0]["data"])


@pytest.mark.slow
def test_over_a_mesh_all_join_by_one_log(four: list[dict[str, Any]]) -> None:
    for (steps, weights), (more, end) in of(four, "joined"):
        assert (steps, more) == ([0, 3], [3, 6])
        for mine, others in zip((weights, end), of(four, "joined")[0], strict=True):
            assert same(mine, others[1])


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.slow
def test_an_error_of_one_rank_is_one_of_all(two: list[dict[str, Any]]) -> None:
    """And the run goes on, if they catch it, with the same weights."""
    (said, *_), (own, *_) = of(two, "raises")
    assert own == "MemoryError: no room"
    assert said.startswith("RuntimeError: step 1: rank 1 failed")
    for _, off, _, again, _ in of(two, "raises"):
        assert off < 1e-6  # at theta, up to rounding
        assert again == "nothing"
    (*_, steps, _, weights), (*_, others_steps, _, others) = of(two, "raises")
    assert steps == others_steps == 2  # the failed one does not count
    assert same(weights, others)


@pytest.mark.slow
def test_on_gpus_the_step_is_skipped_and_the_next_one_is_the_error(
    two: list[dict[str, Any]],
) -> None:
    (said, before, after), (own, *_, others) = of(two, "raises on GPUs")
    assert said[:3] == ["nothing"] * 3
    assert said[3].startswith("RuntimeError: step 2: rank 1 failed")
    assert own == ["nothing", "nothing", "MemoryError: no room"]
    assert same(before, after)
    assert distance(before, others) < 1e-6  # it has put its own back, and taken no step


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    two: list[dict[str, Any]],
) -> None:
    (skipped, steps, one), (others_skipped, others_steps, other) = of(two, "not a number")
    assert skipped == others_skipped == 1
    assert steps == others_steps == 2
    assert same(one, other)


@pytest.mark.slow
def test_a_weight_that_is_none_on_one_rank_is_an_error_of_all(two: list[dict[str, Any]]) -> None:
    (said, steps, one), (own, others_steps, other) = of(two, "bad weight")
    assert said.startswith("RuntimeError: step 1: rank 1 failed")
    assert own == "ValueError: weight must be a finite number >= 0, got -1"
    assert steps == others_steps == 2  # the failed one does not count
    assert same(one, other)


@pytest.mark.slow
def test_a_rank_without_examples_counts_for_nothing(two: list[dict[str, Any]]) -> None:
    (skipped, one), (_, other) = of(two, "no examples")
    assert skipped == 0
    assert same(one, other)
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2)
    opt.step(runs.loss_on(model, runs.INPUT))
    assert same(one, snapshot(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("drift", "RuntimeError: the ranks have other weights: 4 of 4 parameters differ"),
        ("drift later", "RuntimeError: the ranks have other weights: 1 of 4 .* '2.bias'"),
        ("flushes alone", "RuntimeError: .* one of them has put its weights at theta alone"),
        ("other steps", "RuntimeError: .* differ in their step|not at the same step"),
        ("seeds", "RuntimeError: the ranks differ in their seed"),
        ("options", "RuntimeError: the ranks differ in their options"),
        ("lr", "RuntimeError: the ranks differ in their hyper-parameters"),
        ("hybrid", "RuntimeError: Hybrid does not average"),
        ("members by query", "RuntimeError: members.*closure"),
    ],
)
def test_what_would_drift_apart_is_an_error_of_all(
    name: str, said: str, two: list[dict[str, Any]]
) -> None:
    for message in of(two, name):
        assert re.search(said, message), message


@pytest.mark.slow
def test_rewards_losses_and_estimates_from_outside_are_means_too(
    two: list[dict[str, Any]],
) -> None:
    for members, closure in of(two, "members"):
        assert same(members, closure)
    assert same(of(two, "members")[0][0], of(two, "members")[1][0])
    for given, estimated in of(two, "given"):
        torch.testing.assert_close(given, estimated, rtol=1e-3, atol=1e-6)
    assert torch.equal(of(two, "given")[0][1], of(two, "given")[1][1])


@pytest.mark.slow
def test_a_rank_that_is_gone_is_an_error_within_its_time(tmp_path: Path) -> None:
    [seen] = together(2, runs.left_alone, tmp_path, dies=1)
    assert seen["hangs"][1] > 1.9  # the timeout is 2 seconds
    for said, took, off in seen.values():
        assert said.startswith("RuntimeError: another rank did not take part in this step")
        assert took < 4
        assert off < 1e-6


# ---- the checksum of weights --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7,), (5, 9), (3, 4, 5)])
def test_a_checksum_sees_every_bit_and_nothing_but_the_numbers(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    numbers = torch.randn(shape).to(dtype)
    found = int(checksum(numbers))
    shifted = torch.empty(numbers.numel() + 1, dtype=dtype)[1:].view(shape).copy_(numbers)
    apart = torch.empty(*shape, 2, dtype=dtype)[..., 0].copy_(numbers)
    for same_numbers in (shifted, apart):
        assert int(checksum(same_numbers)) == found
    bits = numbers.clone().reshape(-1).view(torch.uint8)
    for byte in range(len(bits)):
        bits[byte] ^= 1
        assert int(checksum(bits.view(dtype))) != found
        bits[byte] ^= 1


# ---- alone --------------------------------------------------------------------------------------


def test_a_weight_is_without_effect_alone_and_still_checked() -> None:
    models = [network(), network()]
    for model, weight in zip(models, (1.0, 7), strict=True):
        zo_fused.MeZO(model, lr=1e-2).step(runs.loss_on(model, runs.INPUT), weight=weight)
    assert same(*models)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight must be a finite number >= 0"):
            zo_fused.MeZO(models[0]).step(lambda: 1.0, weight=wrong)
    with pytest.raises(TypeError, match="weight must be a number"):
        zo_fused.MeZO(models[0]).step(lambda: 1.0, weight="3")


@pytest.mark.parametrize(
    ("option", "error", "said"),
    [
        ("all", TypeError, "parallel must be"),
        (True, TypeError, "parallel must be"),
        ({"data": object()}, TypeError, "data must be a DeviceMesh or a process group"),
        ({"query": 2}, TypeError, "query must be a DeviceMesh or a process group"),
        ({"check_every": 0}, ValueError, "check_every"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"timeout": float("inf")}, ValueError, "timeout"),
    ],
)
def test_what_is_no_option_is_refused(option: Any, error: type[Exception], said: str) -> None:
    def make() -> None:
        option_ = zo_fused.Parallel(**option) if isinstance(option, dict) else option
        zo_fused.MeZO(network(), parallel=option_)

    with pytest.raises(error, match=said):
        make()


def test_the_option_is_no_business_of_logs_and_copies_keep_it(tmp_path: Path) -> None:
    model = network()
    opt = zo_fused.MeZO(model, parallel=zo_fused.Parallel(check_every=7))
    opt.start_log(tmp_path / "log")
    opt.step(runs.loss_on(model, runs.INPUT))
    assert "parallel" not in (tmp_path / "log").read_text()
    assert "check_every" not in str(opt.state_dict())
    opt.close_log()
    assert copy.deepcopy((model, opt))[1].ranks.option == zo_fused.Parallel(check_every=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [7, 40, 5000])  # with and without rows of a thousand words
def test_a_checksum_sees_numbers_that_changed_places(dtype: torch.dtype, count: int) -> None:
    numbers, rng = torch.randn(count).to(dtype), random.Random(count)
    found = int(checksum(numbers))
    for _ in range(100):
        i, j = rng.sample(range(count), 2)
        other = numbers.clone()
        other[[i, j]] = numbers[[j, i]]
        assert torch.equal(other, numbers) or int(checksum(other)) != found
    for other in (numbers.flip(0), numbers.roll(1), numbers.roll(4)):
        assert int(checksum(other)) != found
