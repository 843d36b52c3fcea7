"""ZO-Muon: the matrix sign, and 50 steps of a float64 textbook written from the paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.models import loss_of, network
from support.textbook import EPS, SEED, STEPS, Weights, dense, drawn, follow
from torch import Tensor, nn

import zo_fused
from zo_fused.noise import Purpose
from zo_fused.rules.muon import inverse_roots

Array = np.ndarray[Any, Any]


def newton_schulz(m: Array) -> Array:
    """As Muon has it, of the matrix itself (fewer rows than columns)."""
    x = m / np.linalg.norm(m)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


# ---- the matrix sign ----------------------------------------------------------------------------


def msign(m: Tensor) -> Tensor:
    return inverse_roots(m @ m.T) @ m


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_the_sign_by_small_matrices_is_that_of_the_usual_iteration(scale: float) -> None:
    torch.manual_seed(0)
    m = torch.randn(8, 50).double() * torch.logspace(0, -1, 8).double()[:, None] * scale
    got = msign(m)
    # products of r x r matrices are rounded to 2^-50 of their largest entries, and the smallest
    # eigenvalue of the Gram matrix is 1e-3 of its trace
    torch.testing.assert_close(got, torch.from_numpy(newton_schulz(m.numpy())), rtol=0, atol=1e-8)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    inside = u.T @ got @ vh.T  # diagonal: singular values in 0.7 to 1.2
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-8)
    assert ((inside.diagonal() > 0.65) & (inside.diagonal() < 1.25)).all()


def test_a_batch_is_many_matrices() -> None:
    grams = torch.stack([x @ x.T for x in torch.randn(3, 5, 20).double().unbind()])
    each = torch.stack([inverse_roots(gram) for gram in grams])
    assert torch.equal(inverse_roots(grams), each)


def test_nothing_has_no_sign() -> None:
    assert not msign(torch.zeros(4, 9).double()).any()


def test_with_one_query_only_the_sign_of_g_is_left() -> None:
    """msign(c Psi) = sign(c) msign(Psi): the size of the step says nothing of c."""
    moves = []
    for factor in (1.0, 64.0, -64.0):  # powers of two: the same bits
        model = network()
        start = [p.detach().clone() for p in model.parameters()]
        opt = zo_fused.ZOMuon(
            model, rank=2, queries=1, one_sided=False, lr=1e-2, vector_lr=0.0, seed=3
        )
        losses = iter([1.0 + factor * 2.0**-10, 1.0])
        opt.step(lambda losses=losses: next(losses))  # type: ignore[misc]
        moves.append([p.detach() - q for p, q in zip(model.parameters(), start, strict=True)])
    for one, large, negative in zip(*moves, strict=True):
        # perturbing and restoring leaves rounding of weights below 1 behind, three times
        torch.testing.assert_close(large, one, rtol=0, atol=3 * 2.0**-24)
        torch.testing.assert_close(negative, -one, rtol=0, atol=6 * 2.0**-24)
    assert all(float(move.norm()) > 1e-2 for move in moves[0][::2])
    # P msign: singular values between 0.7 and 1.2, times lr
    values = torch.linalg.svdvals(moves[0][0])[:2] / 1e-2
    assert ((values > 0.65) & (values < 1.25)).all()


# ---- fifty steps --------------------------------------------------------------------------------

RANK, INTERVAL, QUERIES = 4, 17, 3


def factor(name: str, rows: int, purpose: Purpose, step: int, query: int = 0) -> Array:
    return drawn(name, (rows, RANK), purpose, step, query).numpy()


def haar(name: str, rows: int, window: int) -> Array:
    """Q of LAPACK, with the signs that make it uniform over orthonormal matrices."""
    q, r = np.linalg.qr(factor(name, rows, Purpose.LEFT, window))
    return q * np.sign(np.diag(r))


def positive_qr(y: Array) -> Array:
    q, r = np.linalg.qr(y)
    return q * np.sign(np.diag(r))


def textbook(
    loss: Any,
    theta: Weights,
    lr: float,
    vector_lr: float,
    decay: float,
    beta: float,
    sign: bool | str,
) -> list[float]:
    grads: list[float] = []
    right: dict[str, Array] = {}
    average: dict[str, Array] = {}
    for t in range(STEPS):
        p = {k: haar(k, len(w), t // INTERVAL) for k, w in theta.items() if w.dim() == 2}
        if t and t % INTERVAL == 0:
            for k in p:
                average[k] = p[k].T @ haar(k, len(theta[k]), t // INTERVAL - 1) @ average[k]
        base = loss(theta)
        mean: dict[str, Array] = {}
        for query in range(QUERIES):
            psi = {
                k: factor(k, w.shape[1], Purpose.RIGHT, t, query).T
                if k in p
                else dense(k, w, t, query).numpy()
                for k, w in theta.items()
            }
            z = {k: torch.from_numpy(p[k] @ x if k in p else x) for k, x in psi.items()}
            c = float(loss({k: w + EPS * z[k] for k, w in theta.items()}) - base) / EPS
            grads.append(c)
            for k, x in psi.items():
                mean[k] = mean.get(k, 0.0) + c / QUERIES * x
        for k, w in theta.items():
            average[k] = beta * average.get(k, 0.0) + (1 - beta) * mean[k]
            step = average[k]
            if k in p and sign == "power":
                right[k] = positive_qr(step.T @ (step @ right.get(k, step.T)))
                along = step @ right[k]
                step = (along / np.linalg.norm(along, axis=0)) @ right[k].T
            elif k in p and sign:
                step = newton_schulz(step)
            if k in p:
                step = p[k] @ step
            rate = lr if k in p else vector_lr
            theta[k] = w - rate * (torch.from_numpy(step) + decay * w)
    return grads


@pytest.mark.parametrize(
    ("sign", "momentum", "kw"),
    [
        (True, 0.0, {}),
        (True, 0.9, {"deferred": True}),
        (False, 0.9, {}),
        (True, 0.9, {"mode": "factored", "rounding": "nearest"}),
        ("power", 0.9, {}),
    ],
)
def test_fifty_float32_steps_follow_the_float64_textbook(
    sign: bool | str, momentum: float, kw: dict[str, Any]
) -> None:
    """Tolerances as in test_textbook.py for what weights' rounding makes of a projected gradient,
    1e-4 (one-sided, so relative to eps: 2e-4). The sign divides M by its size, which is about
    1 / 10 in norm here, so a step is off by a few thousandths of itself at the worst.
    """
    lr, vector_lr, decay = (3e-3 if sign else 1e-2), 3e-4, 0.1
    run = follow(
        lambda model: zo_fused.ZOMuon(
            model.named_parameters(),
            lr=lr,
            rank=RANK,
            interval=INTERVAL,
            queries=QUERIES,
            momentum=momentum,
            sign=sign,
            vector_lr=vector_lr,
            weight_decay=decay,
            eps=EPS,
            seed=SEED,
            module=model,
            **kw,
        ),
        lambda loss, theta: textbook(loss, theta, lr, vector_lr, decay, momentum, sign),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=2e-3)
    assert run.moved > 0.05
    assert run.distance < 3e-3 * run.moved


# ---- the rest -----------------------------------------------------------------------------------


def test_vectors_have_their_own_rate() -> None:
    """In the released code it is a constant; at a sign's rate they diverge."""
    opt = zo_fused.ZOMuon(network())
    assert [group["lr"] for group in opt.param_groups] == [1e-2, 1e-6]
    assert len(opt.positions()) == 5  # four queries and theta


def test_the_rank_is_no_more_than_a_side() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 40))
    opt = zo_fused.ZOMuon(model, rank=64, lr=1e-3)
    for _ in range(3):
        opt.step(lambda: model(torch.ones(2, 6)).square().mean())
    factors = opt.direction.factors(opt.weights.buckets[0])  # type: ignore[attr-defined]
    # matrices come first: (3, 6) and (40, 3)
    assert factors.u_shapes[:2] == [(6, 3), (3, 3)]
    assert factors.v_shapes[:2] == [(3, 3), (40, 3)]
    assert opt.skipped_steps == 0


def test_the_state_is_that_of_momentum_alone() -> None:
    for momentum in (0.0, 0.9):
        model = network()
        opt = zo_fused.ZOMuon(model, rank=2, momentum=momentum)
        opt.step(loss_of(model))
        kept = {name for state in opt.state.values() for name in state}
        assert kept == ({"momentum_factor", "momentum_window"} if momentum else set())


def test_momentum_needs_all_steps() -> None:
    with pytest.raises(ValueError, match=r"a block would miss .*, or simultaneous blocks"):
        zo_fused.ZOMuon(network(), momentum=0.9, block_order="sequential")
