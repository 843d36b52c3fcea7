"""The replay log: the tuned weights come back bit for bit, whatever happened on the way."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.logs import records_of, write_records
from support.matrix import covering
from support.methods import CASES, Case, evaluates_both_sides, rounds, those
from support.models import MIXED, loss_of, network, same
from torch import Tensor, nn

import zo_fused
from zo_fused.step.optimizer import ZerothOrderOptimizer


def eventful_run(opt: ZerothOrderOptimizer, model: nn.Module, split: bool, steps: int = 8) -> None:
    """Skipped steps, closures that raise, the split form, changing lr and trainable set."""
    loss = loss_of(model)

    def raises() -> Tensor:
        raise RuntimeError("out of luck")

    for step in range(steps):
        opt.param_groups[0]["lr"] = 1e-2 * 0.9**step
        if step == 2:
            with pytest.raises(RuntimeError, match="out of luck"):
                opt.step(raises)
        if step == 3:
            opt.step(lambda: loss() * math.nan)
        elif step == 4 and split:
            with opt.perturbed(+1):
                plus = loss().item()
            with opt.perturbed(-1):
                minus = loss().item()
            opt.step(loss_plus=plus, loss_minus=minus)
        else:
            opt.step(loss)
        model[0].bias.requires_grad_(step % 2 == 1)
        if step == 5 and "eps" in opt.param_groups[0]:
            opt.param_groups[0]["eps"] = 2e-3


def logged_run(opt: ZerothOrderOptimizer, model: nn.Module, log: Path, steps: int) -> None:
    opt.start_log(log)
    for _ in range(steps):
        opt.step(loss_of(model))


@covering(
    make=[case for case in CASES.values() if rounds(case)],
    dtype=[torch.float16, torch.float32, MIXED],
    rounding=["nearest", "stochastic"],
)
def test_replay_is_bit_exact(
    make: Case, dtype: torch.dtype | str, rounding: str, tmp_path: Path
) -> None:
    model, base = network(dtype), network(dtype)
    opt = make(model, lr=1e-2, weight_decay=0.1, rounding=rounding)
    opt.start_log(tmp_path / "log.jsonl")
    eventful_run(opt, model, split=evaluates_both_sides(make))
    opt.close_log()
    assert not same(model, base)
    assert zo_fused.replay(base, tmp_path / "log.jsonl") == 8
    assert same(model, base)


@those(lambda case: case.optimizer is not zo_fused.ForwardGrad and not case.has("paired", "others"))
def test_two_groups_without_names(make: Case, tmp_path: Path) -> None:
    model, base = network(), network()
    params = list(model.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 1e-3, "eps": 2e-3}]
    if make.options.get("align") == "joint":
        del groups[1]["eps"]  # which needs one eps for all
    opt = make(groups, lr=1e-2)
    logged_run(opt, model, tmp_path / "log.jsonl", steps=5)
    opt.flush()
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(model, base)


@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0)])
def test_groups_with_and_without_momentum(momenta: tuple[float, float], tmp_path: Path) -> None:
    """The rule is the run's, not that of whichever group comes first."""
    model, base = network(), network()
    params = list(model.named_parameters())
    groups = [
        {"params": part, "momentum": beta}
        for part, beta in zip((params[:2], params[2:]), momenta, strict=True)
    ]
    opt = CASES["LOZO-M"](groups, lr=1e-2)
    logged_run(opt, model, tmp_path / "log.jsonl", steps=5)
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(model, base)


def test_tensors_by_name_and_other_backends(
    tmp_path: Path, use_backend: Callable[[str], None]
) -> None:
    """A log replays on every backend to the same bits."""
    model = network()
    opt = CASES["LOZO-M"](model, lr=1e-2)
    logged_run(opt, model, tmp_path / "log.jsonl", steps=7)
    tensors = {name: p.detach() for name, p in network().named_parameters()}
    use_backend("reference")
    zo_fused.replay(tensors, tmp_path / "log.jsonl")
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


def test_every_line_is_on_disk_when_the_step_returns(tmp_path: Path) -> None:
    model = network()
    opt = CASES["MeZO"](model, lr=1e-2)
    opt.start_log(tmp_path / "log.jsonl")
    for steps in range(4):
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + steps
        opt.step(loss_of(model))


def test_a_line_cut_off_by_a_kill_is_ignored(tmp_path: Path) -> None:
    model, base = network(), network()
    log = tmp_path / "log.jsonl"
    opt = CASES["LOZO"](model, lr=1e-2)
    logged_run(opt, model, log, steps=4)
    with open(log, "a") as file:
        file.write("[[4,0.12")
    zo_fused.replay(base, log)
    assert same(model, base)


def test_a_log_is_small(tmp_path: Path) -> None:
    model = network()
    log = tmp_path / "log.jsonl"
    opt = CASES["LOZO"](model, lr=1e-2)
    opt.start_log(log)
    header = log.stat().st_size
    for _ in range(100):
        opt.step(loss_of(model))
    # so 20,000 steps stay below 1 MB
    assert log.stat().st_size - header < 100 * 38


@covering(make=CASES.values(), checkpoint=[3, 4, 6])
def test_resumed_log_covers_the_whole_run(make: Case, checkpoint: int, tmp_path: Path) -> None:
    """Steps after the checkpoint are lost in a crash; the log is cut back and goes on."""
    log = tmp_path / "log.jsonl"
    model = network()
    opt = make(model, lr=1e-2)
    opt.start_log(log)
    saved = None
    for step in range(8):
        if step == checkpoint:
            # An aborted attempt before the checkpoint is part of the weights that it saves.
            with pytest.raises(ZeroDivisionError):
                opt.step(lambda: 1 / 0)
            saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
            with pytest.raises(ZeroDivisionError):  # one after it is not
                opt.step(lambda: 1 / 0)
        opt.step(loss_of(model))
    assert saved is not None
    del opt

    resumed, base = network(), network()
    resumed.load_state_dict(saved[0])
    again = make(resumed, lr=1e-2)
    again.load_state_dict(saved[1])
    again.start_log(log, resume=True)
    for _ in range(5):
        again.step(loss_of(resumed))
    zo_fused.replay(base, log)
    assert same(resumed, base)


def test_noise_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    """Signs were the top bits of a word each, and the transform had another name."""
    model, copied, log = network(), network(), tmp_path / "log.jsonl"
    opt = zo_fused.MeZO(model, lr=1e-2, distribution="rademacher")
    logged_run(opt, model, log, 2)
    state = opt.state_dict()
    first, *others = records_of(log)
    write_records(log, [{**first, "transform": "rademacher"}, *others])
    with pytest.raises(ValueError, match=r"noise of the transform .rademacher.*has .signs."):
        zo_fused.replay(copied, log)
    assert same(copied, network())
    with pytest.raises(ValueError, match="transform differs"):
        opt.start_log(log, resume=True)
    for group in state["param_groups"]:
        group["method"] = "MeZO (SGD, rademacher)"
    with pytest.raises(ValueError, match=r"is of MeZO \(SGD, rademacher\)"):
        opt.load_state_dict(state)


def test_resume_refuses_the_log_of_another_run(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    opt = CASES["MeZO"](network().named_parameters(), seed=1)
    opt.start_log(log)
    other = CASES["MeZO"](network().named_parameters(), seed=2)
    with pytest.raises(ValueError, match="seed differs"):
        other.start_log(log, resume=True)
    opt.weights.groups.count(step=5)
    with pytest.raises(ValueError, match="can't be continued at step 5"):
        opt.start_log(log, resume=True)


def test_momentum_needs_a_log_from_the_first_step(tmp_path: Path) -> None:
    model = network()
    opt = CASES["LOZO-M"](model, lr=1e-2)
    opt.step(loss_of(model))
    with pytest.raises(ValueError, match="first step"):
        opt.start_log(tmp_path / "log.jsonl")
    # Without state a log may start anywhere; it tells where.
    plain, base = network(), network()
    opt = CASES["LOZO"](plain, lr=0.0)
    opt.step(loss_of(plain))
    base.load_state_dict(plain.state_dict())
    opt.param_groups[0]["lr"] = 1e-2
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(plain))
    zo_fused.replay(base, tmp_path / "log.jsonl")
    assert same(plain, base)


# ---- a log that is gone or changed under the run ------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    model = network()
    opt = CASES["MeZO"](model, lr=1e-2)
    logged_run(opt, model, tmp_path / "log.jsonl", steps=2)
    opt.close_log()
    return tmp_path / "log.jsonl"


def removed(log: Path) -> None:
    log.unlink()


def replaced(log: Path) -> None:
    log.unlink()
    CASES["MeZO"](network(), lr=1e-2).start_log(log)


def shortened(log: Path) -> None:
    """By a line as long as the next."""
    log.write_text("".join(log.read_text().splitlines(True)[:-1]))


@pytest.mark.parametrize("change", [removed, replaced, shortened])
def test_nothing_is_written_after_lines_that_are_gone(
    log: Path, change: Callable[[Path], None]
) -> None:
    opt = CASES["MeZO"](network(), lr=1e-2)
    opt.start_log(log)
    for _ in range(2):
        opt.step(lambda: 0.0)  # lines of one length
    change(log)
    left = log.read_text() if log.exists() else None
    for _ in range(2):
        with pytest.raises(OSError, match="jsonl"):
            opt.step(lambda: 0.0)
    assert (log.read_text() if log.exists() else None) == left


def test_nothing_is_written_after_a_line_that_found_no_room(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = CASES["MeZO"](network(), lr=1e-2)
    opt.start_log(log)
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, text: write(file, text[:3]))
        with pytest.raises(OSError, match="could not be written whole"):
            opt.step(lambda: 0.0)
    with pytest.raises(OSError, match="could not be written whole"):
        opt.step(lambda: 0.0)


def test_a_line_that_can_t_be_written_leaves_a_whole_step(tmp_path: Path) -> None:
    """The weights have made the step, and so has the optimizer's count; the log is closed."""
    model, twin = network(), network()
    opt, alike = zo_fused.MeZO(model, lr=1e-2), zo_fused.MeZO(twin, lr=1e-2)
    opt.start_log(tmp_path / "log.jsonl")
    opt.step(loss_of(model))
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(OSError, match=r"log\.jsonl"):
        opt.step(loss_of(model))
    opt.close_log()
    opt.step(loss_of(model))
    for _ in range(3):
        alike.step(loss_of(twin))
    assert opt.step_count == 3
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
