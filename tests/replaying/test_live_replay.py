"""A replay into an optimizer leaves it where the run was: it goes on in the run's bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equality import in_memory, same_bits
from support.methods import CASES, Case
from support.models import loss_of, network
from torch import Tensor, nn

import zo_fused
from zo_fused.step.optimizer import ZerothOrderOptimizer


def values(state: Any) -> list[Any]:
    """What is in a state, in order; which log it goes with aside."""
    if isinstance(state, dict):
        return [v for name, part in state.items() if name != "log" for v in values(part)]
    if isinstance(state, list | tuple):
        return [v for part in state for v in values(part)]
    return [state]


def assert_same_states(one: ZerothOrderOptimizer, two: ZerothOrderOptimizer) -> None:
    for a, b in zip(values(one.state_dict()), values(two.state_dict()), strict=True):
        assert same_bits(a, b) if isinstance(a, Tensor) else a == b


def test_the_run_goes_on_in_its_bits(make: Case, tmp_path: Path) -> None:
    """Killed in the middle of step 4 of 7 (windows have three steps), without any checkpoint."""
    log, whole = tmp_path / "log.jsonl", tmp_path / "whole.jsonl"
    model, resumed = network(torch.bfloat16), network(torch.bfloat16)
    opt, again = make(model, lr=1e-2), make(resumed, lr=1e-2)
    opt.start_log(whole)
    for step in range(7):
        if step == 4:
            log.write_bytes(whole.read_bytes() + b"[[4,0.1")
            there = in_memory(model)
        opt.step(loss_of(model))

    assert again.replay(log) == 4
    assert again.step_count == 4
    assert torch.equal(in_memory(resumed), there)  # displaced where the schedule rests so
    again.start_log(log, resume=True)
    for _ in range(3):
        again.step(loss_of(resumed))
    assert torch.equal(in_memory(resumed), in_memory(model))
    assert log.read_bytes() == whole.read_bytes()
    assert_same_states(opt, again)  # which flushes
    assert torch.equal(in_memory(resumed), in_memory(model))
    assert log.read_bytes() == whole.read_bytes()


def made(name: str, **options: Any) -> tuple[nn.Module, ZerothOrderOptimizer]:
    model = network()
    return model, CASES[name](model, lr=1e-2, **options)


NAMES = ["MeZO", "MeZO, deferred", "LOZO, factored", "LOZO-M, deferred", "ZOAdam, deferred"]


@pytest.mark.parametrize("name", NAMES)
def test_an_attempt_that_was_not_finished_is_left_out(name: str, tmp_path: Path) -> None:
    """Whatever the dying process still put back; but not what came before another step."""
    log = tmp_path / "log.jsonl"
    (model, opt), (resumed, again), (twin, undisturbed) = made(name), made(name), made(name)
    opt.start_log(log)
    for step in range(5):
        if step == 2:
            opt.flush()
            undisturbed.flush()
        opt.step(loss_of(model))
        undisturbed.step(loss_of(twin))
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 / 0)
    opt.flush()
    assert again.replay(log) == 5
    assert torch.equal(in_memory(resumed), in_memory(twin))
    for _ in range(2):
        again.step(loss_of(resumed))
        undisturbed.step(loss_of(twin))
    assert_same_states(again, undisturbed)
    assert torch.equal(in_memory(resumed), in_memory(twin))


@pytest.mark.parametrize("name", NAMES)
def test_from_a_saved_state(name: str, tmp_path: Path) -> None:
    """A checkpoint only shortens the way."""
    log = tmp_path / "log.jsonl"
    (model, opt), (resumed, again) = made(name), made(name)
    opt.start_log(log)
    for step in range(7):
        if step == 4:
            with pytest.raises(ZeroDivisionError):
                opt.step(lambda: 1 / 0)
            state = opt.state_dict()
            resumed.load_state_dict(model.state_dict())
            again.load_state_dict(state)
        opt.step(loss_of(model))
    assert again.replay(log, until=6) == 2
    assert again.replay(log) == 1
    assert again.replay(log) == 0
    assert torch.equal(in_memory(resumed), in_memory(model))
    assert_same_states(again, opt)


def test_hyper_parameters_stay_and_what_is_trainable_may_change(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    (model, opt), (resumed, again) = made("MeZO, deferred"), made("MeZO, deferred")
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 9)]
    opt.start_log(log)
    for step in range(6):
        model[0].bias.requires_grad_(step not in (2, 3))
        opt.step(loss_of(model) if step != 1 else lambda: math.nan)
        schedulers[0].step()
    opt.close_log()
    lr = again.param_groups[0]["lr"]
    assert again.replay(log) == 6
    assert again.param_groups[0]["lr"] == lr
    assert torch.equal(in_memory(resumed), in_memory(model))
    again.param_groups[0]["lr"] = opt.param_groups[0]["lr"]
    opt.step(loss_of(model))
    again.step(loss_of(resumed))
    assert torch.equal(in_memory(resumed), in_memory(model))
    assert again.skipped_steps == opt.skipped_steps == 1


def test_ctrl_c_comes_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another call goes on, also where many steps wait to be made at once."""
    log = tmp_path / "log.jsonl"
    (model, opt), (resumed, again) = made("MeZO"), made("MeZO")
    opt.start_log(log)
    for _ in range(7):
        opt.step(loss_of(model))
    update, calls = zo_fused.MeZO.update, 0

    def stopped(self: Any, grads: Tensor) -> None:
        nonlocal calls
        update(self, grads)
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zo_fused.MeZO, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            again.replay(log)
    assert again.step_count == 3
    assert again.replay(log) == 4
    assert torch.equal(in_memory(resumed), in_memory(model))


def test_what_does_not_fit_is_refused_and_nothing_moves(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    model, opt = made("LOZO")
    opt.start_log(log)
    for _ in range(3):
        opt.step(loss_of(model))
    other = network()
    with torch.no_grad():
        other[2].weight[1, 3] += 1
    refused = [
        (CASES["LOZO"](other), {}, "other base weights"),
        (CASES["MeZO"](network()), {}, "method differs"),
        (CASES["LOZO"](network(), seed=4), {}, "seed differs"),
        (CASES["LOZO"](network(), deferred=True), {}, "options differs"),
        (
            CASES["LOZO"](network()),
            {"until": 4},
            "from 0 to 3; .* shall go to step 4",
        ),
    ]
    for again, options, message in refused:
        before = in_memory_of(again)
        with pytest.raises(ValueError, match=message):
            again.replay(log, **options)
        assert torch.equal(in_memory_of(again), before)
        assert again.step_count == 0
    ahead = CASES["LOZO"](network())
    for _ in range(4):
        ahead.step(lambda: 0.0)
    with pytest.raises(ValueError, match="steps from 0 to 3; the optimizer is at step 4"):
        ahead.replay(log)
    with pytest.raises(RuntimeError, match="close_log"):
        opt.replay(log)


def test_a_state_that_logs_lack_is_refused_by_name(tmp_path: Path) -> None:
    opt = CASES["MEAZO"](network())
    opt.state_beyond_log = True  # as a method of one's own may say of itself
    with pytest.raises(NotImplementedError, match="MEAZO has a state that replay logs lack"):
        opt.replay(tmp_path / "log.jsonl")


def in_memory_of(opt: ZerothOrderOptimizer) -> Tensor:
    params = [p for group in opt.param_groups for p in group["params"]]
    return torch.cat([p.detach().flatten().clone() for p in params])
