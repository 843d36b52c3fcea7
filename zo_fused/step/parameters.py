"""The parameters of an optimizer, in buckets, looked at before every step."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from zo_fused.noise.streams import plain_name
from zo_fused.step.buckets import (
    Bucket,
    labels,
    make_buckets,
    parameter_ids,
    requires_grad,
    signature,
)
from zo_fused.step.direction import Beside, Direction
from zo_fused.step.groups import Groups
from zo_fused.step.guard import Guard
from zo_fused.step.sharded import HasReason, Resharding, check_sharded
from zo_fused.sweeps.operators import CALLS
from zo_fused.sweeps.shards import locals_of

logger = logging.getLogger("zo_fused")

_VERSION = operator.attrgetter("_version")


class Chooses:
    """What an optimizer tunes. A method may choose otherwise."""

    moves: Callable[[Tensor], bool] = staticmethod(requires_grad)
    """Of what it was given; looked at before every step."""

    @staticmethod
    def found_in(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """Of a module, by name."""
        return module.named_parameters()


def _no_layers(*values: Any) -> bool:
    return not any(isinstance(value, nn.Module) for value in values)


def _places(module: nn.Module | None) -> tuple[list[Any], ...]:
    """Where a module has parameters and modules: tables, names, what is there."""
    columns: tuple[list[Any], ...] = ([], [], [])
    for part in module.modules() if module is not None else ():
        for table in (part._parameters, part._modules):
            for name, value in table.items():
                for column, entry in zip(columns, (table, name, value), strict=True):
                    column.append(entry)
    return columns


class Parameters:
    """Those that move, a bucket a device.

    Args:
        groups: of the optimizer.
        by_block: whether the parameters of a block have a bucket of their own.
        module: that was given to the optimizer.
        guard: of what is swept.
        moves: whether a parameter is tuned, looked at before every step.

    Attributes:
        trainable: positions of the parameters that move, instead of `moves` (for replay).
        checks: what a method has to say of a module that is not what it was; each may raise.
    """

    def __init__(
        self,
        groups: Groups,
        by_block: bool,
        module: nn.Module | None,
        guard: Guard,
        moves: Callable[[Tensor], bool],
    ) -> None:
        self.buckets: list[Bucket] = []
        self.trainable: set[int] | None = None
        self._groups = groups
        self._by_block = by_block
        self._guard = guard
        self._moves = moves
        self.checks: list[Callable[[], None]] = []
        self._signature: tuple[Any, ...] | None = None
        self._versioned: list[Tensor] = []  # those whose changes autograd can be told
        self._seen: tuple[int, int] | None = None  # their versions, since autograd was told,
        self._calls = 0  # and the calls of operators that there were when they were asked for
        self._module = module
        self._of: tuple[type[Chooses], tuple[HasReason, ...]] = (Chooses, ())  # who checked last
        self._places = _places(module)
        self._resharding = Resharding(module)

    def check_module(self, state: Collection[Any]) -> None:
        """The module may hold another parameter now, or another layer, which the forward pass then
        uses.

        Args:
            state: of the optimizer.
        """
        self._resharding.close()
        tables, names, held = self._places
        now = list(map(dict.get, tables, names))  # in loops of C
        if not all(map(operator.is_, now, held)):
            pairs = zip(names, held, now, strict=True)
            others = ((name, a, b) for name, a, b in pairs if b is not a and b is not None)
            other = next((name for name, a, b in others if _no_layers(a, b)), None)
            if other is None:
                self._check_layers()
            elif not self._follows(state):
                raise RuntimeError(
                    f"the module holds another parameter {other!r} than when the optimizer was made"
                    " (load_state_dict(assign=True), or an assignment?): make the optimizer anew"
                )
            self._held_anew()
        for check in self.checks:
            check()

    def _check_layers(self) -> None:
        """Layers were replaced or removed, or parameters were: the module may have what was in them
        elsewhere now, or it is out of use."""
        assert self._module is not None
        lost = set(map(id, self._places[2])) - set(map(id, _places(self._module)[2]))
        for label, p in zip(labels(self._groups.all), self._groups.params(), strict=True):
            if id(p) in lost and self._moves(p):
                raise RuntimeError(
                    f"the module has no parameter {label} any more: its layer was replaced or "
                    "removed, or got a parametrization, after the optimizer was made; make the "
                    "optimizer anew"
                )

    def _follows(self, state: Collection[Any]) -> bool:
        """Whether the groups were given the parameters that the module holds now, as accelerate
        does when it has sharded a model (FSDP2).

        Raises:
            RuntimeError: a state is of those before.
        """
        assert self._module is not None
        now = {plain_name(n): p for n, p in self._module.named_parameters(remove_duplicate=False)}
        names = chain.from_iterable(group.get("param_names", ()) for group in self._groups.all)
        params = self._groups.params()
        found = list(map(now.get, names))
        if len(found) != len(params) or not all(map(operator.is_, found, params)):
            return False
        if any(isinstance(key, Tensor) for key in state):
            raise RuntimeError(
                "the optimizer has a state of parameters that were replaced since (by accelerate's "
                "prepare?): prepare model and optimizer before the first step"
            )
        return True

    def _held_anew(self) -> None:
        self._places = _places(self._module)
        self._resharding = Resharding(self._module)
        self._resharding.close()

    def check(self, method: type[Chooses], *parts: HasReason) -> None:
        """Raises:
        ValueError: two parameters share a name.
        NotImplementedError, ValueError: see `zo_fused.step.sharded.check_sharded`.
        """
        self._of = method, parts
        self._check_names()
        parameter_ids(self._groups.all)
        params, names = self._groups.params(), labels(self._groups.all)
        check_sharded(method.__name__, params, names, self._module, *parts)

    def _check_names(self) -> None:
        """Names tell parameters apart in noise, logs and states, so they must be the module's.

        Raises:
            ValueError: there are not as many names as parameters, or under a name the groups have
                another parameter than the module.
        """
        for group in self._groups.all:
            count, named = len(group["params"]), len(group.get("param_names") or group["params"])
            if count != named:
                raise ValueError(
                    f"a param group has {count} params and {named} param_names: add what is new by "
                    "add_param_group, and freeze what is not to move (requires_grad_(False))"
                )
        if self._module is None:
            return
        held: dict[str, list[Tensor]] = {}  # wrapped parts may share a name: said by the buckets
        for name, p in self._module.named_parameters(remove_duplicate=False):
            held.setdefault(plain_name(name), []).append(p)
        for group in self._groups.all:
            names = group.get("param_names") or ()
            for name, p in zip(names, group["params"] if names else (), strict=True):
                if not any(p is of_it for of_it in held.get(plain_name(name), [p])):
                    raise ValueError(
                        f"the param groups have another parameter {name!r} than the module: params "
                        "and param_names were changed, or one without the other; make the optimizer"
                        " anew"
                    )

    def changed(self, direction: Direction) -> bool:
        """Whether the buckets must be made anew: what requires gradients, or where it lies, is not
        what it was."""
        return self._now(direction) != self._signature

    def renew(self, direction: Direction) -> None:
        """Make the buckets."""
        method, parts = self._of
        self.check(method, *parts)  # which may have come by pickle, without module, or be others
        in_place = None
        while in_place is None or in_place != self._in_place(direction):
            in_place = self._in_place(direction)
            signature_now, names = self._now(direction), self._names(direction)
            self.buckets = make_buckets(
                self._groups.all,
                self.trainable,
                names,
                in_place,
                self._by_block,
                self._moves,
                direction.matrices,
            )
            self._signature = signature_now
            if not isinstance(direction, Beside):
                break
            for p, reason in direction.out_of_reach(self.buckets):
                self.keep_in_place(p, reason)
        self._watch()

    def forget(self) -> None:
        """The buckets are of no use any more."""
        self.buckets, self._signature = [], None

    def keep_in_place(self, param: Tensor, reason: str) -> None:
        """From the next evaluation on, this parameter is perturbed in place."""
        position = next(i for i, p in enumerate(self._groups.params()) if p is param)
        name = labels(self._groups.all)[position].strip("'")
        known = self._groups.shared("in_place")
        if position in known:
            raise RuntimeError(f"parameter {name} {reason} although it is perturbed in place")
        logger.info("parameter %s is perturbed in place: it %s", name, reason)
        self._groups.count(in_place=(*known, position))

    def tell_autograd(self) -> None:
        """A graph that was built over the weights before must not be differentiated now."""
        self._seen = None
        torch.autograd.graph.increment_version(self._versioned)
        torch.clear_autocast_cache()  # of an outer autocast: it has cast weights of before

    def versions(self) -> tuple[int, int]:
        """Other ones, when anything but sweeps has written to a parameter by operations of torch
        (what goes through ``p.data`` torch doesn't count), or others are tuned."""
        with torch._C.DisableTorchFunctionSubclass():
            self._seen = id(self._versioned), sum(map(_VERSION, self._versioned))  # a loop of C
        self._calls = CALLS["made"]
        return self._seen

    def last_versions(self) -> tuple[int, int]:
        """`versions`, as they were when last asked for, if only prepared sweeps wrote since."""
        return (self._calls == CALLS["made"] and self._seen) or self.versions()

    def _now(self, direction: Direction) -> tuple[Any, ...]:
        """What buckets are made from."""
        seen = signature(self._groups.all, self._names(direction), self._moves)
        return seen, self.trainable, self._in_place(direction)

    def _names(self, direction: Direction) -> tuple[str, ...]:
        """Hyper-parameters that buckets hold on to."""
        return (*direction.fixed, "block") if self._by_block else direction.fixed

    def _in_place(self, direction: Direction) -> set[int] | None:
        """Positions of the matrices beside which nothing can be kept, where something is kept."""
        return set(self._groups.shared("in_place")) if isinstance(direction, Beside) else None

    def _watch(self) -> None:
        """Guard what is swept, also under another parameter that has the same memory."""
        owners = [p for bucket in self.buckets for p in bucket.owners]
        parts = locals_of(owners)
        shards = [part for p, part in zip(owners, parts, strict=True) if part is not p]
        self._versioned = [p for p in owners + shards if not p.is_inference()]
        self._seen = None
        swept = {part.data_ptr() for part in parts if part.numel()}
        everyone = self._groups.params()
        held = zip(everyone, locals_of(everyone), strict=True)
        self._guard.over([p for p, part in held if part.data_ptr() in swept])
        self._resharding.before_forward(self._guard.look)
