"""The deferred schedule: two sweeps a step, the same mathematics, weights that rest perturbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equality import in_memory
from support.methods import CASES, Case, evaluates_both_sides, makes_panels
from support.models import INPUT, network
from torch import Tensor, nn

import zo_fused
from zo_fused import noise
from zo_fused.noise import Purpose, derive_key, parameter_id

CASES_TO_DEFER = [
    *(case for case in CASES.values() if f"{case.name}, deferred" in CASES),
    Case("LOZO, interval 1", zo_fused.LOZO, {"interval": 1}),
    Case("LOZO-M, interval 7", zo_fused.LOZO, {"interval": 7, "momentum": 0.9}),
]


@pytest.fixture(params=CASES_TO_DEFER, ids=str)
def make(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """In float64, so that the losses add no rounding of their own."""
    x = INPUT.double()

    def loss() -> Tensor:
        weights = {name: p.detach().double() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x,)).square().mean()

    return loss


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups that differ in everything that a group can set."""
    named = list(model.named_parameters())
    return [
        {"params": named[:2], "lr": 2e-3, "eps": 2e-3, "weight_decay": 0.5},
        {"params": named[2:]},
    ]


def test_follows_the_plain_schedule_with_a_changing_lr(make: Case) -> None:
    """lr and decay of the step that made an update are used, not the next step's: with those of
    the next one, a warm-up whose first rates are 0 would already differ at its first step.

    Tolerance: the schedules round differently, three or two times a step by at most 2**-24 |w| with
    |w| < 1: a random walk of sqrt(5 * 200) * 2**-25 < 1e-6. Through g, where rounding is divided by
    2 eps = 2e-3 and multiplied by the gradient (below 1) and lr = 2e-3 at most, it comes in once
    more a step: 2e-6 in all; ten times that is allowed for what the loss's curvature makes of it.
    """
    paths = []
    for deferred in (False, True):
        model = network()
        opt = make(groups_of(model), deferred=deferred)
        rates = [group["lr"] for group in opt.param_groups]
        grads = []
        for step in range(200):
            for group, lr in zip(opt.param_groups, rates, strict=True):
                group["lr"] = lr * (step % 40) / 40
            opt.step(loss_of(model))
            grads.append(opt.projected_grad.flatten())
        opt.flush()
        paths.append((weights(model), torch.cat(grads)))
    (plain, plain_grads), (deferred_weights, deferred_grads) = paths
    assert (plain - weights(network())).abs().max() > 0.02
    assert (plain - deferred_weights).abs().max() < 2e-5
    # 3 * 2**-24 |w| in the direction of the gradient, over 2 eps
    assert (plain_grads - deferred_grads).abs().max() < 2e-3 * plain_grads.abs().max() + 5e-4


IN_SWEEPS = [c for c in CASES_TO_DEFER if evaluates_both_sides(c) and not makes_panels(c)]


@pytest.mark.parametrize("make", IN_SWEEPS, ids=str)
def test_two_sweeps_a_step(make: Case, sweeps: list[str]) -> None:
    for deferred, first, others in ((False, 3, 3), (True, 3, 2)):
        model = network()
        opt = make(model, deferred=deferred)
        counts = []
        for _ in range(9):
            sweeps.clear()
            opt.step(loss_of(model))
            counts.append(len(sweeps))
        assert counts == [first] + 8 * [others]


def test_one_sided_steps_have_two_sweeps_in_both_schedules(sweeps: list[str]) -> None:
    for deferred, first in ((False, 2), (True, 3)):
        model = network()
        opt = zo_fused.MeZO(model, deferred=deferred, one_sided=True)
        counts = []
        for _ in range(5):
            sweeps.clear()
            opt.step(loss_of(model))
            counts.append(len(sweeps))
        assert counts == [first] + 4 * [2]


def test_weights_rest_at_the_next_perturbation() -> None:
    model = network()
    opt = zo_fused.MeZO(model.named_parameters(), eps=1e-2, seed=5, deferred=True)
    opt.step(loss_of(model))
    sizes = [p.numel() for p in model.parameters()]
    perturbed = in_memory(model).split(sizes)
    opt.flush()
    key = derive_key(5, Purpose.DENSE, 1)
    for (name, p), before in zip(model.named_parameters(), perturbed, strict=True):
        z = noise.normal(p.numel(), key, parameter_id(name)).view_as(p)
        torch.testing.assert_close(before.view_as(p) - p.detach(), 1e-2 * z, rtol=0, atol=1e-6)
    opt.flush()  # and nothing more
    assert opt.param_groups[0]["restores"] == 1


def test_who_flushes(make: Case) -> None:
    model = network()
    opt = make(model, deferred=True)
    plain_model = network()
    plain = make(plain_model)

    def step() -> None:
        opt.step(loss_of(model))
        plain.step(loss_of(plain_model))
        assert (in_memory(model) - weights(plain_model)).abs().max() > 1e-4

    def at_rest() -> None:
        theta = in_memory(plain_model)
        torch.testing.assert_close(in_memory(model), theta, rtol=0, atol=2e-6)

    step()
    with opt.unperturbed():
        at_rest()
    at_rest()
    for look in (opt.flush, opt.eval, opt.state_dict, model.state_dict, lambda: weights(model)):
        step()
        look()
        at_rest()
    opt.train()
    step()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    at_rest()
    step()
    with pytest.raises(TypeError, match="scalar"):
        opt.step(lambda: None)
    at_rest()


def test_the_module_s_state_is_what_is_in_it_in_the_middle_of_a_step() -> None:
    """Engines copy perturbed weights to where they are evaluated."""
    model = network()
    opt = zo_fused.MeZO(model, deferred=True)
    opt.step(loss_of(model))
    with opt.perturbed(+1):
        before = weights(model)
        model.state_dict()
        assert torch.equal(weights(model), before)


CHANGES: dict[str, Callable[[nn.Module, Any], object]] = {
    "eps": lambda model, opt: opt.param_groups[0].update(eps=5e-3),
    "trainable": lambda model, opt: model[0].weight.requires_grad_(False),
    "memory": lambda model, opt: setattr(model[0].weight, "data", model[0].weight.data.clone()),
    "group": lambda model, opt: opt.add_param_group(
        {"params": [("new", nn.Parameter(torch.ones(2, 2)))]}
    ),
    "interval": lambda model, opt: opt.param_groups[0].update(interval=2),
    "rank": lambda model, opt: opt.param_groups[0].update(rank=3),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_changes_between_steps(change: str, momentum: float, tmp_path: Path) -> None:
    """Whatever changes while weights rest perturbed, the perturbation that was made is taken back;
    and a replay does the same."""
    if change == "rank" and momentum:
        pytest.skip("the momentum of one rank does not fit another")
    models = []
    for deferred in (False, True):
        model, base = network(), network()
        opt = zo_fused.LOZO(
            model, lr=1e-2, interval=5, momentum=momentum, deferred=deferred, seed=1
        )
        if change != "group":
            opt.start_log(tmp_path / "log.jsonl")
        for step in range(8):
            if step in (3, 6):
                if change == "group" and step == 6:
                    continue
                CHANGES[change](model, opt)
            opt.step(loss_of(model))
        opt.flush()
        models.append(model)
        if change != "group":
            zo_fused.replay(base, tmp_path / "log.jsonl")
            assert torch.equal(weights(base), weights(model))
    torch.testing.assert_close(*map(weights, models), rtol=0, atol=5e-6)


def test_a_skipped_step_goes_on_to_the_next_perturbation(make: Case) -> None:
    models = []
    for deferred in (False, True):
        model = network()
        opt = make(model, deferred=deferred, weight_decay=0.1)
        for step in range(6):
            opt.step((lambda: math.nan) if step in (0, 3) else loss_of(model))
        assert opt.skipped_steps == 2
        opt.flush()
        models.append(model)
    torch.testing.assert_close(*map(weights, models), rtol=0, atol=2e-6)


def test_a_run_that_was_cut_off_replays_to_its_theta(make: Case, tmp_path: Path) -> None:
    """Killed between two steps, a run leaves no flush in its log; the replay makes one."""
    model, base = network(), network()
    opt = make(model, deferred=True)
    opt.start_log(tmp_path / "log.jsonl")
    for _ in range(5):
        opt.step(loss_of(model))
    opt.close_log()
    zo_fused.replay(base, tmp_path / "log.jsonl")
    opt.flush()
    assert torch.equal(weights(base), weights(model))
