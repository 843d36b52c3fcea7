"""A run to which anything may happen, beside a plain one to which the same happens."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from support.models import INPUT, network
from torch import Tensor, nn

import zo_fused

Make = Callable[..., Any]
COMMON = {"lr": 0.05, "eps": 0.05, "seed": 2**64 - 1}
LOW_RANK = {"rank": 2, "interval": 3}

# Method, options of both runs, and the schedule of the one to which things happen.
KINDS: dict[str, tuple[Make, dict[str, Any], dict[str, Any]]] = {
    "MeZO": (zo_fused.MeZO, {}, {"deferred": True}),
    "MeZO one-sided": (zo_fused.MeZO, {"one_sided": True}, {"deferred": True}),
    "MeZO-M": (zo_fused.MeZO, {"momentum": 0.9, "weight_decay": 0.1}, {"deferred": True}),
    "MeZO queries": (zo_fused.MeZO, {"queries": 2}, {"deferred": True}),
    "LOZO": (zo_fused.LOZO, LOW_RANK, {"deferred": True}),
    "LOZO factored": (zo_fused.LOZO, {**LOW_RANK, "weight_decay": 0.1}, {"mode": "factored"}),
    "LOZO paired": (zo_fused.LOZO, LOW_RANK, {"mode": "factored", "paired": True}),
    "LOZO-M": (zo_fused.LOZO, {**LOW_RANK, "momentum": 0.9}, {"mode": "factored"}),
    "ZOAdam": (zo_fused.ZOAdam, {"adam_eps": 1e-2}, {"deferred": True}),
    "ZOAdam history": (zo_fused.ZOAdam, {"adam_eps": 1e-2, "history": 3}, {"deferred": True}),
}


class Network(nn.Module):
    """With a parameter that the optimizer may get later, as a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.late = nn.Parameter(torch.linspace(-1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).double() * self.late.double()  # type: ignore[no-any-return]


class Failed(BaseException):
    """What no `except Exception` catches."""


class Run:
    """A network, its optimizer, and what may be done with both.

    Args:
        kind: of `KINDS`.
        disturbed: whether it has the other schedule; else it is the plain one.
    """

    def __init__(self, kind: str, disturbed: bool) -> None:
        self.make, options, schedule = KINDS[kind]
        self.options = {**COMMON, **options, **(schedule if disturbed else {})}
        self.net = Network()
        self.opt = self.made(self.net)

    def made(self, net: Network, **more: Any) -> Any:
        options = {**self.options, **more}
        if "mode" in options:
            options["module"] = net
        return self.make(list(net.body.named_parameters()), **options)

    def loss(self) -> Tensor:
        return self.net(INPUT).square().mean()

    @property
    def theta(self) -> Tensor:
        """As whoever looks finds it."""
        return torch.cat([p.detach().flatten() for p in self.net.parameters()])

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.opt.param_groups

    # ---- steps ----------------------------------------------------------------------------------

    def step(self) -> float:
        return float(self.opt.step(self.loss))

    def step_with(self, instead: Callable[[], Any], evaluation: int) -> Any:
        """One evaluation of the closure is something else."""
        count = 0

        def closure() -> Any:
            nonlocal count
            count += 1
            return instead() if count == evaluation + 1 else self.loss()

        return self.opt.step(closure)

    def split_step(self) -> None:
        queries = self.opt.schedule.queries
        losses: list[list[Tensor]] = [[], []]
        for query in range(queries):
            for sign, side in (
                (1, losses[0]),
                (0 if self.opt.schedule.one_sided else -1, losses[1]),
            ):
                self.opt.perturb(sign, query)
                side.append(self.loss().detach())
        self.opt.step(loss_plus=losses[0], loss_minus=losses[1])

    def halves(self) -> None:
        self.opt.estimate(self.loss)
        self.opt.step()

    # ---- what others do -------------------------------------------------------------------------

    def saved_and_loaded(self) -> None:
        """Another process goes on: weights and state come from a file."""
        state = copy.deepcopy(self.opt.state_dict())
        weights = copy.deepcopy(self.net.state_dict())
        late = len(self.groups) > 1
        flags = [p.requires_grad for p in self.net.parameters()]
        self.net = Network()
        self.net.load_state_dict(weights)
        for p, flag in zip(self.net.parameters(), flags, strict=True):
            p.requires_grad_(flag)
        self.opt = self.made(self.net, seed=5, lr=1.0)
        if late:
            self.add_late()
        self.opt.load_state_dict(state)

    def add_late(self) -> None:
        self.opt.add_param_group({"params": [("late", self.net.late)], "lr": 0.05})

    def copied(self) -> None:
        self.net, self.opt = copy.deepcopy((self.net, self.opt))

    def other_step(self, name: str) -> None:
        """Another optimizer on the same weights."""
        if name == "SGD":
            other = torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], 0.02)
            if other.param_groups[0]["params"]:
                self.loss().backward()
                other.step()
                other.zero_grad()
        elif name == "MeZO":
            zo_fused.MeZO(self.net, lr=0.02, eps=0.05, seed=8).step(self.loss)
        else:
            other = zo_fused.LOZO(self.net, mode="factored", lr=0.02, eps=0.05, seed=8)
            other.step(self.loss)
            other.flush()

    def write(self, how: str) -> None:
        weight: Any = self.net.body[2].weight
        with torch.no_grad():
            if how == "in place":
                weight.mul_(0.9)
            elif how == "data":
                weight.data.mul_(0.9)
            elif how == "memory":
                weight.data = weight.data.clone()
            else:
                self.net.load_state_dict({k: v * 0.9 for k, v in self.net.state_dict().items()})

    def from_a_thread(self) -> None:
        """A step in another thread, while nobody else is at work."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.step).result()

    def thread_within(self) -> list[Any]:
        """What another thread gets that uses the optimizer while it is in a step."""
        found: list[Any] = []

        def closure() -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(self.step).exception())
            return self.loss()

        self.opt.step(closure)
        return found

    @contextlib.contextmanager
    def another_dtype(self) -> Iterator[None]:
        """The weights are float64 meanwhile, which no sweep takes."""
        self.net.double()
        yield
        self.net.float()
