"""FZOO against its paper: a step over the spread of the losses."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import loss_of, network, same, snapshot
from support.textbook import EPS, SEED, STEPS, Loss, Weights, follow, moved_by, rademacher

import zo_fused

QUERIES, LR, DECAY = 4, 2e-3, 0.5


def paper(loss: Loss, theta: Weights, lr: float) -> list[float]:
    """``theta -= lr / (eps N sigma) sum (l_i - l_0) u_i``, sigma^2 over N - 1; the decay of the
    package, ``LR * DECAY``; returns ``(l_i - l_0) / sigma'`` with sigma'^2 over N."""
    units = []
    for t in range(STEPS):
        us = [{k: rademacher(k, w, t, i) for k, w in theta.items()} for i in range(QUERIES)]
        base = float(loss(theta))
        losses = [float(loss(moved_by(theta, EPS, u))) for u in us]
        mean = math.fsum(losses) / QUERIES
        squares = math.fsum((x - mean) ** 2 for x in losses)
        sigma = math.sqrt(squares / (QUERIES - 1))
        for k, w in theta.items():
            step = sum((x - base) * u[k] for x, u in zip(losses, us, strict=True))
            theta[k] = w - lr / (EPS * QUERIES * sigma) * step - LR * DECAY * w
        units += [(x - base) / math.sqrt(squares / QUERIES) for x in losses]
    return units


@pytest.mark.parametrize("deferred", [False, True])
def test_fzoo_follows_its_paper_in_the_codes_units(deferred: bool) -> None:
    """Tolerances: those of test_textbook.py for g, 2e-4, twice as much as the losses are eps apart
    and not 2 eps, over sigma / eps > 0.5."""
    lr_of_paper = LR * EPS / math.sqrt((QUERIES - 1) / QUERIES)
    run = follow(
        lambda model: zo_fused.FZOO(
            model,
            lr=LR,
            queries=QUERIES,
            eps=EPS,
            seed=SEED,
            weight_decay=DECAY,
            deferred=deferred,
        ),
        lambda loss, theta: paper(loss, theta, lr_of_paper),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=8e-4)
    assert run.off < 1e-6 < 0.05 < run.moved


def test_the_spread_is_that_of_the_perturbed_losses_alone() -> None:
    model = network()
    opt = zo_fused.FZOO(model, queries=3)
    losses = iter([5.0, 1.0, 2.0, 6.0])  # the first is that at theta
    opt.step(lambda: next(losses))
    sigma = math.sqrt((4 + 1 + 9) / 3)
    torch.testing.assert_close(opt.projected_grad, torch.tensor([-4.0, -3.0, 1.0]) / sigma)


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_step_does_not_depend_on_the_size_of_the_loss(scale: float) -> None:
    model, other = network(), network()
    for each, factor in ((model, 1.0), (other, scale)):
        opt = zo_fused.FZOO(each, lr=1e-2, queries=3)
        opt.step(lambda each=each, factor=factor: factor * loss_of(each)().double())
    # products by a factor round, to 2^-53 of losses that differ by 1e-3 of their size
    for a, b in zip(snapshot(model), snapshot(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_losses_that_are_all_equal_skip_the_step(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    before = snapshot(model)
    opt = zo_fused.FZOO(model, lr=1.0, queries=2)
    for spread, skipped in ((0.0, 1), (2e-13, 2)):
        losses = iter([1.0, 1.0 + 2 * spread, 1.0 - 2 * spread])
        opt.step(lambda losses=losses: next(losses))
        assert opt.skipped_steps == skipped
    assert "step 0 skipped: a loss was not finite, or none differed from another" in caplog.text
    for a, b in zip(before, snapshot(model), strict=True):  # up to the sweeps' rounding
        torch.testing.assert_close(a, b, rtol=0, atol=2.0**-22)
    losses = iter([1.0, 1.0 + 4e-12, 1.0 - 4e-12])
    opt.step(lambda: next(losses))
    assert opt.skipped_steps == 2
    assert not same(before, model)


def test_one_loss_has_no_spread() -> None:
    with pytest.raises(ValueError, match="spread of several losses: queries >= 2"):
        zo_fused.FZOO(network(), queries=1)
