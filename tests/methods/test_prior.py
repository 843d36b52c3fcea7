"""MeZO-GV and MeZO-Greedy: 50 steps of a float64 textbook, and what z is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.equality import in_memory
from support.models import loss_of, network, snapshot
from support.textbook import EPS, SEED, STEPS, Loss, Weights, drawn, follow, moved_by
from torch import Tensor, nn

import zo_fused
from zo_fused.directions.guided import SURVIVORS, Guided
from zo_fused.noise import Purpose, derive_key, normal, parameter_id

Name = tuple[int, int]  # of a candidate: step and probe

# ---- fifty steps --------------------------------------------------------------------------------


def candidate(theta: Weights, name: Name) -> Weights:
    return {k: drawn(k, w.shape, Purpose.PROBE, *name) for k, w in theta.items()}


def combined(prior: str, found: list[tuple[float, Weights]]) -> Weights:
    """v of the paper, with entries of variance 1, from losses and candidates."""
    ranked = [u for _, u in sorted(found, key=lambda pair: pair[0])]
    if prior == "greedy":
        return ranked[0]
    half = len(ranked) // 2
    low, high = ranked[:half], ranked[-half:]
    mean = {k: (sum(u[k] for u in low) - sum(u[k] for u in high)) / half for k in ranked[0]}
    return {k: v / math.sqrt(2 / half) for k, v in mean.items()}


def textbook(
    loss: Loss, theta: Weights, lr: float, prior: str, pool: int, queries: int, one_sided: bool
) -> list[float]:
    grads: list[float] = []
    kept: dict[int, Name] = {}
    for t in range(STEPS):
        made = []
        for query in range(queries):
            names = [(t, query * pool + j) for j in range(pool)]
            if prior == "survivor":
                names[1] = kept.get(query, names[1])
            us = [candidate(theta, name) for name in names]
            losses = [float(loss(moved_by(theta, EPS, u))) for u in us]
            kept[query] = names[losses.index(min(losses))]
            v = combined(prior, list(zip(losses, us, strict=True)))
            away, apart = (0.0, 1) if one_sided else (-1.0, 2)
            difference = loss(moved_by(theta, EPS, v)) - loss(moved_by(theta, away * EPS, v))
            made.append((float(difference) / (apart * EPS), v))
        grads += [g for g, _ in made]
        for k, w in theta.items():
            theta[k] = w - lr * sum(g * v[k] for g, v in made) / queries
    return grads


@pytest.mark.parametrize(
    "kw",
    [
        {"prior": "guiding", "pool": 4},
        {"prior": "guiding", "pool": 3, "deferred": True, "queries": 2},
        {"prior": "greedy", "pool": 3, "one_sided": True},
        {"prior": "survivor", "deferred": True, "queries": 2, "one_sided": True},
    ],
    ids=str,
)
def test_fifty_float32_steps_follow_the_float64_textbook(kw: dict[str, Any]) -> None:
    """Tolerances as in test_textbook.py, for steps that round each weight up to 11 times (pools of
    3, two queries) instead of 3: twice as much, and twice that where losses are eps apart. No two
    losses of a pool are so near each other that rounding could exchange them: a step that took
    another candidate would be off by the size of g.
    """
    textbooks = {"pool": 2, "queries": 1, "one_sided": False, **kw}
    textbooks.pop("deferred", None)
    run = follow(
        lambda model: zo_fused.MeZO(model, lr=3e-4, eps=EPS, seed=SEED, **kw),
        lambda loss, theta: textbook(loss, theta, 3e-4, **textbooks),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=8e-4)
    assert run.moved > 0.05
    assert run.off < 2e-6


# ---- what a step looks at -----------------------------------------------------------------------


class Seen:
    """The weights at every evaluation, as far as they were from those at the start."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.start = model, snapshot(model)
        self.away: list[list[Tensor]] = []
        self.losses: list[float] = []

    def __call__(self) -> Tensor:
        now = snapshot(self.model)
        self.away.append([p.double() - q.double() for p, q in zip(now, self.start, strict=True)])
        loss = loss_of(self.model)().double()
        self.losses.append(float(loss))
        return loss


@pytest.mark.parametrize("prior", ["guiding", "greedy", "survivor"])
def test_z_is_made_of_the_candidates_that_were_evaluated(prior: str) -> None:
    """In every parameter: the released code draws them anew from another place of the generator, so
    its v agrees with what was evaluated in the first tensor alone, and tensors of one shape share
    their noise."""
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, eps=1e-2, prior=prior, seed=4)
    for _ in range(3):
        seen = Seen(model)
        opt.step(seen)
        pool = 2 if prior == "survivor" else 4
        found = [
            (loss, dict(enumerate(away)))
            for loss, away in zip(seen.losses[:pool], seen.away[:pool], strict=True)
        ]
        z, last = combined(prior, found), seen.away[-1]
        for k, minus in enumerate(last):
            # a sweep rounds weights below 1 by 2^-25, a sum of four such sums by less than this
            torch.testing.assert_close(minus, -z[k], rtol=0, atol=1e-6)
        if prior != "greedy":
            for plus, minus in zip(seen.away[-2], last, strict=True):
                torch.testing.assert_close(plus, -minus, rtol=0, atol=1e-6)
        assert all(away.abs().max() > 1e-3 for away in last)


@pytest.mark.parametrize("kw", [{}, {"queries": 2}, {"queries": 2, "one_sided": True}], ids=str)
def test_a_greedy_step_takes_no_loss_twice(kw: dict[str, Any]) -> None:
    model, pool = network(), 3
    opt = zo_fused.MeZO(model, lr=1e-2, eps=1e-2, prior="greedy", pool=pool, **kw)
    seen, queries = Seen(model), kw.get("queries", 1)
    opt.step(seen)
    rest = seen.losses[pool * queries :]
    assert len(rest) == (1 if kw.get("one_sided") else queries)
    for query, g in enumerate(opt.projected_grad.reshape(-1).tolist()):
        best = min(seen.losses[pool * query : pool * (query + 1)])
        apart = 1 if kw.get("one_sided") else 2
        away = rest[0] if kw.get("one_sided") else rest[query]
        assert g == pytest.approx((best - away) / (apart * 1e-2), rel=1e-6)


@pytest.mark.parametrize(
    ("prior", "pool", "queries", "one_sided", "losses", "sweeps_of_a_step"),
    [
        ("guiding", 4, 1, False, 6, 7),
        ("guiding", 2, 1, False, 4, 5),
        ("guiding", 4, 2, True, 11, 12),
        ("greedy", 4, 1, False, 5, 6),
        ("greedy", 4, 2, True, 9, 10),
        ("survivor", 2, 1, False, 4, 5),
    ],
)
@pytest.mark.parametrize("deferred", [False, True])
def test_what_a_step_costs(
    prior: str,
    pool: int,
    queries: int,
    one_sided: bool,
    losses: int,
    sweeps_of_a_step: int,
    deferred: bool,
    sweeps: list[str],
) -> None:
    model, calls = network(), 0
    kw: dict[str, Any] = {"queries": queries, "one_sided": one_sided, "deferred": deferred}
    opt = zo_fused.MeZO(model, prior=prior, pool=pool, **kw)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model)()

    for step in range(5):
        sweeps.clear()
        opt.step(closure)
        assert calls == losses * (step + 1) == opt.forwards_of(step + 1)
        assert len(sweeps) == sweeps_of_a_step - (deferred and step > 0)
    assert opt.forwards == losses


def test_a_deferred_step_rests_at_its_first_candidate() -> None:
    model = network()
    opt = zo_fused.MeZO(model, lr=1e-2, eps=1e-2, prior="guiding", deferred=True, seed=5)
    opt.step(loss_of(model))
    at_rest = in_memory(model).split([p.numel() for p in model.parameters()])
    opt.flush()
    key = derive_key(5, Purpose.PROBE, 1, 0)
    for (name, p), before in zip(model.named_parameters(), at_rest, strict=True):
        u = normal(p.numel(), key, parameter_id(name)).view_as(p)
        torch.testing.assert_close(before.view_as(p) - p.detach(), 1e-2 * u, rtol=0, atol=1e-6)


# ---- what a direction is worth ------------------------------------------------------------------


def worth(prior: str, pool: int) -> float:
    """E<gradient, v>^2 over |gradient|^2: of order statistics of independent normals."""
    drawn = np.sort(np.random.default_rng(0).standard_normal((200_000, pool)))
    if prior == "greedy":
        return float((drawn[:, 0] ** 2).mean())
    half = pool // 2
    means = drawn[:, :half].mean(1) - drawn[:, -half:].mean(1)
    return float((means**2).mean() * half / 2)


WORTH = {  # of docs/methods/prior.md: pools of 2, 4, 8 and 16
    "guiding": (0.50, 0.70, 0.91, 1.06),
    "greedy": (0.67, 0.62, 0.53, 0.40),
}


def test_the_page_says_what_a_pass_is_worth() -> None:
    """Relative to MeZO, whose two passes are worth 1, where the loss is straight over eps."""
    page = (Path(__file__).parents[2] / "docs/methods/prior.md").read_text()
    for prior, row in WORTH.items():
        for pool, per_pass in zip((2, 4, 8, 16), row, strict=True):
            forwards = zo_fused.MeZO(network(), prior=prior, pool=pool).forwards
            assert 2 * worth(prior, pool) / forwards == pytest.approx(per_pass, abs=0.01)
        assert f'| "{prior}" | ' + " | ".join(f"{x:.2f}" for x in row) + " |" in page


@pytest.mark.parametrize(("prior", "pool"), [("guiding", 2), ("guiding", 4), ("greedy", 4)])
def test_what_a_direction_is_worth(prior: str, pool: int) -> None:
    steps, a = 500, torch.linspace(-1, 1, 40).double()
    w = nn.Parameter(torch.zeros(40))
    opt = zo_fused.MeZO([w], lr=0.0, prior=prior, pool=pool, seed=1)
    squares = []
    for _ in range(steps):
        opt.step(lambda: (a * w.double()).sum())
        squares.append(float(opt.projected_grad) ** 2 / float(a @ a))
    # g^2 is at most as wide as the square of a normal, whose variance is 2: 4 standard errors
    assert np.mean(squares) == pytest.approx(worth(prior, pool), rel=4 * math.sqrt(2 / steps))


def test_guiding_with_two_candidates_is_mezo() -> None:
    """v is +-(u_0 - u_1) / sqrt(2), and g v does not know the sign."""
    models = [network(), network()]
    for model, other in zip(models, ((1.0, 2.0), (2.0, 1.0)), strict=True):
        opt, of_pool = zo_fused.MeZO(model, lr=1e-2, prior="guiding", pool=2), iter(other)
        loss = loss_of(model)
        opt.step(lambda of_pool=of_pool, loss=loss: next(of_pool, None) or loss())
    for a, b in zip(*map(snapshot, models), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # losses to 2^-26, over eps, times lr


# ---- survivors ----------------------------------------------------------------------------------


def losses_in_turn(*losses: float) -> Callable[[], float]:
    left = iter(losses)
    return lambda: next(left)


def test_the_better_one_goes_on() -> None:
    opt = zo_fused.MeZO(network(), prior="survivor")
    kept = []
    # the first two of each four: the new one, and the survivor
    for new, old in ((1.0, 2.0), (3.0, 2.0), (3.0, 1.0), (1.0, 2.0), (2.0, 2.0)):
        opt.step(losses_in_turn(new, old, 1.0, 2.0))
        kept.append(opt.state[SURVIVORS][0])
    assert kept == [[0, 0], [0, 0], [0, 0], [3, 0], [4, 0]]
    other = zo_fused.MeZO(network(), prior="survivor")
    other.step(losses_in_turn(2.0, 1.0, 1.0, 2.0))
    assert other.state[SURVIVORS] == {0: [0, 1]}


def test_what_is_not_applied_leaves_the_survivor() -> None:
    model = network()
    opt = zo_fused.MeZO(model, prior="survivor")
    opt.step(losses_in_turn(1.0, 2.0, 1.0, 2.0))
    state = copy.deepcopy(opt.state_dict()["state"])
    assert state == {SURVIVORS: {0: [0, 0]}}
    opt.estimate(losses_in_turn(1.0, 2.0, 1.0, 2.0))
    opt.flush()  # the estimate is dropped
    with pytest.raises(StopIteration):
        opt.step(losses_in_turn(1.0, 2.0, 1.0))
    for bad in ((math.nan, 1.0), (1.0, 2.0, math.inf, 1.0)):
        opt.step(losses_in_turn(*bad))
        assert opt.state_dict()["state"] == state
    assert opt.skipped_steps == 2
    opt.step(losses_in_turn(1.0, 2.0, 1.0, 2.0))
    assert opt.state[SURVIVORS] == {0: [3, 0]}


def test_only_survivors_are_a_state(tmp_path: Path) -> None:
    for prior in ("guiding", "greedy", "survivor"):
        model = network()
        opt = zo_fused.MeZO(model, prior=prior)
        for _ in range(3):
            opt.step(loss_of(model))
        assert set(opt.state_dict()["state"]) == ({SURVIVORS} if prior == "survivor" else set())
        if prior == "survivor":
            with pytest.raises(ValueError, match="must start with its first step"):
                opt.start_log(tmp_path / "log.jsonl")
        else:
            opt.start_log(tmp_path / "log.jsonl")


# ---- the rest -----------------------------------------------------------------------------------


def test_a_pool_that_is_not_finite_skips_the_step() -> None:
    model = network()
    before = snapshot(model)
    opt = zo_fused.MeZO(model, lr=1.0, prior="guiding")
    opt.step(losses_in_turn(1.0, math.nan, 1.0, 1.0))
    assert opt.skipped_steps == opt.step_count == 1
    for a, b in zip(before, snapshot(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2.0**-22)
    opt.step(loss_of(model))
    assert opt.skipped_steps == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prior": "best"}, r"prior must be one of \('guiding', 'greedy', 'survivor'\)"),
        ({"pool": 4}, "pool=4 is of a prior"),
        ({"prior": "guiding", "pool": 1}, "pool must be at least 2"),
        ({"prior": "survivor", "pool": 3}, "pool must be 2 with prior='survivor', got 3"),
        ({"prior": "greedy", "momentum": 0.9}, "without momentum: momentum=0"),
        ({"prior": "greedy", "block_order": "sequential"}, "move all weights: no block_order"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.MeZO(network(), **options)


def test_losses_from_outside_are_refused() -> None:
    opt = zo_fused.MeZO(network(), prior="guiding")
    with pytest.raises(TypeError, match="needs a closure"):
        opt.step(loss_plus=1.0, loss_minus=0.0)


def test_a_run_without_a_prior_keeps_its_state() -> None:
    """States of earlier versions know of none."""
    options = zo_fused.MeZO(network()).state_dict()["param_groups"][0]["options"]
    assert "prior" not in options
    assert "pool" not in options
    with pytest.raises(ValueError, match="the state was saved with"):
        zo_fused.MeZO(network()).load_state_dict(
            zo_fused.MeZO(network(), prior="greedy").state_dict()
        )


def test_before_a_step_has_learnt_z_is_its_first_candidate() -> None:
    model = network()
    opt = zo_fused.MeZO(model, eps=1.0, prior="greedy", pool=3, queries=2, seed=2)
    assert isinstance(opt.direction, Guided)
    start = snapshot(model)
    opt.perturb(1.0, query=1)
    key = derive_key(2, Purpose.PROBE, 0, 3)
    for (name, p), before in zip(model.named_parameters(), start, strict=True):
        u = normal(p.numel(), key, parameter_id(name)).view_as(p)
        torch.testing.assert_close(p.detach() - before, u, rtol=0, atol=1e-6)
    opt.flush()
    for a, b in zip(start, snapshot(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
