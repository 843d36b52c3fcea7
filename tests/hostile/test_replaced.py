"""Parameters, names and states that are replaced or removed between steps: refused, or right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import zo_fused

METHODS: dict[str, Callable[[Any], Any]] = {
    "mezo": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2),
    "deferred": lambda m: zo_fused.MeZO(m, lr=1e-2, eps=1e-2, deferred=True),
    "adam": lambda m: zo_fused.ZOAdam(m, lr=1e-2, eps=1e-2),
    "factored": lambda m: zo_fused.LOZO(m, lr=1e-2, eps=1e-2, mode="factored"),
    "p-gap": lambda m: zo_fused.PGAP(m, lr=1e-2, eps=1e-2, total_steps=9, vector_lr=1e-3),
    "muon": lambda m: zo_fused.ZOMuon(m, lr=1e-2, eps=1e-2),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


X = torch.linspace(-1, 1, 32).view(8, 4)


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def begun(method: str) -> tuple[nn.Sequential, Any]:
    model = net()
    optimizer = METHODS[method](model)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model))
    return model, optimizer


def tie(model: nn.Sequential, optimizer: Any) -> None:
    model[2].bias = model[0].bias  # type: ignore[union-attr]


def remove_a_layer(model: nn.Sequential, optimizer: Any) -> None:
    del model[2]


def parametrize(model: nn.Sequential, optimizer: Any) -> None:
    weight_norm(model[2])


def names_of(optimizer: Any) -> Any:
    return optimizer.param_groups[0]["param_names"]


def swap(model: nn.Sequential, optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0], params[-1] = params[-1], params[0]


def rename(model: nn.Sequential, optimizer: Any) -> None:
    names_of(optimizer).reverse()


def put_another(model: nn.Sequential, optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0] = nn.Parameter(params[0].detach().clone())


def leave_one_out(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


def append(model: nn.Sequential, optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))


CHANGES: dict[Callable[[nn.Sequential, Any], None], str] = {
    tie: "the module holds another parameter 'bias'",
    remove_a_layer: "no parameter '2.weight' any more",
    parametrize: "no parameter '2.weight' any more",
    swap: "another parameter '0.weight' than the module",
    rename: "another parameter '4.(bias|weight)' than the module",
    put_another: "another parameter '0.weight' than the module",
    leave_one_out: "params and . param_names",
    append: "params and . param_names",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_step_says_what_is_wrong(
    change: Callable[[nn.Sequential, Any], None], method: str
) -> None:
    model, optimizer = begun(method)
    change(model, optimizer)
    with pytest.raises((RuntimeError, ValueError), match=CHANGES[change]):
        optimizer.step(lambda: loss_of(model))


@pytest.mark.parametrize("method", ["mezo", "deferred", "adam"])
def test_a_parameter_that_the_module_has_elsewhere_goes_on(method: str) -> None:
    """torch's pruning keeps it as `weight_orig`. A mask of ones changes nothing."""
    (model, optimizer), (plain, other) = begun(method), begun(method)
    prune.identity(model[2], "weight")
    for m, one in ((model, optimizer), (plain, other)):
        one.step(lambda m=m: loss_of(m))
        one.flush()
    assert torch.equal(model[2].weight_orig, plain[2].weight)  # type: ignore[arg-type]


def empty(state: Any) -> None:
    state.clear()


def forget_one(state: Any) -> None:
    del state[next(key for key in state if isinstance(key, Tensor))]


@pytest.mark.parametrize("change", [empty, forget_one])
def test_a_state_that_was_taken_away(change: Callable[[Any], None]) -> None:
    """It was not noticed: the sweeps went on with moments that `state_dict` did not have."""
    model, optimizer = begun("adam")
    before = [p.detach().clone() for p in model.parameters()]
    change(optimizer.state)
    with pytest.raises(RuntimeError, match="state was cleared, or replaced"):
        optimizer.step(lambda: loss_of(model))
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # theta, but for rounding


def test_an_interval_of_zero() -> None:
    model, optimizer = begun("p-gap")
    for group in optimizer.param_groups:
        group["interval"] = 0
    with pytest.raises(ValueError, match="interval must be a whole number"):
        optimizer.step(lambda: loss_of(model))
