"""States that are damaged: refused when they are loaded, or by the step that meets what is wrong;
or they are right. No weight moves, and none becomes a number that is none."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing.mutations import VALUES, mutated
from support.equality import in_memory
from support.models import loss_of, network
from torch import nn

import zo_fused

METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "MeZO-M": lambda net: zo_fused.MeZO(net, lr=1e-2, momentum=0.9),
    "MeZO": lambda net: zo_fused.MeZO(net, lr=1e-2, deferred=True),
    "LOZO-M": lambda net: zo_fused.LOZO(
        net, lr=1e-2, momentum=0.9, rank=2, interval=3, mode="factored"
    ),
    "ZOAdam": lambda net: zo_fused.ZOAdam(net, lr=1e-2),
    "history": lambda net: zo_fused.ZOAdam(net, lr=1e-2, history=3),
    "SubZero+": lambda net: zo_fused.SubZero(net, lr=1e-2, rank=2, moments="adam"),
    "LOREN": lambda net: zo_fused.LOREN(net, lr=1e-2, queries=3),
}
OTHERS: list[Any] = [
    *(*VALUES, math.nan, math.inf, b"x", (), (1, 2, 3), object(), torch.ones(2), torch.tensor(2.0)),
    *(torch.tensor(math.nan), torch.full((8, 6), math.inf), torch.zeros(8, 6), torch.zeros(6, 8)),
    *(torch.zeros(8, 6, dtype=torch.int8), torch.zeros(8, 6, dtype=torch.float64)),
]


@pytest.mark.parametrize("amount", [40, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_damaged_states(method: str, amount: int) -> None:
    trained = network()
    opt = METHODS[method](trained)
    for _ in range(2):
        opt.step(loss_of(trained))
    saved, rng = copy.deepcopy(opt.state_dict()), random.Random(method)
    theta, weights = in_memory(trained), copy.deepcopy(trained.state_dict())
    for _ in range(amount):
        damaged = mutated(copy.deepcopy(saved), rng, OTHERS)
        net = network()
        net.load_state_dict(weights)
        again = METHODS[method](net)
        try:
            again.load_state_dict(damaged)
        except (TypeError, ValueError):
            assert torch.equal(in_memory(net), theta)
            continue
        try:
            again.step(loss_of(net))
        except Exception:  # it may be a KeyError of a name that is missing
            torch.testing.assert_close(in_memory(net), theta, rtol=0, atol=1e-6)
        again.flush()
        assert in_memory(net).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("state"), "no state of an optimizer"),
        (lambda state: state.pop("param_groups"), "no state of an optimizer"),
        (lambda state: state["param_groups"].append([]), "has no list of params"),
        (lambda state: state["param_groups"][0].pop("eps"), "group 0 has no eps"),
        (lambda state: state["param_groups"][0].pop("seed"), "seed of the state"),
        (lambda state: state["state"][1].pop("exp_avg"), "1 has exp_avg_sq and no exp_avg"),
        (lambda state: state["param_groups"][0]["params"].__setitem__(1, 0), "each once"),
        (lambda state: state["param_groups"][0]["param_names"].pop(), "a name for each"),
        (lambda state: state["state"].update({0: 3}), "state of parameter 0 is no dictionary"),
        (lambda state: state["state"][1]["exp_avg"].fill_(math.nan), "has exp_avg that is not"),
        (lambda state: state["state"][1].update(step=torch.tensor(-1.0)), r"step must be in \[0"),
        (lambda state: state["state"][1].update(step=2**30), r"step must be in \[0, 2\*\*30\)"),
        (lambda state: state["state"][1].update(step=torch.ones(2)), "step must be one number"),
    ],
)
def test_what_is_wrong_is_said(change: Callable[[Any], object], message: str) -> None:
    net = network()
    opt = zo_fused.ZOAdam(net)
    opt.step(loss_of(net))
    state = copy.deepcopy(opt.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    opt.step(loss_of(net))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda net: zo_fused.SeeZO(net, rank=2), "basis_step"),
        (lambda net: zo_fused.SparseMeZO(net), "mask_window"),
        (lambda net: zo_fused.ConMeZO(net), "rms"),
        (lambda net: zo_fused.ZOAdam(net, history=2), "step"),
        (lambda net: zo_fused.SubZero(net, rank=2, moments="adam"), "core_exp_avg_sq"),
        (lambda net: zo_fused.ZOMuon(net, rank=2, sign="power", momentum=0.9), "right_vectors"),
    ],
)
def test_what_a_parameter_lacks_is_named(make: Callable[[nn.Module], Any], name: str) -> None:
    net = network()
    opt = make(net)
    for _ in range(2):
        opt.step(loss_of(net))
    state = copy.deepcopy(opt.state_dict())
    del next(values for values in state["state"].values() if name in values)[name]
    before = repr(opt.state_dict())
    with pytest.raises(ValueError, match=f"and no {name}"):
        opt.load_state_dict(state)
    assert repr(opt.state_dict()) == before


def test_a_state_of_a_hybrid_is_loaded_whole_or_not_at_all() -> None:
    net = network()
    layers = list(net.children())
    first = zo_fused.ZOAdam(layers[0].parameters())
    opt = zo_fused.Hybrid(first, torch.optim.Adam(layers[-1].parameters()))
    opt.step(loss_of(net))
    saved, before = copy.deepcopy(opt.state_dict()), repr(opt.state_dict())
    for part in ("zo", "fo"):
        for damaged in (
            {name: state for name, state in saved.items() if name != part},
            {**saved, part: {**saved[part], "param_groups": []}},
        ):
            damaged = copy.deepcopy(damaged)
            if "fo" in damaged and damaged["fo"]["param_groups"]:
                damaged["fo"]["param_groups"][0]["lr"] = 0.5
            with pytest.raises(ValueError, match=f"'{part}'|different number of parameter groups"):
                opt.load_state_dict(damaged)
            assert repr(opt.state_dict()) == before
