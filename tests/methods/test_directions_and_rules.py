"""Any direction goes with any rule, or is refused; and what a new method may hook into.

The directions, rules and methods made up here are none of the package: they are what an author of
a method would write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import INPUT, loss_of, network
from torch import Tensor, nn

import zo_fused
from zo_fused.directions.dense import Dense
from zo_fused.directions.low_rank import LowRank
from zo_fused.methods import table
from zo_fused.methods.kerzoo import Stretched
from zo_fused.noise import Purpose, derive_key, normal, parameter_id
from zo_fused.noise.streams import uniform
from zo_fused.rules.factor_momentum import FactorMomentum
from zo_fused.rules.history import AdamOfHistory
from zo_fused.rules.moments import Adam, Momentum, Sign
from zo_fused.rules.sgd import SGD, ScalarSign
from zo_fused.step.direction import Direction, Sweep
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.rule import Rule
from zo_fused.step.schedule import Position
from zo_fused.step.weights import Place


class Orthonormal(LowRank):
    """``z = s Q Z V^T`` with orthonormal Q and V of a window (SubZero, arXiv 2410.08989)."""

    has_basis = True

    def basis(self, p: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        scale = math.sqrt(p.numel()) / left.shape[1]
        return torch.linalg.qr(left).Q * scale, torch.linalg.qr(right).Q

    def square(self, n: int) -> float:
        return 1.0


DIRECTIONS: dict[str, Callable[[], Direction]] = {
    "Dense": Dense,
    "Rademacher": lambda: Dense("rademacher"),
    "hadamard": lambda: Dense("hadamard"),
    "Stretched": Stretched,
    "LowRank": LowRank,
    "Orthonormal": Orthonormal,
}
RULES: dict[str, Callable[[], Rule]] = {
    "SGD": SGD,
    "ScalarSign": ScalarSign,
    "Momentum": lambda: Momentum("float32"),
    "Adam": lambda: Adam("float32"),
    "Sign": Sign,
    "AdamOfHistory": lambda: AdamOfHistory(4),
    "FactorMomentum": FactorMomentum,
}
HYPER = {
    "eps": 1e-2,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "dampening": 0.0,
    "betas": (0.9, 0.99),
    "adam_eps": 1e-8,
    "rank": 2,
    "interval": 3,
}


class Made(ZerothOrderOptimizer):
    """Any direction and any rule."""

    def __init__(self, params: Any, direction: Direction, rule: Rule, **kw: Any) -> None:
        hyper = {**HYPER, **{name: kw.pop(name) for name in list(kw) if name in HYPER}}
        defaults = {"lr": kw.pop("lr", 0.0), **hyper}
        super().__init__(params, direction, rule, defaults, **{"seed": 3, **kw})


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kw", [{}, {"deferred": True, "queries": 2}], ids=["plain", "deferred"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_pair_goes_home_or_is_refused(direction: str, rule: str, kw: dict[str, Any]) -> None:
    """With lr = 0 no weight moves: what a rule takes back is what was perturbed."""
    model = network()
    before = vector_of(model)
    made = DIRECTIONS[direction](), RULES[rule]()
    if not isinstance(made[0], made[1].takes):
        with pytest.raises(TypeError, match=f"{type(made[0]).__name__} is none"):
            Made(model, *made, **kw)
        return
    if rule == "AdamOfHistory":
        kw = {**kw, "queries": 1}  # as ZOAdam demands
    opt = Made(model, *made, **kw)
    for _ in range(20):
        opt.step(loss_of(model))
    assert opt.skipped_steps == 0
    opt.flush()
    # 20 steps of 4 sweeps, each rounding weights below 2 to half of 2^-23, as a random walk
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-23 * math.sqrt(80))


class Doubled(Dense):
    """z is twice what `Dense` draws, by a sweep of its own."""

    def sweep(self, sweep: Sweep) -> None:
        terms = [term._replace(coeffs=2 * term.coeffs) for term in sweep.terms]
        super().sweep(sweep._replace(terms=terms))


@pytest.mark.parametrize("rule", sorted(RULES.keys() - {"FactorMomentum"}))
def test_a_rule_that_draws_z_refuses_a_sweep_of_its_own(rule: str) -> None:
    if rule in ("SGD", "ScalarSign"):
        model = network()
        before = vector_of(model)
        Made(model, Doubled(), RULES[rule]()).step(loss_of(model))
        torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-22)
        return
    with pytest.raises(TypeError, match="Doubled has a sweep of its own"):
        Made(network(), Doubled(), RULES[rule]())


def test_which_pairs_there_are() -> None:
    works = {
        (direction, rule)
        for direction, make in DIRECTIONS.items()
        for rule, make_rule in RULES.items()
        if isinstance(make(), make_rule().takes)
    }
    dense = ("Dense", "Rademacher", "hadamard", "Stretched")
    low_rank = ("LowRank", "Orthonormal")
    of_any = {(d, r) for d in DIRECTIONS for r in ("SGD", "ScalarSign")}
    of_dense = {(d, r) for d in dense for r in ("Momentum", "Adam", "Sign", "AdamOfHistory")}
    assert works == of_any | of_dense | {(d, "FactorMomentum") for d in low_rank}


# ---- a length of z, and a stage between losses and rule ------------------------------------------


def test_a_uniform_number_of_a_query() -> None:
    words = zo_fused.noise.random_bits(8, derive_key(5, Purpose.SCALAR, 7, 2), 0)
    for element, word in enumerate((words.to(torch.int64) & 0xFFFFFFFF).tolist()):
        number = uniform(5, 7, 2, element)
        assert number == (2 * (word >> 9) + 1) / 2**23 - 1
        assert number == float(torch.tensor(number, dtype=torch.float32))
    # the vectors of docs/noise.md
    assert uniform(42, 7, 0) * 2**23 == -1276363
    assert uniform(42, 7, 2) * 2**23 == -6762809
    drawn = torch.tensor([uniform(1, step) for step in range(4000)], dtype=torch.float64)
    # standard errors of the first two moments of U(-1, 1) over 4000: 0.009, 0.005
    assert abs(float(drawn.mean())) < 0.04
    assert abs(float(drawn.square().mean()) - 1 / 3) < 0.02


# ---- what a direction learns: state, probes ------------------------------------------------------


class Remembering(LowRank):
    """V is the mean of what probes found in the first step of each window: ``sum c_j z_j``'s first
    columns, as P-GAP's space would be."""

    has_basis = True

    def learn(self, buckets: Sequence[Any], seed: int, step: int, grads: Sequence[float]) -> None:
        for bucket in buckets:
            self.factors(bucket).forget()
            for p, id_ in zip(bucket.params, bucket.id_list, strict=True):
                if p.dim() < 2:
                    continue
                found = torch.zeros(p.numel())
                for probe, grad in enumerate(grads):
                    key = derive_key(seed, Purpose.PROBE, step, probe)
                    found += grad * normal(p.numel(), key, id_)
                self.state[p]["found"] = found.view(p.shape)

    def basis(self, p: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        found = self.state[p].get("found")
        return left, right if found is None else right + found[: right.shape[1]].T


class Probing(ZerothOrderOptimizer):
    """Probes at the start of each window."""

    def __init__(self, params: Any, lr: float = 1e-2, rank: int = 2, interval: int = 3, **kw: Any):
        defaults = {"lr": lr, "eps": 1e-2, "weight_decay": 0.0, "rank": rank, "interval": interval}
        super().__init__(params, Remembering(), SGD(), defaults, **kw)

    def probes(self) -> list[Position]:
        learnt = any("found" in state for state in self.state.values())
        if learnt and self.step_count % self.param_groups[0]["interval"]:
            return []
        return [Position(sign, probe, True) for probe in range(2) for sign in (1.0, -1.0)]

    def forwards_of(self, steps: int) -> int:
        windows = -(-steps // self.param_groups[0]["interval"])
        return 2 * steps + 4 * windows


def test_probes_are_taken_logged_and_replayed(tmp_path: Path, monkeypatch: Any) -> None:
    model, copy = network(), network()
    opt = Probing(model, deferred=False)
    opt.start_log(tmp_path / "log.jsonl")
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(model)()

    for step in range(7):
        before, next_step = calls, opt.forwards
        opt.step(closure)
        assert calls == 2 * (step + 1) + 4 * (1 + step // 3) == opt.forwards_of(step + 1)
        assert calls - before == next_step == (2 if step % 3 else 6)
    opt.flush()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert sum('"probes":[' in line for line in lines) == 3
    with pytest.raises(ValueError, match="method of your own must be imported first"):
        zo_fused.replay(copy, tmp_path / "log.jsonl")
    monkeypatch.setitem(table.METHODS, "Probing", Probing)
    zo_fused.replay(copy, tmp_path / "log.jsonl")
    assert torch.equal(vector_of(model), vector_of(copy))


def test_what_a_direction_learns_is_in_the_state() -> None:
    one, two = network(), network()
    first = Probing(one)
    for _ in range(4):
        first.step(loss_of(one))
    second = Probing(two)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(2):  # in the window of the probes, which are not taken again
        first.step(loss_of(one))
        second.step(loss_of(two))
    assert torch.equal(vector_of(one), vector_of(two))


def test_a_probe_that_is_not_finite_skips_the_step() -> None:
    model = network()
    opt = Probing(model)
    before = vector_of(model)
    calls = iter([1.0, math.nan, 1.0, 1.0])
    opt.step(lambda: next(calls))
    assert opt.skipped_steps == opt.step_count == 1
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-22)
    assert not any("found" in state for state in opt.state.values())
    opt.step(loss_of(model))  # takes them again
    assert any("found" in state for state in opt.state.values())


def test_probes_need_a_closure() -> None:
    """Losses from outside are of the queries alone: nothing would be learnt."""
    model = network()
    with pytest.raises(TypeError, match="needs a closure"):
        Probing(model).step(loss_plus=1.0, loss_minus=0.0)


def test_a_probe_of_a_low_rank_direction_is_dense() -> None:
    """And so along another z than the first query; on the way they are in one move."""
    model = network()
    opt = Made(model, LowRank(), SGD(), eps=1.0)
    before = vector_of(model)
    with torch.no_grad():
        losses = opt.losses_at([Position(1.0, 0, True), Position(1.0)], loss_of(model))
    names = [(name, p.numel()) for name, p in model.named_parameters()]
    key = derive_key(3, Purpose.PROBE, 0)
    z = torch.cat([normal(size, key, parameter_id(name)) for name, size in names])
    opt.weights.go(Place((1.0,), 0, True))
    torch.testing.assert_close(vector_of(model), before + z, rtol=0, atol=2.0**-20)
    assert len(set(losses.values())) == 2
    opt.flush()
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-20)


def test_probes_and_a_deferred_sweep_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="deferred=False"):
        Probing(model, deferred=True).step(loss_of(model))


def test_a_direction_that_learns_nothing_says_so() -> None:
    class Asking(zo_fused.MeZO):
        def probes(self) -> list[Position]:
            return [Position(sign, 0, True) for sign in (1.0, -1.0)]

    with pytest.raises(NotImplementedError, match="Dense learns nothing from them"):
        Asking(network()).step(loss_of(network()))


@pytest.mark.parametrize(
    ("probes", "error"),
    [
        ([Position(1.0), Position(-1.0)], "along the z of a query: probe=True"),
        ([Position(1.0, 4, True)], "needs a loss at the other sign or at Position(0.0)"),
    ],
)
def test_probes_that_tell_nothing_are_refused(probes: list[Position], error: str) -> None:
    class Asking(zo_fused.MeZO):
        def probes(self) -> list[Position]:
            return probes

    model = network()
    before = vector_of(model)
    with pytest.raises(ValueError, match=re.escape(error)):
        Asking(model).step(loss_of(model))
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-22)


def test_a_position_of_no_query_is_refused() -> None:
    class Beyond(zo_fused.MeZO):
        def positions(self) -> list[Position]:
            return [Position(1.0, 2), Position(-1.0, 2)]

    with pytest.raises(ValueError, match=re.escape("query must lie in [0, 2), got 2")):
        Beyond(network(), queries=2).step(loss_of(network()))


def test_a_basis_follows_its_textbook() -> None:
    """float64, with the orthonormal Q and V of the same normals."""
    model, eps, lr, seed, rank, interval = network(), 1e-2, 1e-2, 3, 2, 3
    opt = Made(model, Orthonormal(), SGD(), lr=lr, rank=rank, interval=interval, seed=seed)
    theta = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    x = INPUT.double()
    reference = network().double()

    def loss(weights: dict[str, Tensor]) -> float:
        return float(torch.func.functional_call(reference, weights, (x,)).square().mean())

    def drawn(name: str, rows: int, columns: int, purpose: Purpose, step: int) -> Tensor:
        noise = normal(rows * columns, derive_key(seed, purpose, step), parameter_id(name))
        return noise.view(rows, columns)

    def z_of(name: str, w: Tensor, step: int) -> Tensor:
        if w.dim() < 2:
            return drawn(name, w.numel(), 1, Purpose.DENSE, step).double().view(w.shape)
        m, n = w.shape
        q = torch.linalg.qr(drawn(name, m, rank, Purpose.LEFT, step // interval)).Q.double()
        v = torch.linalg.qr(drawn(name, n, rank, Purpose.V, step // interval)).Q.double()
        z = drawn(name, rank, rank, Purpose.CORE, step).double()
        return math.sqrt(m * n) / rank * q @ z @ v.T

    for step in range(8):
        opt.step(loss_of(model))
        z = {name: z_of(name, w, step) for name, w in theta.items()}
        plus = loss({name: w + eps * z[name] for name, w in theta.items()})
        minus = loss({name: w - eps * z[name] for name, w in theta.items()})
        theta = {k: w - lr * (plus - minus) / (2 * eps) * z[k] for k, w in theta.items()}
    expected = torch.cat([w.flatten() for w in theta.values()])
    # as in test_kerzoo_follows_its_textbook: the rounding of losses, without the kernel
    assert float((vector_of(model).double() - expected).abs().max()) < 2e-5


class Clipped(zo_fused.MeZO):
    """Estimates as their sign, by the stage between losses and rule, which counts itself."""

    def transform(self, grads: Tensor, plus: Sequence[Any], minus: Sequence[Any]) -> Tensor:
        kept = self.state.setdefault("transform", {"seen": 0})
        kept["seen"] += 1
        assert len(plus) == len(minus) == len(grads)
        return grads.sign()


def test_a_stage_between_losses_and_rule() -> None:
    model = network()
    opt = Clipped(model, lr=1e-3, queries=3)
    for _ in range(3):
        opt.step(loss_of(model))
        assert opt.projected_grad.abs().tolist() == [1.0, 1.0, 1.0]
    other = Clipped(network(), queries=3)
    other.load_state_dict(opt.state_dict())
    assert other.state["transform"] == {"seen": 3}
    other.step(loss_of(model))  # and each counts for itself
    assert other.state["transform"] == {"seen": 4}
    assert opt.state["transform"] == {"seen": 3}


def test_a_stage_sees_the_steps_that_are_taken() -> None:
    """Not an estimate that another takes the place of, nor one that was dropped."""
    model = network()
    opt = Clipped(model, lr=1e-3)
    opt.estimate(loss_of(model))
    opt.estimate(loss_of(model))
    assert "transform" not in opt.state_dict()["state"]
    opt.step()
    assert opt.state["transform"] == {"seen": 1}
    opt.estimate(loss_of(model))
    opt.step(loss_of(model))
    assert opt.state["transform"] == {"seen": 2}


class LeftOut(zo_fused.MeZO):
    """Losses at theta + eps z alone."""

    def positions(self) -> list[Position]:
        return [Position(1.0, query) for query in range(self.schedule.queries)]


def test_of_losses_on_one_side_each_is_compared_with_the_others() -> None:
    model = network()
    opt = LeftOut(model, lr=1e-2, queries=3)
    losses = iter([1.0, 2.0, 6.0])
    mean = opt.step(lambda: next(losses))
    assert float(mean) == 3.0
    expected = [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5]
    torch.testing.assert_close(opt.projected_grad, torch.tensor(expected) / 1e-3)
    with pytest.raises(ValueError, match="or of another query if there are none"):
        LeftOut(model).step(loss_of(model))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_stage_that_clips_does_not_hide_an_infinite_loss(bad: float) -> None:
    class Bounded(zo_fused.MeZO):
        def transform(self, grads: Tensor, plus: Sequence[Any], minus: Sequence[Any]) -> Tensor:
            return grads.nan_to_num_().clamp_(-1.0, 1.0)

    model = network()
    opt = Bounded(model, lr=1e-2, queries=2)
    before = vector_of(model)
    losses = iter([1.0, 2.0, bad, 1.0])
    opt.step(lambda: next(losses))
    assert opt.skipped_steps == 1
    # three sweeps that add eps z < 0.01 and take it back, each within half of 2^-23
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-22)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda g: g[:1], "must return 2 projected gradients, a query each, got shape (1,)"),
        (lambda g: torch.cat([g, g]), "got shape (4,)"),
        (lambda g: g.mean(), "got shape ()"),
        (lambda g: g.tolist(), "must return a tensor, got list"),
    ],
)
def test_a_stage_must_return_a_number_a_query(returned: Any, error: str) -> None:
    class Wrong(zo_fused.MeZO):
        def transform(self, grads: Tensor, plus: Sequence[Any], minus: Sequence[Any]) -> Any:
            return returned(grads)

    model = network()
    before = vector_of(model)
    opt = Wrong(model, queries=2)
    with pytest.raises((TypeError, ValueError), match=re.escape(error)):
        opt.step(loss_of(model))
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-22)


def test_a_loss_anywhere_on_the_line() -> None:
    """`loss_at` is where a method looks beyond its positions."""
    model = network()
    seen: list[Any] = []

    class Looking(zo_fused.MeZO):
        def measure(self, closure: Any) -> Any:
            estimate = super().measure(closure)
            seen.append(self.loss_at(Place((3e-3,)), closure))
            return estimate

    opt = Looking(model, lr=0.0)
    before = vector_of(model)
    opt.step(loss_of(model))
    opt.flush()
    assert len(seen) == 1
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=2.0**-21)


@pytest.mark.parametrize("place", [Place((0.1,), 1), Place((0.1,), 3), Place((0.1,), 0, True)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loss_along_another_z_is_taken_back_and_replayed(
    place: Place, momentum: float, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also where no z of the step is this one, so that no rule knows it."""

    class Aside(zo_fused.MeZO):
        def measure(self, closure: Any) -> Any:
            estimate = super().measure(closure)
            self.loss_at(place, closure)
            return estimate

    monkeypatch.setitem(table.METHODS, "Aside", Aside)
    model, copy = network(), network()
    still = Aside(model, lr=0.0, momentum=momentum, queries=2)
    before = vector_of(model)
    for _ in range(3):
        still.step(loss_of(model))
    # 18 sweeps, each rounding weights below 1 to half of 2^-24
    torch.testing.assert_close(vector_of(model), before, rtol=0, atol=18 * 2.0**-24)
    model.load_state_dict(copy.state_dict())
    opt = Aside(model, lr=1e-2, momentum=momentum, queries=2)
    opt.start_log(tmp_path / "log.jsonl")
    for _ in range(4):
        opt.step(loss_of(model))
    opt.close_log()
    zo_fused.replay(copy, tmp_path / "log.jsonl")
    assert torch.equal(vector_of(model), vector_of(copy))


def test_a_place_has_a_number_for_every_group() -> None:
    model = network()
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]

    class Aside(zo_fused.MeZO):
        def measure(self, closure: Any) -> Any:
            return self.loss_at(Place((0.1,)), closure)

    with pytest.raises(ValueError, match="coefficient of z for every param group: 2, not 1"):
        Aside(groups).step(loss_of(model))
