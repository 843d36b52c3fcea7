"""TeZO against a float64 textbook, written from the paper, and its traps."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.textbook import EPS, SEED, STEPS, dense, drawn, follow, model_and_tokens
from torch import Tensor, nn

import zo_fused
from zo_fused.directions import panels
from zo_fused.noise import Purpose

RANK = 3


def textbook(
    loss: Any, theta: dict[str, Tensor], lr: float, decay: float, kw: dict[str, Any]
) -> list[float]:
    """``z = sum_i tau_i u_i v_i^T``, kappa from all z jointly; -m averages kappa tau, -Adam its
    square, too, with Adam's corrections, which begin with a window."""
    beta, interval = kw.get("momentum", 0.0), kw.get("interval") or STEPS
    s = RANK**-0.5 if kw.get("scale") else 1.0
    queries, grads = kw.get("queries", 1), []
    average: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    beta1, beta2 = 0.9, 0.999
    for step in range(STEPS):
        window = step // interval
        mean = {k: torch.zeros(()).double() for k in theta}

        def lifted(k: str, tau: Tensor, window: int = window) -> Tensor:
            w = theta[k]
            if w.dim() < 2:
                return tau
            u = drawn(k, (w.shape[0], RANK), Purpose.LEFT, window)
            v = drawn(k, (w.shape[1], RANK), Purpose.V, window)
            return s * torch.einsum("r,mr,nr->mn", tau, u, v)

        def of_squares(k: str, v: Tensor, window: int = window) -> Tensor:
            """``sum_i v_i (u_i v_i^T)^2``, a column after the other."""
            w = theta[k]
            if w.dim() < 2:
                return v
            left = drawn(k, (w.shape[0], RANK), Purpose.LEFT, window)
            right = drawn(k, (w.shape[1], RANK), Purpose.V, window)
            return sum(v[i] * (s * torch.outer(left[:, i], right[:, i])) ** 2 for i in range(RANK))

        for query in range(queries):
            taus = {
                k: drawn(k, (RANK,), Purpose.CORE, step, query)
                if w.dim() == 2
                else dense(k, w, step, query)
                for k, w in theta.items()
            }
            z = {k: lifted(k, tau) for k, tau in taus.items()}
            plus = loss({k: w + EPS * z[k] for k, w in theta.items()})
            kappa = float(plus - loss({k: w - EPS * z[k] for k, w in theta.items()})) / (2 * EPS)
            grads.append(kappa)
            mean = {k: mean[k] + kappa * tau / queries for k, tau in taus.items()}
        for k, w in theta.items():
            if k in average and w.dim() == 2 and step % interval == 0:
                average[k] = torch.zeros_like(average[k])
                squares.pop(k, None)
            if kw.get("moments"):
                average[k] = beta1 * average.get(k, torch.zeros(())) + (1 - beta1) * mean[k]
                squares[k] = beta2 * squares.get(k, torch.zeros(())) + (1 - beta2) * mean[k] ** 2
                t = step % interval + 1 if w.dim() == 2 else step + 1
                m, v = average[k] / (1 - beta1**t), squares[k] / (1 - beta2**t)
                quotient = lifted(k, m) / (of_squares(k, v).sqrt() + kw["adam_eps"])
                theta[k] = w - lr * (quotient + decay * w)
                continue
            average[k] = beta * average.get(k, torch.zeros(())) + (1 - beta) * mean[k]
            theta[k] = w - lr * (lifted(k, average[k]) + decay * w)
    return grads


CASES: dict[str, dict[str, Any]] = {
    "TeZO": {"lr": 1e-4},
    "decay, queries, scale": {"lr": 3e-4, "weight_decay": 0.5, "queries": 2, "scale": True},
    "windows, deferred": {"lr": 1e-4, "interval": 7, "deferred": True},
    "TeZO-m": {"lr": 1e-4, "momentum": 0.9},
    "TeZO-Adam": {"lr": 1e-3, "moments": "adam", "adam_eps": 1e-8, "queries": 2},
    "TeZO-Adam, windows, decay, deferred": {
        "lr": 1e-3,
        "moments": "adam",
        "adam_eps": 0.1,
        "interval": 12,
        "scale": True,
        "weight_decay": 0.5,
        "deferred": True,
    },
    "TeZO-m, windows": {"lr": 1e-4, "momentum": 0.5, "interval": 20},
}


@pytest.mark.parametrize("case", list(CASES))
def test_fifty_steps_follow_the_textbook(case: str) -> None:
    """Tolerances as in test_textbook.py: rounding of weights, 2^-24 a sweep, which enters g divided
    by 2 eps, with the gradient along a z three times as long as there."""
    kw = CASES[case]
    run = follow(
        lambda model: zo_fused.TeZO(model.named_parameters(), rank=RANK, eps=EPS, seed=SEED, **kw),
        lambda loss, theta: textbook(loss, theta, kw["lr"], kw.get("weight_decay", 0.0), kw),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=1e-3)
    moved, off = run.largest
    assert moved > 0.01
    assert off < 2e-5


@pytest.mark.parametrize("kw", [{}, {"momentum": 0.9}, {"interval": 7}], ids=str)
def test_beside_the_weights_as_in_place(kw: dict[str, Any]) -> None:
    """As in test_subzero.py. Without an interval, nothing is written before the end."""
    one, tokens = model_and_tokens()
    two = copy.deepcopy(one)
    ends = []
    for model, mode in ((one, "inplace"), (two, "factored")):
        opt = zo_fused.TeZO(model, rank=RANK, lr=1e-4, eps=EPS, seed=SEED, mode=mode, **kw)
        settled = 0
        for _ in range(30):
            opt.step(lambda model=model: model(tokens))
            beside = [b for b in opt.weights.buckets if b.beside]
            settled += not any(map(opt.weights.beside.pending, beside))
        if mode == "factored":
            assert settled == (4 if "interval" in kw else 0)
            assert not opt.weights.groups.shared("in_place")
        opt.flush()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in model_and_tokens()[0].parameters()])
    assert float((ends[0] - start).abs().max()) > 0.01
    torch.testing.assert_close(*ends, rtol=0, atol=3e-5)


def change_of(steps: int, **kw: Any) -> np.ndarray:
    torch.manual_seed(0)
    w, target = nn.Parameter(torch.zeros(12, 10)), torch.randn(12, 10)
    opt = zo_fused.TeZO([w], lr=1e-3, rank=2, **kw)
    for _ in range(steps):
        opt.step(lambda: ((w - target) ** 2).sum())
    return w.detach().double().numpy()


def test_a_run_has_an_update_of_the_rank_that_was_given() -> None:
    """All of it: U and V don't change. With an interval they do."""
    assert np.linalg.matrix_rank(change_of(40), tol=1e-5) == 2
    assert np.linalg.matrix_rank(change_of(40, interval=10), tol=1e-5) == 8


def test_scale_makes_the_variance_of_elements_one() -> None:
    """Over 300 windows of one step, elements of z have mean square 1 and, as sums of 8 products of
    three normals, a fourth moment of at most 27: with 300 independent matrices, 8 directions each,
    a standard deviation below sqrt(27 / 300 / 8)."""
    w = nn.Parameter(torch.zeros(12, 20))
    opt = zo_fused.TeZO([w], lr=0.0, eps=1.0, rank=8, interval=1, scale=True)
    squares = 0.0
    for _ in range(300):
        opt.perturb(+1)
        squares += float(w.data.double().square().mean()) / 300
        opt.step(loss_plus=0.0, loss_minus=0.0)
    assert abs(squares - 1) < 5 * (27 / 300 / 8) ** 0.5


def test_the_state_is_of_the_rank() -> None:
    w, bias = nn.Parameter(torch.zeros(12, 20)), nn.Parameter(torch.zeros(5))
    opt = zo_fused.TeZO([w, bias], rank=4, momentum=0.9)
    opt.step(lambda: w.sum() + bias.sum())
    assert opt.state[w]["momentum_factor"].shape == (1, 4)
    assert opt.state[bias]["momentum_factor"].numel() == 5
    opt = zo_fused.TeZO([w, bias], rank=4, moments="adam")
    opt.step(lambda: w.sum() + bias.sum())
    for name in ("core_exp_avg", "core_exp_avg_sq"):
        assert opt.state[w][name].shape == (1, 4)
        assert opt.state[bias][name].numel() == 5


def test_with_one_column_it_is_adam() -> None:
    """There are no products of two columns that the second moment could leave out."""
    torch.manual_seed(0)
    w, target = nn.Parameter(torch.randn(9, 7)), torch.randn(9, 7)
    start = w.detach().double().clone()
    twin = nn.Parameter(start.clone())
    opt = zo_fused.TeZO([("w", w)], lr=1e-2, rank=1, moments="adam", adam_eps=1e-3, seed=SEED)
    adam = torch.optim.Adam([twin], lr=1e-2, eps=1e-3)
    u, v = drawn("w", (9, 1), Purpose.LEFT, 0), drawn("w", (7, 1), Purpose.V, 0)
    for step in range(20):
        opt.step(lambda: ((w.double() - target) ** 2).sum())
        tau = float(drawn("w", (1,), Purpose.CORE, step))
        twin.grad = float(opt.projected_grad) * tau * (u @ v.T)
        adam.step()
    end = twin.detach()
    # what float32 weights make of g / sqrt(g^2) in 20 steps of 1e-2
    assert float((end - w.detach()).abs().max()) < 2e-5 < 1e-2 < float((end - start).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_adam_do_not_depend_on_the_scratch_memory(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for elements in (panels.WORKSPACE // 4, 40):
        monkeypatch.setattr(panels, "WORKSPACE", 4 * elements)
        model, tokens = model_and_tokens()
        model.to(dtype)
        kw = {"moments": "adam", "interval": 3, "deferred": True, "rounding": "stochastic"}
        opt = zo_fused.TeZO(model, rank=RANK, lr=1e-3, **kw)
        for _ in range(5):
            opt.step(lambda model=model, tokens=tokens: model(tokens))
        lots = len(list(panels.panels_of(opt.weights.buckets[0]).lots()))
        assert (lots > 50) == (elements == 40)
        opt.flush()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("kw", "error"),
    [
        ({"interval": 0}, "interval"),
        ({"paired": True}, "paired needs"),
        ({"moments": "adam", "momentum": 0.9}, "a momentum of its own"),
        ({"moments": "adam", "mode": "factored"}, "full rank"),
        ({"mode": "factored", "block_order": "sequential"}, "block_order is for"),
    ],
)
def test_what_does_not_go_together_is_refused(kw: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.TeZO(model_and_tokens()[0], **kw)
