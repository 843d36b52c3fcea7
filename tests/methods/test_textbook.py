"""The mathematics: float32 runs follow float64 textbook implementations fed with the same noise.

The textbooks below are written from the formulas of the papers, in float64, whole tensors at a
time, and share nothing with the package but `zo_fused.noise.normal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.textbook import (
    EPS,
    SEED,
    STEPS,
    Loss,
    Weights,
    dense,
    drawn,
    follow,
    rademacher,
)
from torch import Tensor, nn

import zo_fused
from zo_fused.noise import Purpose, derive_key, normal
from zo_fused.step.optimizer import ZerothOrderOptimizer

Draw = Callable[[str, Tensor, int, int], Tensor]  # z of a parameter, by its name, step and query


def factor(name: str, rows: int, rank: int, purpose: Purpose, step: int, query: int = 0) -> Tensor:
    return drawn(name, (rows, rank), purpose, step, query)


def u_and_v(
    name: str, w: Tensor, step: int, rank: int, interval: int, query: int = 0
) -> tuple[Tensor, Tensor]:
    """U of the query, V of the window."""
    m, n = w.shape[0], w[0].numel()
    u = factor(name, m, rank, Purpose.U, step, query)
    return u, factor(name, n, rank, Purpose.V, step // interval)


def low_rank(rank: int, interval: int) -> Draw:
    """The z of LOZO."""

    def draw(name: str, w: Tensor, step: int, query: int) -> Tensor:
        if w.dim() < 2:
            return dense(name, w, step, query)
        u, v = u_and_v(name, w, step, rank, interval, query)
        return (u @ v.T).view(w.shape)

    return draw


def two_sided(loss: Loss, theta: Weights, z: Weights) -> float:
    plus = loss({k: w + EPS * z[k] for k, w in theta.items()})
    minus = loss({k: w - EPS * z[k] for k, w in theta.items()})
    return float(plus - minus) / (2 * EPS)


def one_sided(loss: Loss, theta: Weights, z: Weights) -> float:
    return float(loss({k: w + EPS * z[k] for k, w in theta.items()}) - loss(theta)) / EPS


def estimates(
    loss: Loss,
    theta: Weights,
    grads: list[float],
    queries: int = 1,
    estimate: Callable[[Loss, Weights, Weights], float] = two_sided,
    draw: Draw = dense,
) -> Iterator[tuple[int, Weights]]:
    """Of every step its number and the mean of g z over its queries (n-SPSA), the g also into
    `grads`. Between the steps the caller moves theta."""
    for t in range(STEPS):
        zs = [{k: draw(k, w, t, query) for k, w in theta.items()} for query in range(queries)]
        gs = [estimate(loss, theta, z) for z in zs]
        grads += gs
        pairs = list(zip(gs, zs, strict=True))
        yield t, {k: torch.stack([g * z[k] for g, z in pairs]).mean(0) for k in theta}


def textbook_sgd(loss: Loss, theta: Weights, lr: float, wd: float, **options: Any) -> list[float]:
    grads: list[float] = []
    for _, gz in estimates(loss, theta, grads, **options):
        for k, w in theta.items():
            theta[k] = w - lr * (gz[k] + wd * w)
    return grads


def textbook_lozo(
    loss: Loss, theta: Weights, lr: float, wd: float, rank: int, interval: int, divide: bool
) -> list[float]:
    grads: list[float] = []
    for _, gz in estimates(loss, theta, grads, draw=low_rank(rank, interval)):
        for k, w in theta.items():
            scale = 1 / rank if divide and w.dim() >= 2 else 1.0
            theta[k] = w - lr * (scale * gz[k] + wd * w)
    return grads


def textbook_lozo_m(
    loss: Loss, theta: Weights, lr: float, wd: float, rank: int, interval: int, beta: float
) -> list[float]:
    grads = []
    momentum: Weights = {}
    for t in range(STEPS):
        us, vs, z = {}, {}, {}
        for k, w in theta.items():
            if w.dim() < 2:
                us[k], vs[k] = dense(k, w, t)[:, None], torch.ones(1, 1).double()
            else:
                us[k], vs[k] = u_and_v(k, w, t, rank, interval)
            z[k] = (us[k] @ vs[k].T).view(w.shape)
            if t and t % interval == 0 and w.dim() >= 2:
                _, v_old = u_and_v(k, w, t - 1, rank, interval)
                momentum[k] = momentum[k] @ v_old.T @ vs[k] / vs[k].shape[0]
        g = two_sided(loss, theta, z)
        for k, w in theta.items():
            momentum[k] = beta * momentum.get(k, 0.0) + (1 - beta) * g * us[k]
            theta[k] = w - lr * ((momentum[k] @ vs[k].T).view(w.shape) + wd * w)
        grads.append(g)
    return grads


def textbook_momentum(
    loss: Loss,
    theta: Weights,
    lr: float,
    wd: float,
    beta: float,
    dampening: float,
    **options: Any,
) -> list[float]:
    grads: list[float] = []
    m = {k: torch.zeros_like(w) for k, w in theta.items()}
    for _, gz in estimates(loss, theta, grads, **options):
        for k, w in theta.items():
            m[k] = beta * m[k] + (1 - dampening) * gz[k]
            theta[k] = w - lr * (m[k] + wd * w)
    return grads


def textbook_adam(
    loss: Loss, theta: Weights, lr: float, wd: float, betas: tuple[float, float]
) -> list[float]:
    """Algorithm 2 of Loshchilov and Hutter (AdamW), with g z as gradient."""
    grads: list[float] = []
    m = {k: torch.zeros_like(w) for k, w in theta.items()}
    v = {k: torch.zeros_like(w) for k, w in theta.items()}
    for t, gz in estimates(loss, theta, grads):
        for k, w in theta.items():
            m[k] = betas[0] * m[k] + (1 - betas[0]) * gz[k]
            v[k] = betas[1] * v[k] + (1 - betas[1]) * gz[k] ** 2
            m_hat, v_hat = m[k] / (1 - betas[0] ** (t + 1)), v[k] / (1 - betas[1] ** (t + 1))
            theta[k] = w - lr * (m_hat / (v_hat.sqrt() + 1e-8) + wd * w)
    return grads


def textbook_sign(loss: Loss, theta: Weights, lr: float, wd: float, sign: str) -> list[float]:
    grads: list[float] = []
    for _, gz in estimates(loss, theta, grads):
        for k, w in theta.items():
            s = gz[k].sign() if sign == "element" else gz[k] / abs(grads[-1])
            theta[k] = w - lr * (s + wd * w)
    return grads


def block_of(name: str) -> int:
    """The blocks that the optimizers below are given."""
    return {"embed": 0, "blocks.0": 1, "blocks.1": 2}[name[: 5 if name[0] == "e" else 8]]


def in_blocks(model: nn.Module) -> list[dict]:  # type: ignore[type-arg]
    named = list(model.named_parameters())
    return [{"params": [x for x in named if block_of(x[0]) == b], "block": b} for b in range(3)]


def textbook_blocks(loss: Loss, theta: Weights, lr: float, wd: float, order: str) -> list[float]:
    """Block coordinate descent: a block a step, or all from the same weights."""
    grads = []
    for t in range(STEPS):
        taken = [t % 3] if order == "sequential" else [0, 1, 2]
        z = {k: dense(k, w, t) for k, w in theta.items()}
        masks = [{k: z[k] * (block_of(k) == b) for k in theta} for b in taken]
        gs = [two_sided(loss, theta, mask) for mask in masks]
        for b, g in zip(taken, gs, strict=True):
            for k, w in theta.items():
                if block_of(k) == b:
                    theta[k] = w - lr * (g * z[k] + wd * w)
        grads += gs
    return grads


def textbook_conservative(loss: Loss, theta: Weights, lr: float, wd: float) -> list[float]:
    grads: list[float] = []
    for _, gz in estimates(loss, theta, grads):
        places = [{k: w + s * lr * gz[k] for k, w in theta.items()} for s in (0, -1, 1)]
        theta.update(min(places, key=lambda place: float(loss(place))))
    return grads


def textbook_adam_of_history(
    loss: Loss, theta: Weights, lr: float, wd: float, betas: tuple[float, float], history: int
) -> list[float]:
    """Adam whose sums reach back over the last H estimates only."""
    grads: list[float] = []
    for t, _ in estimates(loss, theta, grads):
        past = range(max(0, t + 1 - history), t + 1)
        n = len(past)
        for k, w in theta.items():
            m, v = torch.zeros_like(w), torch.zeros_like(w)
            for s in past:
                gz = grads[s] * dense(k, w, s)
                m += betas[0] ** (t - s) * (1 - betas[0]) * gz
                v += betas[1] ** (t - s) * (1 - betas[1]) * gz**2
            m, v = m / (1 - betas[0] ** n), v / (1 - betas[1] ** n)
            theta[k] = w - lr * (m / (v.sqrt() + 1e-8) + wd * w)
    return grads


CASES = {
    "MeZO, 3 queries": (
        lambda *a, estimate, **kw: zo_fused.MeZO(*a, **kw), textbook_sgd,
        {"lr": 3e-4, "weight_decay": 0.5}, {"queries": 3, "estimate": two_sided},
    ),
    "MeZO, 3 queries, deferred": (
        lambda *a, estimate, **kw: zo_fused.MeZO(*a, deferred=True, **kw), textbook_sgd,
        {"lr": 3e-4}, {"queries": 3, "estimate": two_sided},
    ),
    "MeZO, 3 one-sided queries": (
        lambda *a, estimate, **kw: zo_fused.MeZO(*a, one_sided=True, **kw), textbook_sgd,
        {"lr": 3e-4}, {"queries": 3, "estimate": one_sided},
    ),
    "MeZO, 3 one-sided queries, deferred": (
        lambda *a, estimate, **kw: zo_fused.MeZO(*a, one_sided=True, deferred=True, **kw),
        textbook_sgd, {"lr": 3e-4}, {"queries": 3, "estimate": one_sided},
    ),
    "MeZO, Rademacher": (
        lambda *a, estimate, draw, **kw: zo_fused.MeZO(*a, distribution="rademacher", **kw),
        textbook_sgd, {"lr": 3e-4}, {"queries": 2, "estimate": two_sided, "draw": rademacher},
    ),
    "LOZO, 3 queries": (
        lambda *a, draw, **kw: zo_fused.LOZO(*a, interval=20, **kw), textbook_sgd,
        {"lr": 3e-4, "weight_decay": 0.5}, {"queries": 3, "draw": low_rank(2, 20)},
    ),
    "LOZO, 3 queries, deferred": (
        lambda *a, draw, **kw: zo_fused.LOZO(*a, interval=20, deferred=True, **kw),
        textbook_sgd, {"lr": 3e-4}, {"queries": 3, "draw": low_rank(2, 20)},
    ),
    # One window: LOZO-M then is momentum of whole estimates, nothing is projected.
    "LOZO-M, 2 queries": (
        lambda *a, draw, dampening, **kw: zo_fused.LOZO(*a, interval=STEPS, **kw),
        textbook_momentum, {"lr": 3e-4},
        {"queries": 2, "beta": 0.9, "dampening": 0.9, "draw": low_rank(2, STEPS)},
    ),
    "MeZO, a block a step": (
        lambda _, order, **kw: zo_fused.MeZO(in_blocks(kw.pop("model")), block_order=order, **kw),
        textbook_blocks, {"lr": 1e-3, "weight_decay": 0.5}, {"order": "sequential"},
    ),
    "MeZO, blocks at once": (
        lambda _, order, **kw: zo_fused.MeZO(in_blocks(kw.pop("model")), block_order=order, **kw),
        textbook_blocks, {"lr": 3e-4, "weight_decay": 0.5}, {"order": "simultaneous"},
    ),
    "ZOConservative": (zo_fused.ZOConservative, textbook_conservative, {"lr": 3e-4}, {}),
    "ZOAdam, long history": (
        lambda *a, **kw: zo_fused.ZOAdam(*a, history=STEPS, **kw), textbook_adam,
        {"lr": 1e-3, "weight_decay": 0.5}, {"betas": (0.9, 0.99)},
    ),
    "ZOAdam, short history": (
        zo_fused.ZOAdam, textbook_adam_of_history,
        {"lr": 1e-3, "weight_decay": 0.5}, {"betas": (0.9, 0.99), "history": 7},
    ),
    "MeZO, one-sided": (
        lambda *a, estimate, **kw: zo_fused.MeZO(*a, one_sided=True, **kw), textbook_sgd,
        {"lr": 3e-4, "weight_decay": 0.5}, {"estimate": one_sided},
    ),
    "MeZO, one-sided, deferred": (
        lambda *a, estimate, **kw: zo_fused.MeZO(*a, one_sided=True, deferred=True, **kw),
        textbook_sgd, {"lr": 3e-4, "weight_decay": 0.5}, {"estimate": one_sided},
    ),
    "MeZO-M, heavy ball": (
        zo_fused.MeZO, textbook_momentum, {"lr": 1e-4, "weight_decay": 0.5},
        {"beta": 0.9, "dampening": 0.0},
    ),
    "MeZO-M, moving average": (
        zo_fused.MeZO, textbook_momentum, {"lr": 1e-3}, {"beta": 0.9, "dampening": 0.9},
    ),
    "ZOAdam": (
        zo_fused.ZOAdam, textbook_adam, {"lr": 1e-3, "weight_decay": 0.5}, {"betas": (0.9, 0.99)},
    ),
    "ZOSignSGD": (
        zo_fused.ZOSignSGD, textbook_sign, {"lr": 1e-3, "weight_decay": 0.5}, {"sign": "element"},
    ),
    "ZOSignSGD, scalar": (
        zo_fused.ZOSignSGD, textbook_sign, {"lr": 1e-3}, {"sign": "scalar"},
    ),
    "MeZO": (zo_fused.MeZO, textbook_sgd, {"lr": 3e-4}, {}),
    "MeZO with decay": (zo_fused.MeZO, textbook_sgd, {"lr": 3e-4, "weight_decay": 0.5}, {}),
    "LOZO": (
        zo_fused.LOZO, textbook_lozo, {"lr": 3e-4}, {"rank": 2, "interval": 20, "divide": False},
    ),
    "LOZO, paper's 1/r": (
        zo_fused.LOZO, textbook_lozo, {"lr": 3e-4}, {"rank": 3, "interval": 7, "divide": True},
    ),
    "LOZO-M": (
        zo_fused.LOZO, textbook_lozo_m, {"lr": 3e-4}, {"rank": 2, "interval": 20, "beta": 0.9},
    ),
    "LOZO-M with decay, interval 1": (
        zo_fused.LOZO, textbook_lozo_m, {"lr": 3e-4, "weight_decay": 0.5},
        {"rank": 2, "interval": 1, "beta": 0.5},
    ),
}  # fmt: skip

NAMES = {"beta": "momentum", "divide": "divide_by_rank"}


@pytest.mark.parametrize("case", list(CASES))
def test_fifty_float32_steps_follow_the_float64_textbook(case: str) -> None:
    """Tolerances. A step rounds every weight three times, each by at most 2**-24 |w| with |w| < 4.
    Rounding is random in sign, so after 50 steps the rms error is below
    sqrt(150 / 3) * 2**-24 * rms(w) < 5e-7 for rms(w) <= 1. It enters g divided by 2 eps = 0.02 and
    weighted with the gradient (norm about 1): 1e-4 at the worst, against |g| of about 1; and
    through g the weights again, times lr = 3e-4.
    """
    method, textbook, common, extra = CASES[case]
    options = {NAMES.get(k, k): v for k, v in extra.items()}

    def make(model: nn.Module) -> ZerothOrderOptimizer:
        of_blocks = {"model": model} if "order" in extra else {}
        params = model.named_parameters()
        return method(params, eps=EPS, seed=SEED, **common, **options, **of_blocks)

    lr, decay = common["lr"], common.get("weight_decay", 0.0)
    run = follow(make, lambda loss, theta: textbook(loss, theta, lr, decay, **extra))
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=2e-4)
    assert run.moved > 0.05
    assert run.off < 1e-6


def test_estimate_is_unbiased() -> None:
    """E[g z] = gradient of a smooth loss, up to O(eps^2): here a cubic, so there is a remainder.

    Sampling error of the mean of N products g z_i in dimension d: sqrt((d + 1) / N) |gradient|.
    """
    d, n = 20, 4000
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(d, dtype=torch.float32))
    a, c = torch.randn(d).double(), torch.randn(d).double()

    def loss() -> Tensor:
        x = w.double()
        return (a * x).sum() + (c * x**2).sum() / 2 + 0.1 * (x**3).sum()

    exact = a + c * w.detach().double() + 0.3 * w.detach().double() ** 2
    opt = zo_fused.MeZO([w], lr=0.0, eps=1e-3, seed=5)
    estimate = torch.zeros(d, dtype=torch.float64)
    for step in range(n):
        opt.step(loss)
        z = normal(d, derive_key(5, Purpose.DENSE, step), 0).double()
        estimate += opt.projected_grad.double() * z / n
    sigma = math.sqrt((d + 1) / n / d) * exact.norm()  # of one component
    assert ((estimate - exact).abs() < 4.5 * sigma).all()
    assert (estimate - exact).norm() < 1.5 * sigma * math.sqrt(d)


@pytest.mark.parametrize(
    ("method", "lr", "options"),
    [
        (zo_fused.MeZO, 1e-2, {}),
        (zo_fused.LOZO, 3e-3, {"rank": 2, "interval": 10}),
        (zo_fused.LOZO, 3e-3, {"rank": 2, "interval": 10, "momentum": 0.9}),
    ],
)
def test_loss_falls_on_a_quadratic(method, lr: float, options: dict) -> None:  # type: ignore[no-untyped-def, type-arg]
    torch.manual_seed(0)
    w, target = nn.Parameter(torch.zeros(8, 6)), torch.randn(8, 6)
    opt = method([w], lr=lr, eps=1e-3, **options)
    first = ((w - target) ** 2).sum().item()
    for _ in range(600):
        opt.step(lambda: ((w - target) ** 2).sum())
    # E[loss] falls by 1 - 2 lr * 2 + O(lr^2 d) a step.
    assert ((w - target) ** 2).sum().item() < 0.05 * first
