"""Steps of more than one estimate: several queries, blocks of parameters, candidates, histories.

What they compute is held against float64 textbooks in `test_textbook.py`; here is what they cost,
what they keep, and that nothing is lost.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.logs import records_of
from support.matrix import covering
from support.methods import CASES, Case, those
from support.models import blocks, loss_of, network, same
from torch import Tensor, nn

import zo_fused
from zo_fused import noise
from zo_fused.noise import Purpose, derive_key, parameter_id
from zo_fused.step.schedule import Position, Schedule, pairs

Make = Callable[..., Any]


# ---- the plan of a step --------------------------------------------------------------------------


def cost(positions: list[Position], deferred: bool) -> int:
    """Sweeps of a step, counting the one that ends it; from its start, the weights at +eps."""
    at = Position(1.0) if deferred else Position(0.0)
    moves = 0
    for position in positions:
        moves += position != at and (position.sign, at.sign) != (0.0, 0.0)
        at = position
    return moves + 1


@given(st.integers(1, 8), st.booleans(), st.booleans())
def test_sweeps_of_queries(queries: int, one_sided: bool, deferred: bool) -> None:
    schedule = Schedule(deferred, one_sided, queries)
    positions = schedule.positions(schedule.count([0]))
    assert len(set(positions)) == len(positions) == (queries + 1 if one_sided else 2 * queries)
    least = queries + 1 if one_sided else 2 * queries + (not deferred)
    assert cost(positions, deferred) == least
    sides = pairs({position: position for position in positions})
    assert [plus.query for plus, _, _ in sides] == list(range(queries))
    for plus, minus, apart in sides:
        assert minus == (Position(0.0) if one_sided else plus._replace(sign=-1.0))
        assert apart == plus.sign - minus.sign


@pytest.mark.parametrize(
    ("name", "sweeps_of_a_step", "losses"),
    [
        ("MeZO, queries", 7, 6),
        ("MeZO, queries, deferred", 6, 6),
        ("MeZO, queries, one-sided", 4, 4),
        ("MeZO, queries, one-sided, deferred", 4, 4),
        ("LOZO, queries", 7, 6),
        ("LOZO, queries, deferred", 6, 6),
        ("MeZO-M, queries", 7, 6),
        ("MeZO, in turn", 3, 2),
        # of a block: to and fro, back for the first one, and the update
        ("MeZO, at once", 3 + 2 + 2, 4),
        ("ZOAdam, history", 3, 2),
        ("ZOAdam, history, deferred", 2, 2),
    ],
)
def test_sweeps_are_counted(
    name: str, sweeps_of_a_step: int, losses: int, sweeps: list[str]
) -> None:
    model = network()
    opt = CASES[name](model)
    calls = []
    loss = loss_of(model)
    opt.step(loss)
    opt.step(loss)
    sweeps.clear()
    opt.step(lambda: calls.append(1) or loss())
    assert (len(sweeps), len(calls)) == (sweeps_of_a_step, losses)


def test_a_conservative_step_costs_at_most_six_sweeps_and_five_losses(sweeps: list[str]) -> None:
    model = network()
    opt = zo_fused.ZOConservative(model, lr=1e-2)
    seen: set[int] = set()
    seen_losses: list[int] = []
    for _ in range(12):
        sweeps.clear()
        evaluated = len(seen_losses)
        opt.step(lambda: seen_losses.append(1) or loss_of(model)())
        assert len(seen_losses) == evaluated + 5
        seen.add(len(sweeps))
    assert seen <= {5, 6}


@those(lambda case: case.options.get("block_order") == "sequential")
def test_one_block_moves_at_a_time(make: Case) -> None:
    model = network()
    opt = make(model, lr=1e-2)
    for step in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        opt.step(loss_of(model))
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert moved == (
            [True, True, False, False] if step % 2 == 0 else [False, False, True, True]
        )


def test_blocks_are_evaluated_at_the_same_weights() -> None:
    """Simultaneously: each loss sees one block displaced, by its own noise."""
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    seen: list[list[Tensor]] = []
    opt = zo_fused.MeZO(blocks(model), eps=1e-2, seed=4, block_order="simultaneous")

    def closure() -> Tensor:
        seen.append([p.detach() - q for p, q in zip(model.parameters(), start, strict=True)])
        return loss_of(model)()

    opt.step(closure)
    names = [name for name, _ in model.named_parameters()]
    for number, moved in enumerate(seen):
        block, sign = divmod(number, 2)
        for i, (name, delta) in enumerate(zip(names, moved, strict=True)):
            z = torch.zeros_like(delta)
            if i // 2 == block:
                key = derive_key(4, Purpose.DENSE, 0)
                z = noise.normal(delta.numel(), key, parameter_id(name)).view(delta.shape)
            expected = 1e-2 * (1 - 2 * sign) * z
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-7)


# ---- statistics ----------------------------------------------------------------------------------


def variance(make_opt: Callable[[nn.Parameter], Any], steps: int = 3000) -> float:
    """Mean squared error of the estimate of a linear loss's gradient, a step."""
    torch.manual_seed(1)
    d = 24
    w, slope = nn.Parameter(torch.zeros(d)), torch.randn(d).double()
    opt = make_opt(w)
    total = 0.0
    for _ in range(steps):
        before = w.detach().clone()
        opt.step(lambda: (slope * w.double()).sum())
        estimate = (before - w.detach()).double()  # lr = 1
        total += float((estimate - slope).square().sum()) / float(slope.square().sum())
    return total / steps


def test_queries_divide_the_variance() -> None:
    """For Gaussian directions and a linear loss the error is (d + 1) |gradient|^2 / q; for
    Rademacher ones (d - 1) |gradient|^2. Means of 3000 steps: 4 % is four deviations."""
    one = variance(lambda w: zo_fused.MeZO([w], lr=1.0, eps=1e-2))
    three = variance(lambda w: zo_fused.MeZO([w], lr=1.0, eps=1e-2, queries=3))
    signs = variance(lambda w: zo_fused.MeZO([w], lr=1.0, eps=1e-2, distribution="rademacher"))
    assert abs(one / 25 - 1) < 0.12
    assert abs(three / (25 / 3) - 1) < 0.08
    assert abs(signs / 23 - 1) < 0.12


@pytest.mark.slow
def test_blocks_at_once_have_less_variance() -> None:
    """Two blocks of 12 of 24: (12 + 1) |gradient|^2 instead of (24 + 1)."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(12))

    torch.manual_seed(1)
    slopes = torch.randn(2, 12).double()

    def error(**kw: Any) -> float:
        model, total = Halves(), 0.0
        named = list(model.named_parameters())
        groups = [{"params": [x], "block": i} for i, x in enumerate(named)]
        opt = zo_fused.MeZO(groups, lr=1.0, eps=1e-2, **kw)
        for _ in range(3000):
            before = torch.stack([model.a, model.b]).detach().double()
            opt.step(lambda: (slopes[0] * model.a).sum() + (slopes[1] * model.b).sum())
            after = torch.stack([model.a, model.b]).detach().double()
            total += float((before - after - slopes).square().sum()) / float(slopes.square().sum())
        return total / 3000

    assert abs(error() / 25 - 1) < 0.12
    assert abs(error(block_order="simultaneous") / 13 - 1) < 0.12


# ---- nothing is lost -----------------------------------------------------------------------------


@covering(make=CASES.values(), dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_replay_is_bit_exact(make: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also of skipped steps, closures that raise and changing learning rates."""
    model = network(dtype)
    base = copy.deepcopy(model)
    opt = make(model)
    opt.start_log(tmp_path / "log.jsonl")
    loss = loss_of(model)
    for step in range(9):
        opt.param_groups[0]["lr"] = 1e-2 * 0.9**step
        if step == 2:
            one_loss = make.has("paired") or make.optimizer is zo_fused.ForwardGrad
            losses = iter([] if one_loss else [1.0])
            with pytest.raises(StopIteration):  # in the middle of the step
                opt.step(losses.__next__)
        opt.step((lambda: loss() * math.nan) if step == 3 else loss)
        model[0].bias.requires_grad_(step % 3 != 1)
    opt.flush()
    assert opt.skipped_steps == 1
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(model, base)


def test_log_has_every_gradient_and_no_usual_path(tmp_path: Path) -> None:
    model = network()
    opt = zo_fused.MeZO(model, queries=3)
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(model))
    _, (step, grads) = records_of(tmp_path / "log.jsonl")
    assert step == 0
    assert torch.equal(torch.tensor(grads), opt.projected_grad)
    assert opt.projected_grad.shape == (3,)


def test_split_steps_of_several_queries_equal_closures() -> None:
    one, two = network(), network()
    a, b = (zo_fused.MeZO(m, lr=1e-2, queries=2) for m in (one, two))
    for _ in range(3):
        a.step(loss_of(one))
        plus, minus = [], []
        for query in range(2):
            b.perturb(+1, query)
            plus.append(loss_of(two)())
            b.perturb(-1, query)
            minus.append(loss_of(two)())
        b.step(loss_plus=plus, loss_minus=torch.stack(minus))
        assert torch.equal(a.projected_grad, b.projected_grad)
    assert same(one, two)


# ---- state ---------------------------------------------------------------------------------------


def state_bytes(opt: Any) -> int:
    tensors = [x for s in opt.state.values() for x in s.values() if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def test_state_memory() -> None:
    model = network(torch.float16)
    weights = sum(p.numel() for p in model.parameters())
    vectors = len(list(model.parameters()))
    expected = {
        "MeZO, queries": 0,
        "MeZO, rademacher": 0,
        "LOZO, queries": 0,
        "MeZO, in turn": 0,
        "MeZO, at once": 0,
        "ZOConservative": 0,
        "ZOSignSGD, queries": 0,
        "MeZO-M, queries": 4 * weights,
        "ZOAdam, queries": 8 * weights + 8 * vectors,
        "ZOAdam, history": (4 * 8 + 8) * vectors,
    }
    for name, size in expected.items():
        model = network(torch.float16)
        opt = CASES[name](model, lr=1e-3)
        for _ in range(2):
            opt.step(loss_of(model))
        assert state_bytes(opt) == size, name


# ---- any number will do --------------------------------------------------------------------------


def test_micro_batches_in_the_closure_are_one_large_batch() -> None:
    """Losses are numbers: parts of a batch add up, with the memory of one part. The sums differ in
    rounding alone: float32 means of 24 values, 24 * 2**-24 relative, over 2 eps = 2e-2."""
    one, two = network(), network()
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
    a, b = (zo_fused.MeZO(m, lr=1e-3, eps=1e-2, queries=2) for m in (one, two))
    for _ in range(5):
        a.step(lambda: one(x).square().mean())
        b.step(lambda: sum(two(part).square().mean() for part in x.chunk(4)) / 4)
        torch.testing.assert_close(a.projected_grad, b.projected_grad, rtol=0, atol=2e-4)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        lambda m: zo_fused.MeZO(m, lr=3e-3, eps=0.3, queries=4),
        lambda m: zo_fused.LOZO(m, lr=3e-3, eps=0.2, queries=4),
        lambda m: zo_fused.ZOConservative(m, lr=0.3, eps=0.3),  # candidates must differ
    ],
)
def test_an_objective_without_a_derivative(method: Make) -> None:
    """Minus the accuracy of a classifier: piecewise constant, so eps must be wide enough."""
    torch.manual_seed(2)
    x = torch.randn(400, 5)
    labels = (x @ torch.randn(5, 3)).argmax(1)
    model = nn.Linear(5, 3)

    def accuracy() -> float:
        return float((model(x).argmax(1) == labels).float().mean())

    before = accuracy()
    opt = method(model)
    for _ in range(400):
        opt.step(lambda: -accuracy())
    opt.flush()
    assert accuracy() > before + 0.25


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_opt", "message"),
    [
        (lambda m: zo_fused.MeZO(m, queries=0), "queries"),
        (lambda m: zo_fused.MeZO(m, queries=1.5), "queries"),
        (lambda m: zo_fused.MeZO(m, distribution="cauchy"), "distribution"),
        (lambda m: zo_fused.MeZO(m, block_order="random"), "block_order"),
        (lambda m: zo_fused.MeZO(m, block_order="sequential", deferred=True), "deferred"),
        (lambda m: zo_fused.LOZO(m, block_order="sequential", mode="factored"), "inplace"),
        (lambda m: zo_fused.LOZO(m, block_order="sequential", momentum=0.9), "momentum"),
        (lambda m: zo_fused.ZOAdam(m, history=0), "history"),
        (lambda m: zo_fused.ZOAdam(m, history=5, queries=2), "one query"),
        (lambda m: zo_fused.ZOConservative(m, block_order="simultaneous"), "sequential"),
        (lambda m: zo_fused.MeZO([{"params": m.parameters(), "block": "a"}]), "block"),
    ],
)
def test_bad_arguments_are_refused(make_opt: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_opt(network())


def test_conservative_has_no_weight_decay() -> None:
    model = network()
    with pytest.raises(ValueError, match="weight_decay, but ZOConservative has none"):
        zo_fused.ZOConservative([{"params": list(model.parameters()), "weight_decay": 0.1}])


def test_losses_must_be_as_many_as_queries() -> None:
    model = network()
    opt = zo_fused.MeZO(model, queries=2)
    start = copy.deepcopy(model)
    opt.perturb(+1)
    with pytest.raises(ValueError, match="of 2 queries each, got 1"):
        opt.step(loss_plus=1.0, loss_minus=2.0)
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    at_once = zo_fused.MeZO(blocks(model), block_order="simultaneous")
    with pytest.raises(ValueError, match="queries each, got 1"):
        at_once.step(loss_plus=1.0, loss_minus=2.0)


@pytest.mark.parametrize("queries", [1, 2])
def test_blocks_have_queries_of_their_own_in_loops_by_hand(queries: int) -> None:
    one, two = network(), network()
    kw = {"block_order": "simultaneous", "queries": queries, "lr": 1e-2}
    by_closure, by_hand = zo_fused.MeZO(blocks(one), **kw), zo_fused.MeZO(blocks(two), **kw)
    for _ in range(3):
        by_closure.step(loss_of(one))
        plus, minus = [], []
        for query in range(len(by_closure.projected_grad)):
            for sign, losses in ((1.0, plus), (-1.0, minus)):
                by_hand.perturb(sign, query)
                with torch.no_grad():
                    losses.append(loss_of(two)())
        by_hand.step(loss_plus=plus, loss_minus=minus)
        assert torch.equal(by_closure.projected_grad, by_hand.projected_grad)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_conservative_step_never_leaves_the_best_candidate() -> None:
    """In float32 the loss on the step's batch doesn't rise, but for rounding."""
    model = network()
    opt = zo_fused.ZOConservative(model, lr=0.3)  # far too large for MeZO
    last = loss_of(model)().item()
    for _ in range(40):
        opt.step(loss_of(model))
        now = loss_of(model)().item()
        assert now <= last + 1e-5 * abs(last)
        last = now


def test_a_conservative_step_takes_nan_for_the_worst() -> None:
    model = network()
    opt = zo_fused.ZOConservative(model, lr=1e-2)
    start = copy.deepcopy(model)
    losses = iter([1.0, 0.5, 3.0, math.nan, 4.0])
    opt.step(lambda: next(losses))
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert (opt.step_count, opt.skipped_steps) == (1, 0)


# ---- what a review found -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_opt", "losses"),
    [(zo_fused.ZOConservative, (1.0, 0.5)), (zo_fused.ForwardGrad, (1.0, 0.5))],
)
def test_methods_that_need_a_closure_say_so(make_opt: Make, losses: tuple[float, float]) -> None:
    model = network()
    start = copy.deepcopy(model)
    opt = make_opt(model)
    opt.perturb(+1)
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(loss_plus=losses[0], loss_minus=losses[1])
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_query_that_no_step_has_is_refused() -> None:
    opt = zo_fused.MeZO(network(), queries=2)
    for query in (-1, 2):
        with pytest.raises(ValueError, match=r"\[0, 2\)"):
            opt.perturb(+1, query)


@pytest.mark.parametrize("sweep", range(1, 7))
def test_ctrl_c_in_a_conservative_step(sweep: int) -> None:
    """In the middle of any of its sweeps: the weights come back to theta."""
    model = network()
    opt = zo_fused.ZOConservative(model, lr=1.0, eps=0.1)
    opt.step(loss_of(model))
    before = copy.deepcopy(model)
    original, count = opt.direction.sweep, 0

    def interrupted(*args: Any, **kw: Any) -> None:
        nonlocal count
        original(*args, **kw)
        count += 1
        if count == sweep:
            signal.raise_signal(signal.SIGINT)

    opt.direction.sweep = interrupted
    try:
        opt.step(loss_of(model))
    except KeyboardInterrupt:
        opt.flush()
        if opt.step_count == 1:
            for p, q in zip(model.parameters(), before.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_history_of_a_parameter_that_was_frozen_for_a_while() -> None:
    """And of skipped steps: with room for all of them it is ZOAdam, to rounding."""
    one, two = network(), network()
    a = zo_fused.ZOAdam(one, lr=1e-2)
    b = zo_fused.ZOAdam(two, lr=1e-2, history=20)
    for step in range(12):
        for model, opt in ((one, a), (two, b)):
            model[0].bias.requires_grad_(step not in (3, 4))
            loss = loss_of(model)
            opt.step((lambda f=loss: f() * math.nan) if step in (2, 6) else loss)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_bias_correction_knows_what_the_window_holds() -> None:
    """H = 2 after good, good, NaN, good: one estimate is left, so the step is lr in size."""
    w = nn.Parameter(torch.zeros(5))
    opt = zo_fused.ZOAdam([w], lr=1e-2, betas=(0.9, 0.9), history=2)
    losses = iter([2.0, 1.0, 2.0, 1.0, math.nan, 1.0, 2.0, 1.0])
    for _ in range(3):
        opt.step(lambda: next(losses))
    before = w.detach().clone()
    opt.step(lambda: next(losses))
    torch.testing.assert_close((w - before).abs(), torch.full((5,), 1e-2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("other", [6, None])
def test_a_state_of_another_history_is_refused(other: int | None) -> None:
    model = network()
    opt = zo_fused.ZOAdam(model, history=other)
    opt.step(loss_of(model))
    again = zo_fused.ZOAdam(model, history=4)
    state = opt.state_dict()
    said = "is of ZOAdam .Adam." if other is None else "was saved with .*history=6.*has .*history=4"
    with pytest.raises(ValueError, match=said):
        again.load_state_dict(state)
    if other is None:
        return
    for group in state["param_groups"]:
        del group["options"]  # as an earlier version, which did not say
    again.load_state_dict(state)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="history=4"):
        again.step(loss_of(model))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_a_log_goes_on_where_the_number_of_blocks_has_changed(tmp_path: Path) -> None:
    model = network()
    base = copy.deepcopy(model)
    make = CASES["MeZO, at once"]
    opt = make(model, lr=1e-2)
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(model))
    model[2].requires_grad_(False)
    opt.step(loss_of(model))
    again = make(model, lr=1e-2)
    again.load_state_dict(opt.state_dict())
    again.start_log(tmp_path / "log.jsonl", resume=True)
    again.step(loss_of(model))
    model[2].requires_grad_(True)
    again.step(loss_of(model))
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(model, base)


def test_states_from_before_blocks_still_load() -> None:
    model = network()
    opt = zo_fused.MeZO(model)
    state = opt.state_dict()
    for group in state["param_groups"]:
        del group["block"]
    opt.load_state_dict(state)
    opt.step(loss_of(model))


def test_a_state_of_other_blocks_is_refused() -> None:
    """It would put all groups in its own, and they would no longer move in turn."""
    model = network()
    groups = [{"params": group["params"]} for group in blocks(model)]
    state = zo_fused.MeZO(groups).state_dict()
    opt = zo_fused.MeZO(blocks(model), block_order="sequential")
    with pytest.raises(ValueError, match=r"in the blocks \[0, 0\], here they are in \[0, 1\]"):
        opt.load_state_dict(state)
    assert [group["block"] for group in opt.param_groups] == [0, 1]
    opt.load_state_dict(zo_fused.MeZO(blocks(model)).state_dict())  # another schedule


def test_groups_are_fixed_while_a_log_is_open(tmp_path: Path) -> None:
    opt = zo_fused.MeZO(network())
    opt.start_log(tmp_path / "log.jsonl")
    with pytest.raises(RuntimeError, match="close_log"):
        opt.add_param_group({"params": [("new", nn.Parameter(torch.zeros(2)))]})


def test_memory_that_moves_between_perturbations() -> None:
    """`p.data = ...` in a loop of the user's, who keeps the old one."""
    model = network()
    opt = zo_fused.MeZO(model, lr=0.0, eps=0.1)
    start, old = copy.deepcopy(model), []
    with opt.perturbed(+1):
        for p in model.parameters():
            old.append(p.data)
            p.data = p.data.clone()
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_numbers_of_numpy_are_losses() -> None:
    model = network()
    opt = zo_fused.MeZO(model)
    opt.step(lambda: np.float32(loss_of(model)().item()))
    assert opt.skipped_steps == 0


def test_all_evaluations_of_a_conservative_step_have_the_same_dropout() -> None:
    w = nn.Parameter(torch.zeros(3))
    opt = zo_fused.ZOConservative([w])
    seen: list[float] = []
    opt.step(lambda: seen.append(torch.rand(()).item()) or float(len(seen)))
    assert len(seen) == 5
    assert len(set(seen)) == 1


@pytest.mark.parametrize("frozen", [(1,), (3,), (2, 3), (4,)])
def test_momentum_of_a_matrix_that_was_frozen(frozen: tuple[int, ...]) -> None:
    """Within a window it goes on; over a window's end it starts anew: the old V is gone."""
    model = network()
    opt = zo_fused.LOZO(model, lr=1e-2, interval=3, momentum=0.9)
    weight = model[2].weight
    for step in range(max(frozen) + 1):
        weight.requires_grad_(step not in frozen)
        opt.step(loss_of(model))
    kept = opt.state[weight]["momentum_factor"].clone()
    weight.requires_grad_(True)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(lambda: 1.0)  # g = 0: only the old momentum is left
    now = opt.state[weight]["momentum_factor"]
    crosses = 3 in frozen
    expected = torch.zeros_like(kept) if crosses else 0.9 * kept
    torch.testing.assert_close(now, expected)
