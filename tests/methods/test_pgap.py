"""P-GAP: its space, its alignment, and 50 steps of a float64 textbook written from the paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import loss_of, network, same, snapshot
from support.textbook import EPS, SEED, STEPS, Weights, dense, drawn, follow
from torch import Tensor, nn

import zo_fused
from zo_fused.directions import gradient_space
from zo_fused.directions.aligned import Aligned, AlignedFactors
from zo_fused.directions.gradient_space import Estimate, space_of
from zo_fused.methods.vectors_apart import vectors_apart
from zo_fused.noise import Purpose, derive_key, parameter_id
from zo_fused.step.optimizer import ZerothOrderOptimizer

CPU = torch.device("cpu")


# ---- the space ----------------------------------------------------------------------------------


def estimate_of(m: int, n: int, grads: list[float]) -> Estimate:
    return Estimate((m, n), parameter_id("w"), SEED, 7, grads, CPU)


def whole(m: int, n: int, grads: list[float]) -> Tensor:
    """G^ over the largest c_j, by one sweep over all of it."""
    w = torch.zeros(m, n)
    for probe, c in enumerate(grads):
        key = derive_key(SEED, Purpose.PROBE, 7, probe)
        zo_fused.perturb_([w], key, c / max(map(abs, grads)), ids=[parameter_id("w")])
    return w


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_panels_are_the_bits_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, grads = 33, 29, [0.5, -2.0, 1e-3]  # rows begin in the middle of counters
    monkeypatch.setattr(gradient_space, "WORKSPACE", 12 * n * rows)
    panels = [panel.clone() for _, panel in estimate_of(m, n, grads).panels()]
    assert len(panels) == math.ceil(m / rows)
    assert torch.equal(torch.cat(panels), whole(m, n, grads))


def test_the_workspace_has_a_bound() -> None:
    for m, n in ((1 << 18, 4096), (4096, 1 << 18)):  # of 4 GB
        _, panel = next(iter(estimate_of(m, n, [1.0]).panels()))
        assert panel.numel() * 12 <= 64 << 20  # in float32 and float64


@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60), (5, 60), (60, 5), (5, 5)])
def test_u_and_v_are_orthonormal_and_s_is_the_core(m: int, n: int) -> None:
    grads = [0.3, -1.0, 0.8]
    found = space_of(estimate_of(m, n, grads), torch.randn(n, 5))
    exact = whole(m, n, grads)
    for basis in (found.u, found.v):
        # float32 rounds each entry by 2^-25 at most, and so sums of products of them
        torch.testing.assert_close(basis.T @ basis, torch.eye(5), rtol=0, atol=1e-6)
    core = found.u.T.double() @ exact.double() @ found.v.double()
    # products with G^ are off by 2^-20 of the largest entry, m n of them as a random walk
    torch.testing.assert_close(found.s.double() * found.length, core, rtol=0, atol=1e-4)
    assert float(found.s.norm()) == pytest.approx(1, abs=1e-6)


def with_gap(m: int, n: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Panels are those of a matrix whose singular values fall 1000 fold after `rank`."""
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.standard_normal((m, n)))
    v, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = np.where(np.arange(n) < rank, 5.0 - np.arange(n) / n, 5e-3)
    matrix = torch.from_numpy(u * values @ v.T).float()
    monkeypatch.setattr(
        Estimate,
        "panels",
        lambda self: ((slice(i, i + 16), matrix[i : i + 16]) for i in range(0, m, 16)),
    )
    return matrix


def test_the_space_is_that_of_numpys_svd_where_there_is_a_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m, n, rank = 64, 48, 6
    matrix = with_gap(m, n, rank, monkeypatch)
    found = space_of(estimate_of(m, n, [1.0]), torch.randn(n, rank))
    u, values, vt = np.linalg.svd(matrix.double().numpy())
    # the ratio 1e-3 to the power 5 of three products and two iterations; then float32's rounding
    for got, exact in ((found.u, u[:, :rank]), (found.v, vt[:rank].T)):
        between = np.linalg.svd(got.double().numpy().T @ exact)[1]
        assert np.allclose(between, 1, atol=1e-6)  # cosines of the angles between the spaces
    got_values = np.linalg.svd(found.s.double().numpy() * found.length)[1]
    assert np.allclose(got_values, values[:rank], rtol=1e-5)


def test_what_the_space_holds_of_a_flat_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pure noise: without a gap the range finder gets near the SVD's energy, not to it."""
    m, n, rank = 64, 48, 8
    found = space_of(estimate_of(m, n, [1.0, 0.5]), torch.randn(n, rank))
    values = np.linalg.svd(whole(m, n, [1.0, 0.5]).double().numpy())[1]
    held = found.length**2 / (values[:rank] ** 2).sum()
    assert 0.7 < held < 1 + 1e-6
    assert held > 2 * rank / n * (values**2).sum() / (values[:rank] ** 2).sum() / n  # random: less


# ---- the alignment ------------------------------------------------------------------------------


def aligned_cores(
    delta: float, align: str, steps: int, matrices: int = 2
) -> tuple[list[list[Tensor]], list[Tensor], list[float]]:
    """Z of every step and matrix, S / |S| and |S| of the matrices. Z0 is drawn by torch: it is how
    it is shaped that matters here."""
    params = [(f"w{i}", nn.Parameter(torch.zeros(12 + i, 9))) for i in range(matrices)]
    opt = zo_fused.PGAP(params, rank=2, delta=(delta, delta), align=align, seed=SEED)
    opt.weights.look()
    opt.weights.learn([0.7, -0.4, 0.2])
    factors = opt.direction.factors(opt.weights.buckets[0])  # type: ignore[attr-defined]
    assert isinstance(factors, AlignedFactors)
    factors.of(SEED, 0)
    torch.manual_seed(0)
    zs = []
    for step in range(steps):
        cores = list(torch.randn(matrices, 2, 2).unbind())
        factors.shape_cores(cores, SEED, step, 0)
        zs.append([core.double() for core in cores])
    return zs, [unit.double() for unit in factors._units], factors._lengths


@pytest.mark.parametrize("delta", [2.0, 1.0, 0.25, 0.0])
@pytest.mark.parametrize("align", ["matrix", "shared", "joint"])
def test_z_has_the_component_of_the_paper_along_s(align: str, delta: float) -> None:
    zs, units, lengths = aligned_cores(delta, align, 20)
    total = math.hypot(*lengths)
    signs = []
    for z in zs:
        along = [float((s * core).sum()) for s, core in zip(units, z, strict=True)]
        if align == "joint":
            along = [sum(a * b / total for a, b in zip(along, lengths, strict=True))]
        assert np.allclose(np.abs(along), math.sqrt(delta), atol=2e-6)
        signs.append(np.sign(along).tolist())
    if delta:
        assert {-1.0, 1.0} == {sign for of_step in signs for sign in of_step}
        alike = all(len(set(of_step)) == 1 for of_step in signs)
        assert alike == (align != "matrix")


@pytest.mark.parametrize("delta", [2.0, 0.5])
@pytest.mark.parametrize("align", ["matrix", "joint"])
def test_the_covariance_of_z(align: str, delta: float) -> None:
    """``I + (delta - 1) s s^T``: for every matrix, or for all of them together."""
    steps = 4000
    zs, units, lengths = aligned_cores(delta, align, steps)
    flat = torch.stack([torch.cat([core.flatten() for core in z]) for z in zs])
    total = math.hypot(*lengths)
    parts = [s.flatten() * (k / total) for s, k in zip(units, lengths, strict=True)]
    if align == "joint":
        s = torch.cat(parts)
        wanted = torch.eye(len(s)).double() + (delta - 1) * torch.outer(s, s)
    else:
        wanted = torch.block_diag(
            *(
                torch.eye(4).double() + (delta - 1) * torch.outer(u.flatten(), u.flatten())
                for u in units
            )
        )
    # the standard error of a product of two normals' mean is at most sqrt(2 / steps) max(1, delta)
    bound = 5 * math.sqrt(2 / steps) * max(1, delta)
    torch.testing.assert_close(flat.T @ flat / steps, wanted, rtol=0, atol=bound)


def test_lengths_along_other_eps_are_not_compared() -> None:
    model = network()
    ps = list(model.named_parameters())
    groups = [{"params": ps[:2]}, {"params": ps[2:], "eps": 0.1}]
    opt = zo_fused.PGAP(groups, lr=1e-3, rank=2, align="joint", delta=(1, 1))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'align="joint" needs one eps for all matrices, not'):
        opt.step(loss_of(model))
    assert same(before, snapshot(model))


@pytest.mark.parametrize(("cos", "delta"), [(1.0, 2.0), (1.0, 8.0), (0.3, 8.0), (0.0, 2.0)])
def test_the_gain_of_alignment(cos: float, delta: float) -> None:
    """Best decrease a step relative to unaligned directions in the same q dimensions, isotropic
    curvature: ``(1 + (delta - 1) cos^2) / (1 + (delta - 1) / q)`` with the angle between S and the
    gradient. So delta = 2, the paper's start, at most doubles what a query is worth, and where S
    tells nothing of the gradient it is worth less.

    Without alignment the decrease is 1 / (q + 2); the formula is that of large q, so the sample's
    own q-dimensional form, by exact moments of Gaussians, is what is compared to.
    """
    zs, units, _ = aligned_cores(delta, "matrix", 500, matrices=40)
    q, samples = 4, []
    for matrix, unit in enumerate(units):
        s = unit.flatten()
        across_s = torch.linalg.svd(s[None]).Vh[1:]
        basis = torch.cat([s[None], across_s])  # S first
        samples.append(torch.stack([core[matrix].flatten() for core in zs]) @ basis.T)
    z = torch.cat(samples)
    gradient = torch.tensor([cos, math.sqrt(1 - cos * cos), 0.0, 0.0]).double()
    c = z @ gradient
    measured = float((c * c).mean() ** 2 / (c * c * z.square().sum(1)).mean())
    # z = xi sqrt(delta) s + w, w normal in the other q - 1 dimensions
    along, across = delta * cos**2, 1 - cos**2
    second = along + across
    fourth = along * (delta + q - 1) + across * (delta + q + 1)
    assert measured == pytest.approx(second**2 / fourth, rel=0.05)
    large, share = 400, (1 + (delta - 1) * cos**2)
    limit = share**2 / (along * (delta + large - 1) + across * (delta + large + 1)) * large
    assert limit == pytest.approx(share / (1 + (delta - 1) / large), rel=0.01)
    if delta == 2.0:
        assert limit < 2.0


def test_delta_falls_over_the_run_and_counts_skipped_steps() -> None:
    model = network()
    opt = zo_fused.PGAP(model, rank=2, interval=5, probes=1, delta=(2.0, 0.5), total_steps=8)
    direction = opt.direction
    assert isinstance(direction, Aligned)
    seen = []
    for step in range(12):
        seen.append(direction.delta_of(opt.step_count))
        opt.step((lambda: math.nan) if step in (3, 4) else loss_of(model))
    assert opt.skipped_steps == 2
    assert seen == [2.0 - 1.5 * min(step, 8) / 8 for step in range(12)]


# ---- fifty steps --------------------------------------------------------------------------------

RANK, INTERVAL, PROBES, DELTA = 4, 17, 3, (2.0, 0.0)


def matrix(name: str, rows: int, columns: int, purpose: Purpose, step: int) -> np.ndarray[Any, Any]:
    return drawn(name, (rows, columns), purpose, step).numpy()


def positive_qr(y: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """QR with a positive diagonal of R, by LAPACK."""
    q, r = np.linalg.qr(y)
    signs = np.sign(np.diag(r))
    return q * signs, r * signs[:, None]


def textbook_space(name: str, g: np.ndarray[Any, Any], window: int) -> tuple[Any, Any, Any]:
    """U, S, V by a range finder with two power iterations."""
    v = matrix(name, g.shape[1], RANK, Purpose.V, window)
    for _ in range(3):
        u, _ = positive_qr(g @ v)
        v, r = positive_qr(g.T @ u)
    return u, r.T, v


def textbook(
    loss: Any, theta: Weights, lr: float, scale: bool, one_sided: bool
) -> tuple[list[float], list[float]]:
    """Projected gradients of steps and of probes."""
    grads, probes, spaces = [], [], {}
    for t in range(STEPS):
        if t % INTERVAL == 0:
            estimate = {k: torch.zeros_like(w) for k, w in theta.items()}
            for j in range(PROBES):
                z = {k: drawn(k, w.shape, Purpose.PROBE, t, j) for k, w in theta.items()}
                away, apart = (0.0, 1) if one_sided else (-1.0, 2)
                plus = loss({k: w + EPS * z[k] for k, w in theta.items()})
                minus = loss({k: w + away * EPS * z[k] for k, w in theta.items()})
                probes.append(float(plus - minus) / (apart * EPS))
                estimate = {k: e + probes[-1] / PROBES * z[k] for k, e in estimate.items()}
            spaces = {
                k: textbook_space(k, e.numpy(), t // INTERVAL)
                for k, e in estimate.items()
                if e.dim() == 2
            }
        delta = DELTA[0] + (DELTA[1] - DELTA[0]) * t / STEPS
        z = {}
        for k, w in theta.items():
            if w.dim() < 2:
                z[k] = dense(k, w, t)
                continue
            u, s, v = spaces[k]
            core = matrix(k, RANK, RANK, Purpose.CORE, t)
            xi = float(drawn(k, (1,), Purpose.SCALAR, t, transform="signs"))
            norm = np.linalg.norm(s)
            core = core - ((s * core).sum() - xi * math.sqrt(delta) * norm) / norm**2 * s
            size = math.sqrt(w.numel()) / RANK if scale else 1.0
            z[k] = torch.from_numpy(size * u @ core @ v.T)
        plus = loss({k: w + EPS * z[k] for k, w in theta.items()})
        minus = loss({k: w - EPS * z[k] for k, w in theta.items()})
        grads.append(float(plus - minus) / (2 * EPS))
        for k, w in theta.items():
            theta[k] = w - lr * grads[-1] * z[k]
    return grads, probes


@pytest.mark.parametrize(("scale", "one_sided"), [(True, False), (False, True)])
def test_fifty_float32_steps_follow_the_float64_textbook(scale: bool, one_sided: bool) -> None:
    """Tolerances as in test_textbook.py for what probes find: 1e-4 against c of about 1. The range
    finder is a smooth function of G^, three products of condition numbers near 10 after another,
    so U and V are off by 1e-3 at the worst, and g by as much of the gradient in their space.
    """
    lr = 3e-4 if scale else 3e-3
    probes: list[float] = []
    expected_probes: list[float] = []

    def paper(loss: Any, theta: Weights) -> list[float]:
        grads, of_probes = textbook(loss, theta, lr, scale, one_sided)
        expected_probes.extend(of_probes)
        return grads

    def after(opt: ZerothOrderOptimizer, step: int) -> None:
        if step % INTERVAL == 0:
            probes.extend(opt.state["probes"]["grads"])

    run = follow(
        lambda model: zo_fused.PGAP(
            model.named_parameters(),
            lr=lr,
            rank=RANK,
            interval=INTERVAL,
            probes=PROBES,
            delta=DELTA,
            total_steps=STEPS,
            scale=scale,
            probes_one_sided=one_sided,
            eps=EPS,
            seed=SEED,
        ),
        paper,
        after,
    )
    torch.testing.assert_close(
        torch.tensor(probes), torch.tensor(expected_probes), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(run.grads, run.expected, rtol=0, atol=1e-3)
    assert run.moved > 0.05
    assert run.distance < 1e-3 * run.moved


# ---- the rest -----------------------------------------------------------------------------------


def test_probes_that_find_nothing_leave_a_random_space() -> None:
    """A loss such as minus the accuracy may be the same everywhere."""
    model = network()
    opt = zo_fused.PGAP(model, lr=1e-2, rank=2, interval=2, probes=2, total_steps=9)
    calls = iter(range(100))
    for _ in range(4):
        opt.step(lambda: 0.0 if next(calls) % 8 < 4 else loss_of(model)())
    assert opt.skipped_steps == 0
    assert all(p.isfinite().all() for p in model.parameters())
    first = opt.state["probes"]["grads"]
    assert len(first) == 2


def test_the_space_is_made_again_from_the_state(tmp_path: Path) -> None:
    """A state has what probes found, and no space; a log, too."""
    one, two, base = network(), network(), network()
    options = {"lr": 1e-2, "rank": 2, "interval": 4, "probes": 3, "total_steps": 20, "scale": False}
    options |= {"vector_lr": 1e-4, "vector_eps": 1e-2}
    first = zo_fused.PGAP(one, **options)
    first.start_log(tmp_path / "log.jsonl")
    for _ in range(6):
        first.step(loss_of(one))
    second = zo_fused.PGAP(two, **options)
    state = first.state_dict()
    assert set(state["state"]) == {"probes"}
    two.load_state_dict(one.state_dict())
    second.load_state_dict(state)
    for _ in range(3):
        first.step(loss_of(one))
        second.step(loss_of(two))
    zo_fused.replay(base, tmp_path / "log.jsonl")
    for a, b, c in zip(one.parameters(), two.parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_vectors_may_have_a_rate_and_a_radius_of_their_own() -> None:
    model = network()
    opt = zo_fused.PGAP(model, total_steps=9, lr=1e-2, eps=0.1, vector_lr=1e-5, vector_eps=1e-3)
    kinds = [({p.dim() for p in g["params"]}, g["lr"], g["eps"]) for g in opt.param_groups]
    assert kinds == [({2}, 1e-2, 0.1), ({1}, 1e-5, 1e-3)]
    assert opt.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    again = vectors_apart(opt.param_groups, lr=1e-5)
    assert [len(group["params"]) for group in again] == [2, 2]
    assert vectors_apart(model, lr=None) is model


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "over total_steps, which must be given"),
        ({"delta": (1.0, -1.0)}, r"delta\[1\] must be a finite number >= 0"),
        ({"delta": (1.0,)}, "delta must be two numbers or None"),
        ({"delta": None, "align": "none"}, "align must be"),
        ({"delta": None, "probes": 0}, "probes must be"),
        ({"delta": None, "total_steps": 0}, "total_steps must be"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        zo_fused.PGAP(network(), **options)
    for name in ("deferred", "block_order"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            zo_fused.PGAP(network(), delta=None, **{name: None})


@pytest.mark.parametrize("kw", [{}, {"probes_one_sided": True, "queries": 2}], ids=str)
def test_a_budget_counts_probes_once_a_window(kw: dict[str, Any]) -> None:
    model, calls = network(), 0
    opt = zo_fused.PGAP(model, rank=2, interval=3, probes=2, total_steps=9, **kw)
    loss = loss_of(model)

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss()

    for step in range(7):
        opt.step(closure)
        assert calls == opt.forwards_of(step + 1)


def test_all_groups_have_probes_at_the_same_steps() -> None:
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "interval": 7}]
    with pytest.raises(ValueError, match="interval must be the same in all param groups"):
        zo_fused.PGAP(groups, delta=None)


def test_probes_that_fail_are_taken_again_beside_the_weights() -> None:
    """In the same window: the forward pass must take the V of the second space, as in place."""
    moved = []
    for mode in ("inplace", "factored"):
        model = network()
        opt = zo_fused.PGAP(
            model, lr=1e-2, rank=2, interval=8, probes=2, delta=(1.0, 1.0), mode=mode
        )
        opt.step(lambda: math.nan)
        for _ in range(5):
            opt.step(loss_of(model))
        opt.flush()
        assert opt.skipped_steps == 1
        assert opt.state["probes"]["step"] == 1
        moved.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    # weights below 1 are rounded in every sweep; losses' rounding over 2 eps enters g
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=2e-5)
