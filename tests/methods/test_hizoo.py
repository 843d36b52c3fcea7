"""HiZOO follows its textbook: which Hessian is where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.logs import records_of
from support.models import loss_of, network, same
from support.textbook import EPS, SEED, STEPS, dense, loss_of_copy, model_and_tokens
from torch import Tensor, nn

import zo_fused


@pytest.mark.parametrize("queries", [1, 2])
def test_fifty_float32_steps_follow_the_float64_textbook(queries: int) -> None:
    """Tolerances. Weights, g and their errors as in `test_textbook.py`. Losses are float64 of
    weights that are rounded to 2^-24, so curv, a second difference over eps^2 = 1e-4, is off by
    up to 4 |grad| 2^-25 sqrt(d) / (2e-4) of about 50; times a z^2, summed over 50 steps at
    random, that is a relative 1e-4 of H at a = 1e-3, of which the step has the half: the bound of
    the weights grows by 1e-4 times what has been moved."""
    model, tokens = model_and_tokens()
    lr, decay, smooth = 1e-3, 0.5, 1e-3

    loss = loss_of_copy(model, tokens)
    opt = zo_fused.HiZOO(model, lr, smooth, eps=EPS, weight_decay=decay, seed=SEED, queries=queries)
    theta = {k: p.detach().double() for k, p in model.named_parameters()}
    start = {k: w.clone() for k, w in theta.items()}
    hessian = {k: torch.ones_like(w) for k, w in theta.items()}
    grads: list[float] = []
    wanted: list[float] = []
    for t in range(STEPS):
        opt.step(lambda: loss(dict(model.named_parameters())))
        grads += opt.projected_grad.reshape(-1).tolist()
        step = {k: torch.zeros_like(w) for k, w in theta.items()}
        growth = {k: torch.zeros_like(w) for k, w in theta.items()}
        at_theta = float(loss(theta))
        for query in range(queries):
            z = {k: dense(k, w, t, query) for k, w in theta.items()}
            along = {k: EPS * z[k] / hessian[k].sqrt() for k in theta}
            plus = float(loss({k: w + along[k] for k, w in theta.items()}))
            minus = float(loss({k: w - along[k] for k, w in theta.items()}))
            g = (plus - minus) / (2 * EPS)
            curvature = abs(plus + minus - 2 * at_theta) / (2 * EPS**2)
            wanted.append(g)
            for k in theta:
                step[k] += g * z[k] / queries
                growth[k] += curvature * hessian[k] * z[k] ** 2 / queries
        for k, w in theta.items():
            hessian[k] = ((1 - smooth) * hessian[k] + smooth * growth[k]).clamp(min=1e-6)
            theta[k] = w - lr * (step[k] / hessian[k].sqrt() + decay * w)
    torch.testing.assert_close(torch.tensor(grads), torch.tensor(wanted), rtol=0, atol=4e-4)
    moved = math.sqrt(sum(float((theta[k] - w).square().sum()) for k, w in start.items()))
    off = math.sqrt(
        sum(float((p.detach() - theta[k]).square().sum()) for k, p in model.named_parameters())
    )
    assert moved > 0.05
    assert off < 1e-6 * math.sqrt(sum(w.numel() for w in start.values())) + 1e-4 * moved
    for k, p in model.named_parameters():
        torch.testing.assert_close(
            opt.state[p]["hessian"].double(), hessian[k], rtol=1e-3, atol=1e-6
        )
    changed = torch.cat([h.flatten() for h in hessian.values()])
    assert float(changed.std()) > 0.01  # it is another one than at the start, weight by weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_smoothing_it_is_mezo_to_the_bit(dtype: torch.dtype) -> None:
    one, two = network(dtype), network(dtype)
    rounding = "nearest" if dtype == torch.float32 else "stochastic"
    options: dict[str, Any] = {"lr": 1e-2, "seed": 3, "weight_decay": 0.1, "rounding": rounding}
    hizoo = zo_fused.HiZOO(one, hessian_smooth=0.0, **options)
    mezo = zo_fused.MeZO(two, **options)
    for _ in range(6):
        hizoo.step(loss_of(one))
        mezo.step(loss_of(two))
    assert same(one, two)


def test_the_hessian_of_float16_weights_moves() -> None:
    """In the dtype of the weights `a curv` would be below half an ulp of 1."""
    model = network(torch.float16)
    opt = zo_fused.HiZOO(model, lr=0.0, hessian_smooth=1e-5, eps=1e-2)
    for _ in range(20):
        opt.step(loss_of(model))
    for p in model.parameters():
        hessian = opt.state[p]["hessian"]
        assert hessian.dtype == torch.float32
        assert bool((hessian != 1).all())


def test_it_learns_the_curvature() -> None:
    """Of a quadratic ``sum h_i p_i^2 / 2`` in d dimensions E[curv z_i^2] = (sum u + 2 u_i) / 2 with
    u = h / H, so H rests (but for noise) where that is 1: at H = (d + 2) / 2 h, whatever a."""
    p, h = nn.Parameter(torch.zeros(2)), torch.tensor([1.0, 100.0])
    opt = zo_fused.HiZOO([p], lr=0.0, hessian_smooth=1e-2)
    logs = []
    for step in range(1000):
        opt.step(lambda: (h * p.double() ** 2).sum() / 2)
        if step >= 400:
            logs.append(opt.state[p]["hessian"].log())
    ratio = (torch.stack(logs).mean(0).exp() / (2 * h)).tolist()
    # At rest log H has a variance of about a / 2 times that of curv z^2, 10: 0.05; correlated over
    # 1 / a steps, the mean of 600 has a standard deviation below 0.1, and a bias of the size of
    # the variance.
    assert all(0.7 < x < 1.4 for x in ratio), ratio


def test_three_losses_and_the_log_has_the_curvatures(tmp_path: Path) -> None:
    model, base, calls = network(), network(), 0
    loss = loss_of(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss()

    opt = zo_fused.HiZOO(model, lr=1e-2, hessian_smooth=1e-2, queries=2)
    assert opt.forwards == 5
    opt.start_log(tmp_path / "log")
    for _ in range(4):
        opt.step(closure)
    assert calls == 20
    opt.close_log()
    lines = records_of(tmp_path / "log")
    found = [line[-1]["probes"] for line in lines if isinstance(line, list)]
    assert [len(values) for values in found] == [2] * 4
    zo_fused.replay(base, tmp_path / "log")
    assert same(model, base)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_loss_that_is_not_finite_skips_the_step(which: int) -> None:
    """Also that at theta, without which there is a g, but no curvature."""
    model, count = network(), 0
    opt = zo_fused.HiZOO(model, lr=1e-2, hessian_smooth=1e-2)
    opt.step(loss_of(model))
    kept = [opt.state[p]["hessian"].clone() for p in model.parameters()]

    def closure() -> Tensor:
        nonlocal count
        count += 1
        return torch.tensor(math.nan) if count == which + 1 else loss_of(model)()

    opt.step(closure)
    assert opt.skipped_steps == 1
    for p, before in zip(model.parameters(), kept, strict=True):
        assert torch.equal(opt.state[p]["hessian"], before)


def test_what_does_not_work_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    for option in ("deferred", "one_sided"):
        with pytest.raises(TypeError, match=option):
            zo_fused.HiZOO([p], **{option: True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='z\\^2, which is 1 with distribution="rademacher"'):
        zo_fused.HiZOO([p], distribution="rademacher")
    with pytest.raises(ValueError, match="hessian_smooth"):
        zo_fused.HiZOO([p], hessian_smooth=1.0)
    with pytest.raises(TypeError, match="needs a closure"):
        zo_fused.HiZOO([p]).step(loss_plus=1.0, loss_minus=0.0)
