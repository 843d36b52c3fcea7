"""LOREN against a float64 textbook, written from the paper's formulas, and its traps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.models import blocks, loss_of, network
from support.textbook import (
    EPS,
    SEED,
    STEPS,
    Loss,
    Weights,
    dense,
    follow,
    moved_by,
)
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import zo_fused
from zo_fused.directions import panels
from zo_fused.noise import Purpose, derive_key, normal, parameter_id
from zo_fused.step.schedule import Position

K, RHO, LR, DECAY = 3, 0.2, 3e-3, 0.1


def first_a(name: str, w: Tensor, seed: int = SEED) -> Tensor:
    """A number a column of a matrix, one an element of a vector."""
    n = w.numel() if w.dim() < 2 else w[0].numel()
    key = derive_key(seed, Purpose.INIT, 0)
    return normal(n, key, parameter_id(name)).double() / math.sqrt(w.numel())


def tiled(a: Tensor, w: Tensor) -> Tensor:
    """a in every row, flat."""
    return a.repeat(w.numel() // len(a))


def reflected(u: Tensor, a: Tensor) -> Tensor:
    """d of a flat u: the covariance is ``rho (rho I + a a^T)^-1``."""
    s = math.sqrt(RHO + float(a @ a))
    alpha = (math.sqrt(RHO) + s) * float(a @ u) / (float(a @ a) * s)
    return u - alpha * a


def textbook(
    loss: Loss, theta: Weights, a: Weights, lr_cov: float, beta: float
) -> tuple[list[float], Weights]:
    """One update a step, a fixed within it; returns the g of leave-one-out, and moves a."""
    m = {k: torch.zeros_like(w) for k, w in theta.items()}
    grads: list[float] = []
    for t in range(STEPS):
        ds = [
            {
                k: reflected(dense(k, w, t, q).flatten(), tiled(a[k], w)).view(w.shape)
                for k, w in theta.items()
            }
            for q in range(K)
        ]
        f = [float(loss(moved_by(theta, EPS, d))) for d in ds]
        weights = [(x - math.fsum(f) / K) / (K - 1) for x in f]
        grads += [(x - (math.fsum(f) - x) / (K - 1)) / EPS for x in f]
        for k, w in theta.items():
            flat = tiled(a[k], w)
            score = sum(
                c * (flat / (RHO + flat @ flat) - (flat @ d[k].flatten()) * d[k].flatten() / RHO)
                for c, d in zip(weights, ds, strict=True)
            )
            a[k] = a[k] - lr_cov * score.view(-1, len(a[k])).sum(0)
            estimate = sum(c * d[k] for c, d in zip(weights, ds, strict=True)) / EPS
            m[k] = beta * m[k] + (1 - beta) * estimate
            theta[k] = w - LR * (m[k] + DECAY * w)
    return grads, a


@pytest.mark.parametrize(("beta", "deferred"), [(0.9, False), (0.0, True)])
def test_fifty_steps_follow_the_textbook(beta: float, deferred: bool) -> None:
    """Tolerances as in test_textbook.py, where losses are 2 eps apart and g is off by 2e-4: here
    eps, and each is compared with K - 1 others. a moves by lr_cov times losses, which are off by
    eps times 2e-4, times scores of up to 50: 3e-5 a step, in 50 steps at random 2e-4."""
    a: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    lr_cov = 0.3

    def paper(loss: Loss, theta: Weights) -> list[float]:
        a.update({k: first_a(k, w) for k, w in theta.items()})
        return textbook(loss, theta, a, lr_cov, beta)[0]

    def look(opt: zo_fused.LOREN, step: int) -> None:
        if step == STEPS - 1:
            group = opt.param_groups[0]
            for name, p in zip(group["param_names"], group["params"], strict=True):
                kept[name] = opt.state[p]["curvature"].double()

    run = follow(
        lambda model: zo_fused.LOREN(
            model,
            lr=LR,
            queries=K,
            momentum=beta,
            lr_cov=lr_cov,
            rho=RHO,
            eps=EPS,
            seed=SEED,
            weight_decay=DECAY,
            deferred=deferred,
        ),
        paper,
        look,
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=8e-4)
    assert run.off < 1e-6 < 0.05 < run.moved
    off = max(float((kept[k] - a[k]).abs().max()) for k in a)
    moved = max(float((first_a(k, run.start[k]) - a[k]).abs().max()) for k in a)
    assert off < 2e-4 < 1 < moved  # the released code's eps^2 would leave 1e-6 of it


def test_the_losses_are_compared_with_each_other_alone() -> None:
    model = network()
    opt = zo_fused.LOREN(model, queries=3, eps=0.5)
    losses = iter([1.0, 2.0, 6.0])
    opt.step(lambda: next(losses))
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5]) / 0.5
    torch.testing.assert_close(opt.projected_grad, expected)
    assert abs(float(opt.projected_grad.sum())) < 1e-6
    assert opt.forwards == 3


def test_the_covariance_of_directions() -> None:
    """d of 12 independent u are R u with ``R R^T = rho (rho I + a a^T)^-1``."""
    w = nn.Parameter(torch.zeros(3, 4))
    opt = zo_fused.LOREN([("w", w)], queries=2, eps=1.0, lr=0.0, lr_cov=0.0, rho=RHO, seed=SEED)
    us, ds = [], []
    for step in range(12):
        opt.perturb(1.0)
        ds.append(w.data.double().flatten().clone())
        us.append(dense("w", w, step).flatten())
        opt.perturb(0.0)
        opt.step(lambda: 1.0)
    u, d = torch.stack(us, 1), torch.stack(ds, 1)
    root = d @ torch.linalg.inv(u)
    a = tiled(first_a("w", w), w)
    assert 0.1 < float(a @ a) < 10  # so that it shows
    want = RHO * torch.linalg.inv(RHO * torch.eye(12).double() + a[:, None] * a)
    # float32 rounding of u and of weights, times the condition of u
    scale = float(torch.linalg.cond(u)) * 2e-7
    torch.testing.assert_close(root @ root.T, want, rtol=0, atol=20 * scale)


@pytest.mark.parametrize("block_order", [None, "simultaneous"])
def test_a_goes_down_the_slope_of_the_density(block_order: str | None) -> None:
    """By autograd of the normal distribution's own. With blocks, weights of the queries of a block
    don't add up to zero."""
    model = network()
    names = {id(p): name for name, p in model.named_parameters()}
    opt = zo_fused.LOREN(
        blocks(model) if block_order else model,
        queries=2,
        eps=1e-2,
        rho=RHO,
        lr_cov=2.0,
        seed=SEED,
        block_order=block_order,
    )
    rounds = 2 * len({g["block"] for g in opt.param_groups})
    losses = [0.3 * q * q for q in range(rounds)]
    given = iter(losses)
    opt.step(lambda: next(given))
    total = sum(losses)
    gs = [(x - (total - x) / (rounds - 1)) for x in losses]
    blocks_in_order = sorted({g["block"] for g in opt.param_groups})
    for group in opt.param_groups:
        first = 2 * blocks_in_order.index(group["block"])
        for p in group["params"]:
            name = names[id(p)]
            a = first_a(name, p).requires_grad_()
            flat = tiled(a, p)
            spread = RHO * torch.linalg.inv(
                RHO * torch.eye(p.numel()).double() + flat[:, None] * flat
            )
            density = MultivariateNormal(torch.zeros(p.numel()).double(), spread)
            mean: Any = 0.0
            for query in range(2):
                d = reflected(dense(name, p, 0, query).flatten(), flat.detach())
                mean = mean + gs[first + query] / 2 * density.log_prob(d)
            mean.backward()
            assert float((2.0 * a.grad).abs().max()) > 1e-2
            want = a.detach() - 2.0 * a.grad
            torch.testing.assert_close(
                opt.state[p]["curvature"].double(), want, rtol=1e-5, atol=1e-6
            )


class LeaveOneOut(zo_fused.MeZO):
    """MeZO from losses at theta + eps z alone."""

    def positions(self) -> list[Position]:
        return [Position(1.0, query) for query in range(self.schedule.queries)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deferred", [False, True])
def test_without_a_it_is_mezo_to_the_bit(dtype: torch.dtype, deferred: bool) -> None:
    ends = []
    for kind in (zo_fused.LOREN, LeaveOneOut):
        model = network(dtype)
        own = {"lr_cov": 0.0} if kind is zo_fused.LOREN else {}
        opt = kind(
            model,
            lr=1e-2,
            queries=3,
            momentum=0.0,
            weight_decay=0.1,
            seed=5,
            deferred=deferred,
            rounding="stochastic",
            **own,
        )
        if kind is zo_fused.LOREN:
            opt.perturb(0.0)
            for p in model.parameters():
                opt.state[p]["curvature"] = torch.zeros(p.numel() if p.dim() < 2 else p[0].numel())
        for _ in range(6):
            opt.step(loss_of(model))
        opt.flush()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


class Odd(nn.Module):
    """A matrix, one in other memory, one of four dimensions, a vector and a number."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=made).to(dtype))

        self.matrix, self.vector, self.number = drawn(23, 7), drawn(90), drawn()
        self.turned = nn.Parameter(drawn(5, 12).data.t())
        self.deep = drawn(6, 3, 2, 2)

    def forward(self) -> Tensor:
        return sum((p.float() ** 2).mean() + p.float().mean() for p in self.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bits_do_not_depend_on_the_scratch_memory(
    dtype: torch.dtype, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for elements, lots in ((panels.WORKSPACE // 4, 3), (16, 28)):
        monkeypatch.setattr(panels, "WORKSPACE", 4 * elements)
        model = Odd(dtype)
        assert not model.turned.is_contiguous()
        opt = zo_fused.LOREN(
            model,
            lr=1e-2,
            lr_cov=0.5,
            queries=3,
            momentum=momentum,
            rounding="stochastic",
            deferred=True,
            eps=0.1,
        )
        for _ in range(4):
            opt.step(model)
        assert len(list(panels.panels_of(opt.weights.buckets[0]).lots())) == lots
        a = [opt.state[p]["curvature"] for p in model.parameters()]
        opt.flush()
        ends.append(torch.cat([p.detach().flatten().float() for p in [*model.parameters(), *a]]))
    assert torch.equal(*ends)
    start = torch.cat([p.detach().flatten().float() for p in Odd(dtype).parameters()])
    assert not torch.equal(ends[0][: len(start)], start)


def test_what_is_below_a_weights_last_place_is_rounded_with_the_noise() -> None:
    """Added by itself, what a takes away would be lost in nearly all weights of 16 bits."""
    drawn = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    w = nn.Parameter((60 * drawn).bfloat16())
    start, a = w.detach().double().clone(), tiled(first_a("w", w), w)
    opt = zo_fused.LOREN([("w", w)], queries=2, eps=1.0, seed=SEED, rho=RHO)
    opt.perturb(1.0, query=1)  # whose u has more along a
    u = dense("w", w, 0, 1)
    d = reflected(u.flatten(), a).view_as(u)
    in_two = ((start + u).bfloat16().double() + (d - u)).bfloat16()
    found, want = w.data, (start + d).bfloat16()
    assert float((found != want).double().mean()) < 1e-3  # ties that float32 rounds the other way
    assert float((in_two != want).double().mean()) > 2e-2


def test_state_is_a_row_a_matrix_and_the_momentum() -> None:
    w, bias = nn.Parameter(torch.zeros(12, 20)), nn.Parameter(torch.zeros(5))
    for momentum in (0.9, 0.0):
        opt = zo_fused.LOREN([w, bias], momentum=momentum)
        opt.step(lambda: w.sum() + bias.sum())
        assert opt.state[w]["curvature"].shape == (20,)
        assert opt.state[bias]["curvature"].shape == (5,)
        assert ("momentum" in opt.state[w]) == bool(momentum)


@pytest.mark.parametrize(
    ("kw", "error"),
    [
        ({"queries": 1}, "queries >= 2"),
        ({"rho": 0.0}, "rho must be"),
        ({"lr_cov": -1.0}, "lr_cov must be"),
        ({"momentum": 1.0}, "momentum must be"),
    ],
)
def test_what_makes_no_sense_is_refused(kw: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.LOREN(network(), **kw)


def test_losses_given_by_hand_are_refused() -> None:
    with pytest.raises(TypeError, match="needs a closure"):
        zo_fused.LOREN(network()).step(loss_plus=[1.0] * 5, loss_minus=[0.0] * 5)
