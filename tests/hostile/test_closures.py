"""Closures that do more than compute a loss. `test_runs.py` has those that raise, that return none
and that use the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.equality import in_memory
from support.methods import Case, those
from support.models import INPUT, network
from torch import Tensor, nn

import zo_fused

Act = Callable[[nn.Module, Any], object]
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "MeZO": lambda net: zo_fused.MeZO(net, lr=1e-2, eps=1e-2),
    "deferred": lambda net: zo_fused.MeZO(net, lr=1e-2, eps=1e-2, momentum=0.9, deferred=True),
    "factored": lambda net: zo_fused.LOZO(net, lr=1e-2, eps=1e-2, mode="factored"),
    "paired": lambda net: zo_fused.LOZO(net, lr=1e-2, eps=1e-2, mode="factored", paired=True),
    "ZOAdam": lambda net: zo_fused.ZOAdam(net, lr=1e-2, eps=1e-2),
}
every_method = pytest.mark.parametrize("method", METHODS)
# without those whose closure runs under `torch.vmap`, which has no rule for everything
no_vmap = pytest.mark.parametrize("method", [name for name in METHODS if name != "paired"])


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """Is put right, whatever a closure has left."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)


def loss_of(net: nn.Module) -> Tensor:
    return net(INPUT.float()).square().mean()


def run(method: str, closure: Callable[[nn.Module], Any], steps: int = 3) -> Tensor:
    net = network()
    opt = METHODS[method](net)
    for _ in range(steps):
        opt.step(lambda: closure(net))
    opt.flush()
    return in_memory(net)


def around(mode: Callable[[], Any]) -> Callable[[nn.Module], Tensor]:
    def closure(net: nn.Module) -> Tensor:
        with mode():
            return loss_of(net)

    return closure


def leaving(change: Callable[[], object]) -> Callable[[nn.Module], Tensor]:
    """The global state is another one when the closure returns."""

    def closure(net: nn.Module) -> Tensor:
        loss = loss_of(net)
        change()
        return loss

    return closure


SAME: dict[str, Callable[[nn.Module], Any]] = {
    "a loss that requires grad": around(torch.enable_grad),
    "no_grad": around(torch.no_grad),
    "one element": lambda net: loss_of(net).view(1, 1),
    "leaves gradients on": leaving(lambda: torch.set_grad_enabled(True)),
    "leaves another dtype": leaving(lambda: torch.set_default_dtype(torch.float64)),
    "draws": lambda net: (torch.randn(3), loss_of(net))[1],
}


@every_method
@pytest.mark.parametrize("name", SAME)
def test_the_weights_are_those_of_a_plain_closure(name: str, method: str) -> None:
    wanted = run(method, loss_of)
    assert torch.equal(run(method, SAME[name]), wanted)


@no_vmap
@pytest.mark.parametrize("closure", [around(torch.inference_mode), lambda net: float(loss_of(net))])
def test_closures_that_vmap_has_no_rule_for(closure: Any, method: str) -> None:
    assert torch.equal(run(method, closure), run(method, loss_of))


@every_method
def test_autocast_within_the_closure(method: str) -> None:
    """The casts of one evaluation are not those of the next."""

    def closure(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = net(INPUT)
        return out.float().square().mean()

    def fresh(net: nn.Module) -> Tensor:
        torch.clear_autocast_cache()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = net(INPUT)
        return out.float().square().mean()

    with torch.autocast("cpu", torch.bfloat16):  # an outer one keeps its cache from call to call
        found = run(method, closure)
    assert torch.equal(found, run(method, fresh))


REFUSED: dict[str, tuple[Act, str]] = {
    "lr": (lambda net, opt: opt.param_groups[0].update(lr=math.nan), "lr must be"),
    "eps": (lambda net, opt: opt.param_groups[0].update(eps=0.5), "eps changed in the middle"),
    "no eps": (lambda net, opt: opt.param_groups[0].update(eps=-1.0), "eps (must be|changed)"),
    "group": (
        lambda net, opt: opt.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]}),
        "in the middle of a step",
    ),
    "log": (lambda net, opt: opt.start_log("none.jsonl"), "in the middle of a step"),
    "load": (lambda net, opt: opt.load_state_dict({}), "in the middle of a step"),
}


@every_method
@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_run_is_refused_and_leaves_theta(name: str, method: str) -> None:
    act, message = REFUSED[name]
    net = network()
    theta, opt = in_memory(net), METHODS[method](net)
    hyper = {key: opt.param_groups[0][key] for key in ("lr", "eps")}

    def closure() -> Tensor:
        act(net, opt)
        return loss_of(net)

    with pytest.raises((ValueError, RuntimeError), match=message):
        opt.step(closure)
    torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=2.0**-23)
    assert len(opt.param_groups) == 1
    assert opt.step_count == 0
    opt.param_groups[0].update(hyper)
    opt.step(lambda: loss_of(net))


@no_vmap
def test_what_is_frozen_in_the_closure_is_frozen_from_the_next_step_on(method: str) -> None:
    net = network()
    opt = METHODS[method](net)
    opt.step(lambda: (net[0].weight.requires_grad_(False), loss_of(net))[1])
    opt.flush()
    now, then = in_memory(net), in_memory(net[0])
    for _ in range(2):
        opt.step(lambda: loss_of(net))
    opt.flush()
    assert torch.equal(net[0].weight.flatten(), then[: net[0].weight.numel()])
    assert not torch.equal(in_memory(net), now)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: zo_fused.MeZO(net),
        lambda net: zo_fused.LOZO(net, rank=2, deferred=True),
        lambda net: zo_fused.LOZO(net, rank=2, mode="factored"),
        lambda net: zo_fused.ZOAdam(net, queries=2),
    ],
)
def test_writes_that_a_log_lacks_are_noticed(
    make: Callable[[nn.Module], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = network()
    opt, loss = make(net), partial(loss_of, net)

    def write() -> Tensor:
        with torch.no_grad():
            net[0].bias.add_(0.1)
        return loss()

    opt.step(loss)
    write()  # without a log nobody is misled
    opt.step(loss)
    opt.flush()
    opt = make(net)
    opt.start_log(tmp_path / "log")
    for _ in range(2):
        opt.step(loss)
        net.state_dict()
        with opt.unperturbed():
            loss()
    assert not caplog.messages
    write()
    opt.step(loss)
    assert [text for text in caplog.messages if "while their replay log is open" in text]
    caplog.clear()
    opt.step(write)
    opt.step(write)
    assert [text[:31] for text in caplog.messages] == ["the closure writes to parameter"[:31]]


@those(lambda case: "," not in case.name)
def test_sweeps_are_not_taken_for_the_closure(make: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Also those over a permuted weight, which go through a copy of it."""
    net = network()
    net[0].weight = nn.Parameter(net[0].weight.detach().T.contiguous().T)
    opt = make(net)
    for _ in range(2):
        opt.step(partial(loss_of, net))
    assert not caplog.messages
