"""SubZero and SubZero+ against float64 textbooks, written from the papers, and their traps."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from support.equality import in_memory
from support.textbook import EPS, SEED, STEPS, dense, drawn, follow, model_and_tokens
from torch import Tensor, nn

import zo_fused
from zo_fused.noise import Purpose

RANK, INTERVAL = 3, 20


def haar(name: str, shape: tuple[int, int], purpose: Purpose, window: int) -> Tensor:
    """Q of LAPACK with the signs that make R's diagonal positive."""
    q, r = np.linalg.qr(drawn(name, shape, purpose, window).numpy())
    return torch.from_numpy(q * np.sign(np.diag(r)))


def basis(name: str, w: Tensor, step: int, rank: int, interval: int) -> tuple[Tensor, Tensor]:
    """s U and V."""
    m, n = w.shape
    r = min(rank, m, n)
    u = haar(name, (m, r), Purpose.LEFT, step // interval)
    return math.sqrt(m * n) / r * u, haar(name, (n, r), Purpose.V, step // interval)


def core(name: str, w: Tensor, step: int, query: int, rank: int) -> Tensor:
    """Z of a matrix; all of z otherwise."""
    if w.dim() < 2:
        return dense(name, w, step, query)
    r = min(rank, *w.shape)
    return drawn(name, (r, r), Purpose.CORE, step, query)


def textbook(
    loss: Any, theta: dict[str, Tensor], lr: float, decay: float, kw: dict[str, Any]
) -> list[float]:
    """Algorithm 1 of SubZero; with moments, Adam on the mean of g Z, begun again each window."""
    rank, interval = kw["rank"], kw["interval"]
    queries, one_sided = kw.get("queries", 1), kw.get("one_sided", False)
    betas, grads = (0.9, 0.999), []
    moments: dict[str, tuple[Tensor, Tensor, int]] = {}
    for step in range(STEPS):
        bases = {k: basis(k, w, step, rank, interval) for k, w in theta.items() if w.dim() == 2}

        def lifted(k: str, core: Tensor, bases: Any = bases) -> Tensor:
            return bases[k][0] @ core @ bases[k][1].T if k in bases else core

        mean = dict.fromkeys(theta, 0.0)
        for query in range(queries):
            cores = {k: core(k, w, step, query, rank) for k, w in theta.items()}
            z = {k: lifted(k, c) for k, c in cores.items()}
            plus = loss({k: w + EPS * z[k] for k, w in theta.items()})
            away = 0 if one_sided else -EPS
            g = float(plus - loss({k: w + away * z[k] for k, w in theta.items()})) / (EPS - away)
            grads.append(g)
            mean = {k: mean[k] + g * c / queries for k, c in cores.items()}
        for k, w in theta.items():
            estimate = mean[k]
            if kw.get("moments"):
                begins = k not in moments or (w.dim() == 2 and step % interval == 0)
                m, v, t = (0.0, 0.0, 0) if begins else moments[k]
                m = betas[0] * m + (1 - betas[0]) * estimate
                v = betas[1] * v + (1 - betas[1]) * estimate**2
                moments[k] = m, v, t + 1
                m_hat, v_hat = m / (1 - betas[0] ** (t + 1)), v / (1 - betas[1] ** (t + 1))
                estimate = m_hat / (v_hat.sqrt() + 1e-8)
            theta[k] = w - lr * (lifted(k, estimate) + decay * w)
    return grads


BASE = {"rank": RANK, "interval": INTERVAL}
CASES: dict[str, dict[str, Any]] = {
    "SubZero": {"lr": 3e-4},
    "decay, queries": {"lr": 3e-4, "weight_decay": 0.5, "queries": 2},
    "deferred": {"lr": 3e-4, "deferred": True},
    "one-sided, deferred, queries": {
        "lr": 3e-4,
        "deferred": True,
        "one_sided": True,
        "queries": 3,
    },
    "more columns than matrices have": {"lr": 3e-4, "rank": 100, "interval": 7},
    "SubZero+": {"lr": 1e-3, "moments": "adam", "queries": 3, "one_sided": True},
    "SubZero+, two-sided, decay": {"lr": 1e-3, "moments": "adam", "weight_decay": 0.5},
}


@pytest.mark.parametrize("case", list(CASES))
def test_fifty_steps_follow_the_textbook(case: str) -> None:
    """Tolerances as in test_textbook.py: weights are rounded a few times a step, to 2^-24 of their
    size, which enters g / (2 eps). Q, rounded to float32, is off by as little. Adam divides by
    sqrt(v), which no rounding moves by more than its own share of g: a few 2^-24 / eps = 1e-5 of
    |g| about 1 at one-sided estimates of lr = 1e-3."""
    kw = {**BASE, **CASES[case]}
    run = follow(
        lambda model: zo_fused.SubZero(model.named_parameters(), eps=EPS, seed=SEED, **kw),
        lambda loss, theta: textbook(loss, theta, kw["lr"], kw.get("weight_decay", 0.0), kw),
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=1e-3)
    moved, off = run.largest
    assert moved > 0.01
    assert off < 2e-5


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"weight_decay": 0.5, "queries": 2},
        {"paired": True},
        {"one_sided": True, "queries": 2},
        {"moments": "adam", "one_sided": True, "queries": 2, "lr": 1e-3},
        {"interval": 1},
    ],
    ids=str,
)
def test_beside_the_weights_as_in_place(kw: dict[str, Any]) -> None:
    """Losses in float32 carry 2^-22, so g differs by 2^-22 / 0.01 = 2.4e-5 (see
    tests/directions/test_factored.py), and a weight after 30 steps of lr = 3e-4 and |z| < 20 by
    less than sqrt(30) 3e-4 2.4e-5 20 = 8e-7. Adam, whose step is lr whatever the size of g, makes
    1e-3 (2.4e-5 / |g|) of it where an estimate is near zero."""
    one, tokens = model_and_tokens()
    two = copy.deepcopy(one)
    ends = []
    for model, mode in ((one, "inplace"), (two, "factored")):
        own = {k: v for k, v in kw.items() if k != "paired" or mode == "factored"}
        own = {**BASE, "lr": 3e-4, "interval": 7, **own}
        opt = zo_fused.SubZero(model, eps=EPS, seed=SEED, mode=mode, **own)
        for _ in range(30):
            opt.step(lambda model=model: model(tokens))
        if mode == "factored":  # all of them
            assert not opt.weights.groups.shared("in_place")
        opt.flush()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in model_and_tokens()[0].parameters()])
    assert float((ends[0] - start).abs().max()) > 0.01
    torch.testing.assert_close(*ends, rtol=0, atol=2e-4 if "moments" in kw else 3e-5)


def test_the_core_alone_is_kept() -> None:
    """Within a window no matrix is written, and what is beside one is (rank, rank)."""
    model, tokens = model_and_tokens()
    matrices = [nn.ParameterList([p]) for p in model.parameters() if p.dim() == 2]
    before = list(map(in_memory, matrices))
    opt = zo_fused.SubZero(model, lr=1e-2, rank=RANK, interval=100, mode="factored")
    for _ in range(5):
        opt.step(lambda: model(tokens))
    bucket = next(bucket for bucket in opt.weights.buckets if bucket.beside)
    assert {tuple(x.shape) for x in opt.direction._beside(bucket).xs} == {(RANK, RANK)}
    assert all(map(torch.equal, before, map(in_memory, matrices)))
    opt.flush()
    assert not any(map(torch.equal, before, map(in_memory, matrices)))


def test_elements_of_z_have_variance_one() -> None:
    """s = sqrt(m n) / r: over 400 steps of a (12, 20) matrix, which has 240 elements. U and V of a
    window make elements of one z dependent, so windows are one step long. Their fourth moment is
    below 10, so the mean of squares has a standard deviation below sqrt(9 / 400 / 12)."""
    w = nn.Parameter(torch.zeros(12, 20))
    opt = zo_fused.SubZero([w], lr=0.0, eps=1.0, rank=4, interval=1)
    squares = 0.0
    for _ in range(400):
        opt.perturb(+1)
        squares += float(w.data.double().square().mean()) / 400
        opt.step(loss_plus=0.0, loss_minus=0.0)
    assert abs(squares - 1) < 5 * math.sqrt(9 / 400 / 12)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (1, 7), (3, 3)])
def test_a_rank_that_a_matrix_does_not_have_is_clipped(shape: tuple[int, int]) -> None:
    w = nn.Parameter(torch.zeros(shape))
    opt = zo_fused.SubZero([w], lr=0.0, eps=1.0, rank=48)
    opt.perturb(+1)
    z = w.data.double().clone()
    opt.flush()
    assert np.linalg.matrix_rank(z.numpy()) == min(shape)
    assert 0.05 < float(z.square().mean()) < 8  # s has the clipped rank, too


def test_a_new_window_has_a_new_space_and_a_new_beginning() -> None:
    """The subspace stays for `interval` steps; Adam's moments begin again with the next."""
    torch.manual_seed(0)
    w, bias = nn.Parameter(torch.zeros(9, 11)), nn.Parameter(torch.zeros(4))
    target = torch.randn(9, 11)
    opt = zo_fused.SubZero([w, bias], lr=1e-2, rank=2, interval=3, moments="adam")

    def loss() -> Tensor:
        return ((w - target) ** 2).sum() + ((bias - 1) ** 2).sum()

    ranks, counts = [], []
    before = w.detach().clone()
    for _ in range(6):
        opt.step(loss)
        counts.append((int(opt.state[w]["step"]), int(opt.state[bias]["step"])))
        moved = (w.detach() - before).double().numpy()
        ranks.append(np.linalg.matrix_rank(moved, tol=1e-5))
    assert counts == [(1, 1), (2, 2), (3, 3), (1, 4), (2, 5), (3, 6)]
    assert max(ranks[:3]) == 2
    assert ranks[5] == 4
    assert opt.state[w]["core_exp_avg"].shape == (2, 2)


def test_the_mode_that_is_chosen() -> None:
    model, _ = model_and_tokens()

    def chosen(params: Any, **kw: Any) -> str:
        return "factored" if opt_beside(zo_fused.SubZero(params, **kw)) else "inplace"

    def opt_beside(opt: Any) -> bool:
        return type(opt.direction).__name__ == "BesideSubspace"

    assert chosen(model) == "factored"
    assert chosen(model, rank=16) == "inplace"
    assert chosen(model.named_parameters()) == "inplace"
    assert chosen(model.named_parameters(), module=model) == "factored"
    assert chosen(model, deferred=True) == "inplace"
    assert chosen(model, mode="inplace") == "inplace"


@pytest.mark.parametrize(
    ("kw", "error"),
    [
        ({"moments": "momentum"}, "moments"),
        ({"rank": 0}, "rank"),
        ({"paired": True, "mode": "inplace"}, "paired needs"),
        ({"paired": True, "mode": "factored", "one_sided": True}, "only one of them"),
        ({"mode": "factored", "deferred": True}, "deferred is for"),
    ],
)
def test_what_does_not_go_together_is_refused(kw: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.SubZero(model_and_tokens()[0], **kw)
