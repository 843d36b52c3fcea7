"""ES: steps of populations that other processes evaluate, perhaps not to the last member."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import network, same, snapshot
from support.textbook import EPS, SEED, dense

import zo_fused

REWARDS = (0.5, -1.0, 2.0, 0.25, 1.0, -0.5)
LR = 1e-2


@pytest.mark.parametrize(
    ("rewards", "antithetic", "counted"),
    [
        (REWARDS, False, range(6)),
        ((0.5, None, 2.0, None, 1.0, -0.5), False, (0, 2, 4, 5)),
        (REWARDS, True, range(6)),
        ((0.5, None, 2.0, 0.25, 1.0, -0.5), True, (2, 3, 4, 5)),  # its partner counts for nothing
    ],
)
def test_the_step_is_that_of_the_members_that_came(
    rewards: tuple[float | None, ...], antithetic: bool, counted: Any
) -> None:
    """theta + lr / M sum of S s z over the M members that came, S = (R - mean) / std of them."""
    model = network()
    options: dict[str, Any] = {"antithetic": antithetic, "eps": EPS, "seed": SEED, "lr": LR}
    opt = zo_fused.ES(model.named_parameters(), population=6, **options)
    came = torch.tensor([rewards[i] for i in counted], dtype=torch.float64)
    scores = (came - came.mean()) / (came.std(correction=0) + 1e-8)
    wanted = {}
    for name, p in model.named_parameters():
        theta = p.detach().double()
        signed = [(i // 2, 1 - 2 * (i % 2)) if antithetic else (i, 1) for i in counted]
        zs = [sign * dense(name, theta, 0, query) for query, sign in signed]
        climb = sum(s * z for s, z in zip(scores, zs, strict=True)) / len(came)
        wanted[name] = theta + LR * climb
    loss = opt.tell(rewards)
    assert float(loss) == pytest.approx(float(came.mean()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), wanted[name], rtol=1e-6, atol=1e-6)
    assert opt.step_count == 1


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"direction": "lowrank"}])
def test_who_follows_has_the_same_bits_and_so_has_a_replay(
    options: dict[str, Any], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    options |= {"population": 6, "lr": LR, "rounding": "stochastic"}
    told, follows, replayed = (network(torch.bfloat16) for _ in range(3))
    opt, other = zo_fused.ES(told, **options), zo_fused.ES(follows, **options)
    opt.start_log(log)
    for rewards in (REWARDS, (0.5, None, *REWARDS[2:]), (math.nan, *REWARDS[1:]), REWARDS):
        opt.tell(rewards)
        assert opt.projected_grad is not None
        other.follow(opt.projected_grad.tolist())
        assert same(told, follows)
    assert opt.skipped_steps == other.skipped_steps == 1
    assert zo_fused.replay(replayed, log) == 4
    assert same(replayed, told)


def test_what_is_no_population_is_refused_and_nothing_moves() -> None:
    model = network()
    opt = zo_fused.ES(model, population=4, antithetic=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match="there are 4 members, but 3 rewards"):
        opt.tell([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no reward has come"):
        opt.tell([1.0, None, None, 2.0])
    with pytest.raises(TypeError, match="scalar"):
        opt.tell([1.0, 2.0, 3.0, "4"])
    for rewards in ({0: 9.0, 1: 1.0, 2: 5.0, 3: 3.0}, {9.0, 1.0, 5.0, 3.0}, iter([1.0] * 4)):
        with pytest.raises(TypeError, match="rewards must be a list, with one of each member in"):
            opt.tell(rewards)
    alone = zo_fused.ES(model, population=2)
    with pytest.raises(ValueError, match="one reward has no zscore: two must come"):
        alone.tell([1.0, None])
    assert not alone.step_count
    with pytest.raises(ValueError, match="2 projected gradients, not 4"):
        opt.follow([1.0, 2.0, 3.0, 4.0])
    assert same(before, snapshot(model))
    assert opt.step_count == 0
