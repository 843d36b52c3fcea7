"""The methods and their variants: one row is all that a new method needs to be under every test
that holds for all of them (the `make` of a test runs over `CASES`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from support.models import blocks, network
from torch import nn

import zo_fused
from zo_fused.rules.separable_adam import SeparableAdam
from zo_fused.step.optimizer import ZerothOrderOptimizer

VARIANTS: dict[str, dict[str, Any]] = {
    "deferred": {"deferred": True},
    "one-sided": {"one_sided": True},
    "queries": {"queries": 3},
    "rademacher": {"distribution": "rademacher"},
    "hadamard": {"distribution": "hadamard"},
    "in turn": {"block_order": "sequential"},
    "at once": {"block_order": "simultaneous"},
    "history": {"history": 4},
    "random mask": {"mask": "random"},
    "factored": {"mode": "factored"},
    "refresh": {"refresh": 3, "interval": 3},
    "frozen": {"others": "frozen"},
    "looks": {"refresh": 3},
    "adam": {"moments": "adam"},
    "paired": {"mode": "factored", "paired": True},
    "antithetic": {"antithetic": True},
    "ranks": {"shaping": "centered_rank"},
    "unshaped": {"shaping": "none"},
    "low rank": {"direction": "lowrank", "rank": 2},
}
USUAL = ("deferred", "one-sided", "queries", "queries, deferred")


@dataclass(frozen=True)
class Method:
    """A row: the class, its options, and which variants of it are tested ("a, b": both)."""

    optimizer: Callable[..., ZerothOrderOptimizer]
    options: dict[str, Any]
    variants: tuple[str, ...] = USUAL


LOW_RANK = {"rank": 2, "interval": 3}
METHODS = {
    "MeZO": Method(
        zo_fused.MeZO,
        {},
        (
            *(*USUAL, "one-sided, deferred", "queries, one-sided", "queries, one-sided, deferred"),
            *("rademacher", "hadamard", "in turn", "at once"),
        ),
    ),
    "MeZO-M": Method(zo_fused.MeZO, {"momentum": 0.9, "dampening": 0.5}),
    "MeZO-GV": Method(
        zo_fused.MeZO,
        {"prior": "guiding"},
        (*USUAL, "queries, one-sided", "hadamard"),
    ),
    "MeZO-Greedy": Method(
        zo_fused.MeZO,
        {"prior": "greedy", "pool": 3},
        ("deferred",),
    ),
    "MeZO survivor": Method(
        zo_fused.MeZO,
        {"prior": "survivor"},
        ("deferred", "queries, one-sided, deferred"),
    ),
    "LOZO": Method(
        zo_fused.LOZO,
        {**LOW_RANK, "divide_by_rank": True},
        (*USUAL, "in turn", "factored", "queries, factored", "queries, paired", "hadamard"),
    ),
    "LOZO-M": Method(
        zo_fused.LOZO,
        {**LOW_RANK, "momentum": 0.9},
        ("deferred", "queries", "factored", "queries, paired"),
    ),
    "LOZO of activations": Method(
        zo_fused.LOZO,
        {**LOW_RANK, "basis": "activations"},
        (
            *("deferred", "one-sided, refresh", "queries, refresh", "refresh, deferred", "frozen"),
            *("factored, frozen", "refresh, factored", "queries, paired", "in turn", "hadamard"),
            *("adam", "adam, refresh, factored"),
        ),
    ),
    "LOZO-M of activations": Method(
        zo_fused.LOZO,
        {**LOW_RANK, "basis": "activations", "momentum": 0.9},
        ("refresh, deferred", "refresh, factored"),
    ),
    "SeeZO": Method(
        zo_fused.SeeZO,
        {"rank": 2, "queries": 2, "others": "random"},
        ("deferred", "looks, deferred", "looks, factored", "factored, frozen", "in turn"),
    ),
    "SubZero": Method(
        zo_fused.SubZero,
        {**LOW_RANK, "interval": 4},
        (
            *(*USUAL, "one-sided, deferred", "queries, one-sided", "in turn", "at once"),
            *("factored", "queries, one-sided, factored", "queries, paired"),
        ),
    ),
    "SubZero+": Method(
        zo_fused.SubZero,
        {**LOW_RANK, "moments": "adam"},
        ("deferred", "queries, one-sided", "at once", "queries, one-sided, factored", "paired"),
    ),
    "TeZO": Method(
        zo_fused.TeZO,
        {"rank": 3, "scale": True},
        (*USUAL, "queries, one-sided", "in turn", "factored", "queries, paired"),
    ),
    "TeZO-m": Method(
        zo_fused.TeZO,
        {**LOW_RANK, "momentum": 0.9},
        ("deferred", "queries", "at once", "queries, one-sided, factored"),
    ),
    "TeZO-Adam": Method(
        zo_fused.TeZO,
        {**LOW_RANK, "moments": "adam"},
        ("deferred", "queries", "one-sided, deferred", "at once"),
    ),
    "ZOAdam": Method(
        zo_fused.ZOAdam,
        {},
        (*USUAL, "rademacher", "queries, at once", "history", "history, deferred"),
    ),
    "ZOSignSGD": Method(zo_fused.ZOSignSGD, {}),
    "ZOSignSGD scalar": Method(zo_fused.ZOSignSGD, {"sign": "scalar"}, ("deferred",)),
    "SparseMeZO": Method(
        zo_fused.SparseMeZO,
        {"interval": 3, "share": 0.5},
        (
            *("one-sided", "queries", "queries, one-sided", "rademacher", "hadamard"),
            *("at once", "random mask"),
        ),
    ),
    "HiZOO": Method(zo_fused.HiZOO, {"hessian_smooth": 1e-2}, ("queries", "hadamard")),
    "KerZOO": Method(zo_fused.KerZOO, {}),
    "PGAP": Method(
        zo_fused.PGAP,
        {**LOW_RANK, "probes": 2, "total_steps": 20},
        ("one-sided", "queries", "factored", "queries, factored"),
    ),
    "PGAP joint": Method(
        zo_fused.PGAP,
        {
            **LOW_RANK,
            "probes": 3,
            "delta": (1.0, 1.0),
            "align": "joint",
            "probes_one_sided": True,
        },
        ("queries",),
    ),
    "SVD-0": Method(zo_fused.PGAP, {**LOW_RANK, "delta": None, "probes": 1}, ()),
    "ZOMuon": Method(
        zo_fused.ZOMuon,
        {**LOW_RANK, "queries": 2, "vector_lr": None},
        ("deferred", "in turn", "at once", "factored"),
    ),
    "ZOMuon, momentum": Method(
        zo_fused.ZOMuon,
        {**LOW_RANK, "queries": 2, "vector_lr": None, "momentum": 0.9, "one_sided": False},
        ("deferred", "factored"),
    ),
    "ZO-MOPI": Method(
        zo_fused.ZOMuon,
        {**LOW_RANK, "queries": 2, "vector_lr": None, "momentum": 0.9, "sign": "power"},
        ("deferred", "factored"),
    ),
    "ZOMuon, no sign": Method(
        zo_fused.ZOMuon, {**LOW_RANK, "queries": 1, "vector_lr": None, "sign": False}, ()
    ),
    "ConMeZO": Method(zo_fused.ConMeZO, {"momentum": 0.9, "warmup": 0}),
    "FZOO": Method(zo_fused.FZOO, {"queries": 3}, ("deferred", "hadamard", "in turn", "at once")),
    "LOREN": Method(zo_fused.LOREN, {"queries": 3}, ("deferred", "hadamard", "in turn", "at once")),
    "LOREN, no momentum": Method(
        zo_fused.LOREN, {"queries": 2, "momentum": 0.0, "rho": 1.0}, ("deferred", "at once")
    ),
    "MEAZO": Method(zo_fused.MEAZO, {}, (*USUAL, "in turn", "queries, at once")),
    # over plain parameters, which have negative elements
    "QZO": Method(
        zo_fused.QZO,
        {"clip": 0.5, "floor": None},
        ("one-sided", "queries", "rademacher"),
    ),
    "ZOConservative": Method(zo_fused.ZOConservative, {}, ("in turn",)),
    "ForwardGrad": Method(zo_fused.ForwardGrad, {}, ("queries",)),
    "ES": Method(
        zo_fused.ES,
        {"population": 4},
        (
            *(
                "deferred",
                "antithetic, hadamard",
                "antithetic, deferred",
                "ranks",
                "antithetic, unshaped",
            ),
            *("low rank", "low rank, antithetic, deferred", "low rank, deferred, ranks"),
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A method with the options of a variant: called like the method."""

    name: str
    optimizer: Callable[..., ZerothOrderOptimizer]
    options: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    def __call__(self, params: Any, **options: Any) -> ZerothOrderOptimizer:
        given = {"lr": 1e-3, "seed": 3, **self.options, **options}
        module = params if isinstance(params, nn.Module) else None
        if module is not None and "block_order" in given:
            params = blocks(module)
        if module is not None and self.optimizer is zo_fused.QZO:
            params = list(module.named_parameters())  # of a module it takes quantized layers alone
        if params is not module and {"mode", "basis", "others"} & given.keys():
            # a list of parameters belongs to no module: all are written, every V is random
            given.setdefault("module", module or nn.Module())
        return self.optimizer(params, **given)

    def has(self, *names: str) -> bool:
        """Whether any of these options isn't what it is by default."""
        return any(self.options.get(name) for name in names)


def _cases(name: str, method: Method) -> list[Case]:
    cases = [Case(name, method.optimizer, method.options)]
    for variant in method.variants:
        options = dict(method.options)
        for part in variant.split(", "):
            options |= VARIANTS[part]
        cases.append(Case(f"{name}, {variant}", method.optimizer, options))
    return cases


CASES = {case.name: case for row in METHODS.items() for case in _cases(*row)}


def those(accept: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Runs a test over the cases that are accepted, instead of over all."""
    return pytest.mark.parametrize("make", list(filter(accept, CASES.values())), ids=str)


def rounds(case: Case) -> bool:
    """Whether its updates may be rounded at random."""
    return "rounding" in case(network()).defaults


def evaluates_both_sides(case: Case) -> bool:
    """All weights at theta + eps z, then at theta - eps z, and nothing else."""
    several = case.has("one_sided", "queries", "block_order", "paired", "basis", "prior")
    return not (several or case.optimizer.needs_closure)  # type: ignore[attr-defined]


def makes_panels(case: Case) -> bool:
    """Whether its update is no sweep but several over panels of rows."""
    return isinstance(case(network()).rule, SeparableAdam)
