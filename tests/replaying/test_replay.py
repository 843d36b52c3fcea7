"""The replay log: the tuned weights come back bit for bit, whatever happened on the way."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.matrix import covering
from support.methods import CASES, Case, evaluates_both_sides, rounds, those
from support.models import MIXED, loss_of, network, same
from torch import Tensor, nn

import zo_fused
from zo_fused.step import log_lines
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
        file.write("[4,0.12")
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
    assert log.stat().st_size - header < 100 * 24


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
    log.write_text(log.read_text().replace('"transform":"signs"', '"transform":"rademacher"'))
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


# ---- logs that don't fit ------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    model = network()
    opt = CASES["MeZO"](model, lr=1e-2)
    logged_run(opt, model, tmp_path / "log.jsonl", steps=2)
    opt.close_log()
    return tmp_path / "log.jsonl"


def edit(log: Path, line: int, change: Callable[[object], object]) -> None:
    lines = log.read_text().splitlines()
    lines[line] = json.dumps(change(json.loads(lines[line])))
    log.write_text("\n".join(lines) + "\n")


def header(**values: object) -> Callable[[object], object]:
    return lambda value: {**value, **values}  # type: ignore[dict-item]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "contract": (lambda log: edit(log, 0, header(contract=2)), "contract 2"),
    "version": (lambda log: edit(log, 0, header(version=9)), "version 9"),
    "method": (lambda log: edit(log, 0, header(method="SGD")), "method 'SGD'"),
    "other file": (lambda log: edit(log, 0, lambda _: {"a": 1}), "not a zo_fused replay log"),
    "event": (lambda log: edit(log, 2, lambda _: [1, "x"]), "line 3: not an event"),
    "text": (lambda log: log.write_text(log.read_text() + "what\n"), "line 4: not JSON"),
    "empty": (lambda log: log.write_text(""), "no complete header"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damaged_logs_are_refused_and_weights_stay(log: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(log)
    base = network()
    with pytest.raises(ValueError, match=message):
        zo_fused.replay(base, log)
    assert same(base, network())


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dtype": (lambda: network(torch.float16), "load the base model in the dtype of the run"),
    "shape": (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), r"\[9, 6\]"),
    "names": (lambda: nn.ModuleDict({"x": network()}), "no parameter '0.weight'"),
    "weights": (lambda: network().apply(lambda m: m), "other base weights"),
}


@pytest.mark.parametrize("misfit", list(MISFITS))
def test_models_that_do_not_fit_are_refused(log: Path, misfit: str) -> None:
    build, message = MISFITS[misfit]
    model = build()
    if misfit == "weights":
        with torch.no_grad():
            model[2].bias[0] += 1
    with pytest.raises(ValueError, match=message):
        zo_fused.replay(model, log)


class Codes(Tensor):
    """A quantized weight as those of torchao: other tensors inside, and no views."""

    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Codes:
        return cls(**inner)

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple, kwargs: object) -> Codes:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def test_a_frozen_quantized_weight_is_part_of_the_base(tmp_path: Path) -> None:
    def base(code: int) -> nn.Module:
        model = network()
        codes = torch.full((3, 3), code, dtype=torch.int8)
        model.frozen = nn.Parameter(Codes(codes, torch.ones(3)), requires_grad=False)
        return model

    model = base(1)
    logged_run(zo_fused.MeZO(model, lr=1e-2), model, tmp_path / "log", 3)
    replayed = base(1)
    assert zo_fused.replay(replayed, tmp_path / "log") == 3
    assert torch.equal(replayed[0].weight, model[0].weight)
    with pytest.raises(ValueError, match="other base weights"):
        zo_fused.replay(base(2), tmp_path / "log")


def test_missing_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        zo_fused.replay(network(), tmp_path / "none.jsonl")


def test_reader_gives_settings_to_every_event(log: Path) -> None:
    record = log_lines.read(log, 1)
    assert [e.step for e in record.events] == [0, 1]
    assert all(e.groups[0]["lr"] == 1e-2 and e.trainable == [0, 1, 2, 3] for e in record.events)


def line(value: object) -> Callable[[Path], None]:
    """The first event of the log is another."""
    return lambda log: edit(log, 1, lambda _: value)


def text_of_line(text: str) -> Callable[[Path], None]:
    def change(log: Path) -> None:
        lines = log.read_text().splitlines()
        log.write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")

    return change


def of_group(**values: object) -> Callable[[Path], None]:
    return lambda log: edit(
        log,
        0,
        lambda value: {**value, "groups": [{**value["groups"][0], **values}]},  # type: ignore
    )


def of_header(**values: object) -> Callable[[Path], None]:
    return lambda log: edit(log, 0, header(**values))


def without(name: str) -> Callable[[Path], None]:
    return lambda log: edit(log, 0, lambda v: {k: v[k] for k in v if k != name})  # type: ignore


EDITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "step removed": (
        lambda log: log.write_text("".join(log.read_text().splitlines(True)[::2])),
        "line 2: not an event .step 1 comes where step 0 is due",
    ),
    "step twice": (lambda log: edit(log, 2, lambda _: [0, 1.0]), "step 0 comes where step 1 is"),
    "step of another kind": (line([0.0, 1.0]), "step 0.0 comes where step 0 is due"),
    "step before the first": (line([-1, 1.0]), "step -1 comes where"),
    "first step": (of_header(first_step=-1), r"first_step must be a whole number in \[0, "),
    "nan": (text_of_line("[0,NaN]"), "a projected gradient must be a finite number, got nan"),
    "too large for float32": (line([0, 3.5e38]), "a finite number, got 3.5e\\+38"),
    "infinite": (text_of_line("[0,1e999]"), "a finite number, got inf"),
    "a number of 400 digits": (text_of_line(f"[0,1,[1{'0' * 400}]]"), "a finite number, got 1000"),
    "text for a number": (line([0, "1.5"]), "a finite number, got '1.5'"),
    "true for a number": (line([0, True]), "a finite number, got True"),
    "two gradients": (line([0, [1.0, 1.0]]), "it has 2 projected gradients, not 1"),
    "a query that the run lacks": (line([0, 1.0, [[1, 7]]]), "a query must be a whole number in"),
    "a block that the run lacks": (line([0, 1.0, [[1, 0, 3]]]), "there is no block 3"),
    "coefficients": (line([0, 1.0, [{"at": [1, 2]}]]), "at has 2 values, not 1"),
    "no path": (line([0, "restore"]), "a restore has no path"),
    "no event": (line([0]), "it has 1 values, not two to four"),
    "position": (line({"trainable": [4]}), r"a position in trainable must .* \[0, 4\), got 4"),
    "position twice": (line({"trainable": [1, 1]}), "trainable has a position twice"),
    "settings": (line({"seed": 1}), "there is no setting 'seed'"),
    "groups": (line({"groups": []}), "there are 0 groups, not 1"),
    "lr": (of_group(lr=-1.0), "lr is -1.0"),
    "eps": (of_group(eps=0), "eps is 0"),
    "lr that is no number": (of_group(lr=math.nan), "lr must be a finite number, got nan"),
    "block": (of_group(block=0.5), "block must be a whole number, got 0.5"),
    "hyper-parameter": (of_group(momentum=[0.9]), "momentum must be a finite number, got "),
    "hyper-parameters": (line({"groups": [{"lr": 1.0}]}), "a group lacks one of"),
    "nothing that moves": (line({"trainable": []}), "nothing is trainable"),
    "seed": (of_header(seed="3"), "line 1: not a header .seed must be a whole number in"),
    "no groups": (without("groups"), "line 1: not a header .groups is missing"),
    "no parameters": (of_header(parameters=[]), "parameters must not be empty"),
    "parameters": (of_header(parameters=[["a", [1], "float32", 1]]), "the group of a parameter"),
    "queries": (of_header(options={"queries": 10**9}), r"queries must .* \[0, 1048576\)"),
    "brackets": (text_of_line("[" * 100_000), "line 2: not JSON"),
    "encoding": (lambda log: log.write_bytes(log.read_bytes() + b"\xff\n"), "line 4: not JSON"),
    "number of digits": (text_of_line(f"[{'1' * 9999},1]"), "line 2: not JSON"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_logs_are_refused_and_weights_stay(log: Path, name: str) -> None:
    change, message = EDITS[name]
    change(log)
    base = network()
    with pytest.raises(ValueError, match=message) as refused:
        zo_fused.replay(base, log)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300 + len(str(log))
    assert same(base, network())


# ---- a log that is gone or changed under the run ------------------------------------------------


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
