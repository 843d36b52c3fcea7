"""The step that all zeroth-order optimizers share.

A method is a direction (`zo_fused.directions.low_rank`: how z is made) and an update rule
(`zo_fused.rules.sgd`: what a projected gradient does). This file perturbs, evaluates, restores,
guards and records.
"""

from __future__ import annotations

import logging
import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from zo_fused.checks import finite, whole
from zo_fused.noise.keys import Clock, Stream, clock, running, stream_keys
from zo_fused.noise.streams import CONTRACT_VERSION, Purpose, plain_name
from zo_fused.step import replay_log
from zo_fused.step.buckets import Bucket, fingerprint, make_buckets, parameter_ids, signature
from zo_fused.step.direction import Direction, Term, UsedOtherwise
from zo_fused.step.generators import GeneratorStates, capturing
from zo_fused.step.guard import DISPLACED, Guard
from zo_fused.step.hyper import check_group, hyper, names_of
from zo_fused.step.interrupts import uninterrupted
from zo_fused.step.record import parameter_table, settings
from zo_fused.step.rule import Rule, Update
from zo_fused.step.schedule import Position, Schedule
from zo_fused.step.vectors import (
    Flag,
    Vector,
    all_finite,
    as_tensor,
    flag_on,
    float32_scalar,
    on,
    on_host,
    stacked,
    to_float32,
    vector,
)

logger = logging.getLogger("zo_fused")

Loss = Tensor | float  # or any real number, such as NumPy's
Closure = Callable[[], Loss]

Method = TypeVar("Method", bound=Callable[..., Any])


def _plain_tensors(method: Method) -> Method:
    """No gradients, and no inference tensors: state made in a caller's inference mode would
    refuse to be updated outside it."""
    decorated: Method = torch.inference_mode(False)(torch.no_grad()(method))
    return decorated


_NEEDS_LOSSES = (
    "step() needs a closure, step(lambda: model(**batch).loss), or loss_plus and loss_minus. There "
    "is no backward pass: a loop that calls step() itself, such as the Trainer of transformers or "
    "accelerate's, must call opt.estimate(closure) where it called loss.backward()"
)
_NO_BACKWARD = (
    "zo_fused: a zeroth-order closure returns the loss and calls no backward(): step() evaluates "
    "it without gradients"
)

# Kept in every param group, where `state_dict` leaves integers as they are.
_COUNTERS = ("seed", "step", "restores", "contract", "in_place", "method")

# A loss that doesn't change in so many steps in a row is worth a word.
_IDLE_STEPS = 20


def _check_closure(closure: Any) -> None:
    if not callable(closure):
        raise TypeError(
            f"a function that computes the loss is needed, got {type(closure).__name__}: "
            "opt.step(lambda: model(**batch).loss)"
        )


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: estimates along one direction a step.

    ``g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)`` (SPSA; Spall 1992), where z belongs to
    the step: it is drawn anew in every sweep from (seed, step, query, parameter id, element index).
    With ``one_sided=True``, ``g = (L(theta + eps z) - L(theta)) / eps``: one sweep less (two in
    both schedules), for an estimate that is biased by the curvature. With ``queries=q`` a step
    takes q such estimates, each with a z of its own, and their mean is the gradient (one-sided ones
    share L(theta)): ``2 q`` or ``q + 1`` losses, and one sweep for the whole update.

    Blocks: with ``block_order`` the param groups that have the same number under "block"
    (`zo_fused.layer_blocks` makes them) are perturbed without the others. "sequential": every step
    is of one block, in turn (give a whole round the same batch for the sweep through all blocks of
    arXiv 2402.11592). "simultaneous": a step estimates every block at the same weights, with losses
    of its own, and then updates them all: less variance, at the price of 2 losses a block.

    The sweeps of a step are ``+eps``, ``-2 eps``, and restore together with the update; with
    ``deferred=True`` the last one also moves to ``+eps`` of the next step, so that there are two,
    and weights rest perturbed between steps. Whoever looks at a parameter then finds it at theta
    all the same (`zo_fused.step.guard`), at the price of one more sweep: saves, copies, merges of
    an adapter, forward passes between steps, other optimizers. `flush` or `eval` put them there
    beforehand. Memory that was taken out of a parameter earlier (``p.data``) shows what is there.

    In 16 bits a restore is exact only up to the rounding of the dtype (docs/noise.md, "Rounding").
    With ``rounding="stochastic"`` the update is rounded at random, without bias, so that updates
    far below a weight's last place add up over the steps also where no restore goes with them
    (docs/performance.md); perturbations are rounded to nearest all the same. float32 weights have
    nothing to round.

    Args:
        params: ``model.named_parameters()`` (best: noise is tied to names), ``model.parameters()``
            (noise is tied to positions), param groups, or the module itself. Only parameters that
            require gradients move; this is looked up at every step.
        defaults: hyper-parameters of the groups.
        direction, rule: see above.
        seed: base seed of the run, ``0 <= seed < 2**64``. The global generators are never used.
        schedule: deferred, one_sided, queries, block_order: see above.
        options: arguments of the method that groups don't tell, recorded in the replay log.

    Attributes:
        projected_grad: g of the last step, float32 tensor [] on the device of the first parameter;
            with several queries or blocks [blocks * queries].
        timings: None, or a dict to which `step` adds seconds under "perturb", "forward", "update"
            (on GPUs this waits for the device).
    """

    needs_closure = False  # whether `step` can't do with losses

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        direction: Direction,
        rule: Rule,
        seed: int,
        schedule: Schedule,
        options: dict[str, Any] | None = None,
    ) -> None:
        seed = whole("seed", seed, 0, bits=64)
        defaults = {name: hyper(name, value) for name, value in defaults.items()}
        module = params if isinstance(params, nn.Module) else None
        if module is not None:
            params = module.named_parameters()
        elif isinstance(params, Mapping) or callable(params):
            raise TypeError(
                "params must be a module, its named_parameters() or parameters(), or param groups, "
                f"got {type(params).__name__}"
            )
        self._direction = direction
        self._rule = rule
        self._schedule = schedule
        self._options = {**asdict(schedule), **(options or {})}
        self._reset()
        counters: dict[str, Any] = dict.fromkeys(_COUNTERS, 0)
        # in_place: positions of the matrices that a direction can't keep its changes beside
        counters |= {"seed": seed, "contract": CONTRACT_VERSION, "in_place": ()}
        counters["method"] = self._kind()
        super().__init__(params, {"block": 0, **defaults, **counters})
        for part in module.modules() if module is not None else ():
            for name, p in part._parameters.items():
                for column, value in zip(self._places, (part._parameters, name, p), strict=True):
                    column.append(value)

    def _reset(self) -> None:
        self.projected_grad: Tensor | None = None
        self.timings: dict[str, float] | None = None
        self._skipped: int | Tensor = 0
        self._counter: Tensor | None = None  # on a GPU: the step, for captured steps
        self._captured = False  # then graphs may have moved it on
        self._at: list[float] = []  # coefficient of z in the weights, a group; empty: at theta
        self._query = 0  # whose z that is
        self._path: list[Any] = []  # perturbations of this step, as the log has them
        self._ahead = False  # displaced by the last step's sweep; this step has not begun
        self._buckets: list[Bucket] = []
        self._places: tuple[list[Any], ...] = ([], [], [])  # a module's tables, names, parameters
        self._signature: tuple[Any, ...] | None = None
        self._seen: list[Any] = []  # in the groups, when they were checked last,
        self._inside: list[tuple[Tensor, float]] = []  # and in the tensors there
        self._log: replay_log.Writer | None = None
        self._trainable_override: set[int] | None = None
        self._generators: GeneratorStates | None = None  # before the last evaluation
        self._busy = threading.Lock()
        self._guard = Guard(self._show_theta)
        self._held: uninterrupted | None = None  # Ctrl-C, by who has the optimizer
        self._half_applied = False  # some of the buckets have made the step, others not
        self._eps: list[float] = []  # of the groups, when this step first perturbed
        self._moved = False  # weights were written, which autograd has not been told
        self._versioned: list[Tensor] = []  # those that have a version
        self._pending: tuple[Tensor, Vector] | None = None  # an estimate that waits for `step`
        self._idle = 0  # steps in a row whose losses were all equal
        self._told: set[str] = set()  # warnings that were given

    # ---- param groups and state -----------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its counters are those of the run.

        Raises:
            TypeError, ValueError: a hyper-parameter is not what it should be or none of this method
                (see `zo_fused.checks.check_group`), or two parameters share a name.
            RuntimeError: a replay log is open, which has the groups of its start.
        """
        if self._log is not None:
            raise RuntimeError("a replay log has the groups of its start: close_log() first")
        if self.param_groups:
            self.flush()
            self._pending = None
        if "seed" in param_group and "contract" not in param_group:
            raise ValueError("seed is the run's: give it to the optimizer, not to a param group")
        counters = self.param_groups[0] if self.param_groups else self.defaults
        param_group |= {name: counters[name] for name in _COUNTERS}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if "param_names" in group:
                group["param_names"] = [plain_name(name) for name in group["param_names"]]
            self._check_group(group)
            parameter_ids(self.param_groups)
        except BaseException:
            del self.param_groups[-1]
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Convert and check what a group says, in place."""
        check_group(type(self).__name__, group, self.defaults)
        if group.get("rounding") != self.param_groups[0].get("rounding"):
            raise ValueError("rounding must be the same in all param groups: one sweep serves them")

    def _check_changes(self) -> None:
        """A scheduler or the user may have changed groups; looks at what has, before it is used."""
        groups, names = self.param_groups, names_of(self.defaults)
        now = [group.get(name) for group in groups for name in names]
        now += map(len, groups)
        same = len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))
        if same and all(float(tensor) == value for tensor, value in self._inside):
            return
        for group in groups:
            self._check_group(group)
        now = [group[name] for group in groups for name in names]
        tensors = [v for v in now if isinstance(v, Tensor) and on_host(v.device)]
        self._inside = [(tensor, float(tensor)) for tensor in tensors]
        self._seen = [*now, *map(len, groups)]

    @property
    def seed(self) -> int:
        """Base seed of the run."""
        return int(self.param_groups[0]["seed"])

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones included (after a capture, this waits for the device)."""
        if self._captured and self._counter is not None and clock() is None:
            self._count(step=int(self._counter))
        return int(self.param_groups[0]["step"])

    @property
    def skipped_steps(self) -> int:
        """Steps that were not applied because a loss was not finite (waits for the device)."""
        return int(self._skipped)

    def _count(self, **counters: Any) -> None:
        for group in self.param_groups:
            group.update(counters)

    def _kind(self) -> str:
        """What a state must be of to be loaded here."""
        words = [type(self._rule).__name__, *map(str, self._direction.options.values())]
        return f"{type(self).__name__} ({', '.join(words)})"

    def __repr__(self) -> str:
        hidden = {"params", "param_names", *_COUNTERS} - {"seed"}
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            lines += [f"    {name}: {group[name]}" for name in sorted(group.keys() - hidden)]
        return "\n".join([*lines, ")"])

    def __del__(self) -> None:
        """An optimizer that goes away leaves its weights at theta, also after `perturb`."""
        if getattr(self, "_at", None) and not self._ahead:  # else parameters keep it alive
            with suppress(Exception):  # the interpreter may be going away, too
                self.flush()

    def __getstate__(self) -> dict[str, Any]:
        if self._at and not self._ahead and self._pending is None:
            # too late to do it here: the weights may have been copied already
            raise RuntimeError("weights are perturbed: flush() before copying or pickling")
        self.flush()  # if weights were copied before, looking at them has done this already
        own = ("_direction", "_rule", "_schedule", "_options")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_direction" in state:  # unpickled, not loaded from a state_dict
            self._reset()
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """The state, bit for bit; the weights are flushed first."""
        self.flush()
        self._count(step=self.step_count)
        return super().state_dict()

    @_plain_tensors
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Unlike the base class, tensors keep the dtype in which they were saved.
        Where parameters have names, each gets the state of its name, whatever the order.

        Raises:
            ValueError: the state is of another method, of other parameters, or was written under
                another version of the noise contract.
        """
        self.flush()
        self._pending = None
        for group in state_dict["param_groups"]:
            if group.get("contract") != CONTRACT_VERSION:
                raise ValueError(
                    f"the state was saved with noise contract {group.get('contract')}, "
                    f"this zo_fused has {CONTRACT_VERSION}"
                )
            for name in ("seed", "step", "restores"):
                whole(f"{name} of the state", group.get(name), 0, bits=64)
            if group.get("method", self._kind()) != self._kind():  # earlier versions: not said
                raise ValueError(
                    f"the state is of {group['method']}, this optimizer is {self._kind()}"
                )
        state_dict = {**state_dict, "param_groups": self._in_order(state_dict["param_groups"])}
        loaded: dict[str, Any] = {}
        # Registered last, so it sees what the user's own hooks made of the state.
        hook = self.register_load_state_dict_pre_hook(lambda _, state: loaded.update(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in loaded["param_groups"] for i in group["params"]]
        for index, p in zip(saved, params, strict=True):
            for name, value in loaded["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)
        for group in self.param_groups:  # a state of an earlier version has none
            group.setdefault("block", 0)
        self._signature = None

    def _in_order(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with their parameters in the order of these, by name. The names are those of
        the state: an earlier version's may have what wrappers add, and the run's noise is theirs.
        """
        ordered = []
        for number, (group, mine) in enumerate(zip(saved, self.param_groups, strict=False)):
            names = group.get("param_names")
            if names and mine.get("param_names"):
                index = {plain_name(name): i for i, name in enumerate(names)}
                wanted = [plain_name(name) for name in mine["param_names"]]
                if index.keys() != set(wanted):
                    other = sorted(index.keys() ^ set(wanted))[0]
                    raise ValueError(
                        f"the state is of other parameters: {other!r} of group {number} is on one "
                        "side only"
                    )
                order = [index[name] for name in wanted]
                group = {
                    **group,
                    "params": [group["params"][i] for i in order],
                    "param_names": [names[i] for i in order],
                }
            ordered.append(group)
        return [*ordered, *saved[len(ordered) :]]

    # ---- who may look, and when -----------------------------------------------------------------

    @contextmanager
    def _alone(self, wait: bool = False) -> Iterator[None]:
        """Around all that moves weights: one thing at a time, without guard. Ctrl-C waits, but for
        evaluations (`_interruptible`).

        Args:
            wait: for who has the optimizer, instead of raising.
        """
        with uninterrupted() as held:
            if not self._busy.acquire(blocking=wait):
                raise RuntimeError(
                    f"this {type(self).__name__} is in the middle of a step (or perturb, or flush):"
                    " neither its closure nor another thread may use it meanwhile"
                )
            self._held = held
            try:
                yield
            finally:
                self._tell_autograd()
                if self._resting():
                    self._guard.set()
                else:
                    self._guard.lift()
                if self._resting() or not self._at:
                    DISPLACED.leave(self)
                self._busy.release()

    @contextmanager
    def _going_away(self) -> Iterator[None]:
        """`_alone`, to go away from theta: no perturbation of others may be mixed with this one."""
        with self._alone():
            self._guard.lift()
            DISPLACED.enter(self)
            yield

    @_plain_tensors
    def _show_theta(self) -> None:
        """For whoever looks at a parameter, from any thread."""
        with self._alone(wait=True), torch._C.DisableTorchFunctionSubclass():
            self._flush()

    def _interruptible(self, closure: Closure) -> Closure:
        """A closure in which Ctrl-C gets through, and autocast casts the weights anew."""
        held = self._held
        assert held is not None

        def evaluate() -> Loss:
            torch.clear_autocast_cache()
            with held.released():
                return closure()

        return evaluate

    def _resting(self) -> bool:
        """Whether the weights are not at theta although no step has begun."""
        if self._at:
            return self._ahead or self._pending is not None
        return any(map(self._direction.pending, self._buckets))

    def _tell_autograd(self) -> None:
        """A graph that was built over the weights before must not be differentiated now."""
        if self._moved:
            self._moved = False
            torch.autograd.graph.increment_version(self._versioned)
            torch.clear_autocast_cache()  # of an outer autocast: it has cast weights of before

    # ---- perturbations --------------------------------------------------------------------------

    @_plain_tensors
    def perturb(self, sign: float, query: int = 0) -> None:
        """Put the weights at ``theta + sign * eps * z`` with z of a query of the coming step, from
        wherever they are.

        One sweep, or none if they are there. `step` with losses merges the way back with the
        update; `flush` goes back without.

        Raises:
            ValueError: a step has no such query.
        """
        sign = finite("sign", sign)
        if not 0 <= query < self._schedule.queries:
            queries = self._schedule.queries
            raise ValueError(f"query must lie in [0, {queries}), got {query}; see queries=")
        with self._going_away():
            self._drop_pending()
            self._look_again()
            self._perturb(Position(sign, query))

    def _look_again(self) -> None:
        """User code has run: parameters may have other memory."""
        try:
            for bucket in self._buckets:
                bucket.look_again()
        except (TypeError, ValueError):  # another shape or dtype, so new buckets are needed
            if self._at or any(map(self._direction.pending, self._buckets)):
                raise
            self._buckets, self._signature = [], None

    def _perturb(self, position: Position) -> None:
        with self._timed("perturb"):
            if self._ahead or not self._at:
                self._refresh()
            else:
                self._check_changes()
            self._check_eps(begins=self._ahead or not (self._at or self._path))
            self._go(self._displacement(position), position.query, position.to_json())

    def _go(self, to: list[float], query: int, entry: Any) -> None:
        """Move the weights, as the entry of the path says."""
        if self._move(to, query) or self._ahead:
            self._path.append(entry)
        self._ahead = False

    def _displacement(self, position: Position) -> list[float]:
        """Coefficient of z at a position, a group."""
        groups = self.param_groups
        if position.sign == 0:
            return [0.0] * len(groups)
        block = position.block
        if self._schedule.block_order == "sequential":
            block = self._schedule.turn(self._blocks(), self.step_count)
        return [
            position.sign * float(g.get("eps", 1.0)) if block in (None, g["block"]) else 0.0
            for g in groups
        ]

    def _blocks(self) -> list[int]:
        return sorted({bucket.block for bucket in self._buckets})

    def _move(self, to: list[float], query: int = 0) -> bool:
        """Sweep the weights to ``theta + to[group] * z``; False if they were there."""
        at = self._at or [0.0] * len(to)
        if to == at and (query == self._query or not any(to)):
            return False
        for bucket in self._buckets:
            terms = self._way(bucket, at, to, query)
            if terms:
                self._moved = True
                self._direction.sweep(bucket, self.seed, terms, bucket.ones)
        self._at, self._query = (to, query) if any(to) else ([], 0)
        self._direction.attach(self._buckets if self._at else [])
        return True

    def _way(self, bucket: Bucket, at: list[float], to: list[float], query: int) -> list[Term]:
        """What a bucket's weights lack at the new place."""
        step = self.step_count
        if query != self._query and bucket.has(at) and bucket.has(to):
            back = [-a for a in at]
            return [
                Term(step, bucket.constant(back), query=self._query),
                Term(step, bucket.constant(to), query=query),
            ]
        whose = query if bucket.has(to) else self._query
        distance = [b - a for a, b in zip(at, to, strict=True)]
        return [Term(step, bucket.constant(distance), query=whose)] if bucket.has(distance) else []

    @_plain_tensors
    def flush(self) -> None:
        """Put the weights at theta (up to rounding), whatever the schedule keeps beside them.

        One sweep, or none if they are there.
        """
        with self._alone(), torch._C.DisableTorchFunctionSubclass():
            self._flush()

    def _flush(self) -> None:
        self._look_again()
        moved = self._move([0.0] * len(self.param_groups)) if self._at else False
        settled = self._settle(self.param_groups[0]["restores"] + 1)
        path, self._path, self._ahead = self._path, [], False
        if not (moved or settled or path):
            return
        if self._log is not None:
            self._log.restore(self.step_count, path, self._settings())
        self._count(restores=self.param_groups[0]["restores"] + 1)

    def _settle(self, query: int) -> bool:
        """Write what the direction keeps beside the weights; False if there is nothing."""
        done = [
            self._direction.settle(bucket, self._rounding_key(bucket.device, query))
            for bucket in self._buckets
        ]
        self._moved |= any(done)
        return any(done)

    @contextmanager
    def perturbed(self, sign: float, query: int = 0) -> Iterator[None]:
        """``with opt.perturbed(+1): loss_plus = f()``, for loops that own their forward pass.

        The weights are back at theta after the block, so two blocks and a step cost five sweeps;
        `step` with a closure costs three.
        """
        self.perturb(sign, query)
        try:
            yield
        finally:
            self.perturb(0.0)

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """``with opt.unperturbed(): evaluate(model)``: a block with the weights at theta."""
        self.flush()
        yield

    def eval(self) -> None:
        """Put the weights at theta, as `flush`: the words of schedule-free optimizers, which
        training loops call before they evaluate or save."""
        self.flush()

    def train(self) -> None:
        """Nothing: the next step goes on from theta."""

    def _refresh(self) -> None:
        """Look again at the groups before a step: what requires gradients, where it lies."""
        self._check_changes()
        self._check_module()
        now = self._now()
        if now != self._signature:
            self._flush()  # over the parameters and in the windows that it began with
            self._tell_autograd()
            groups, in_place = self.param_groups, self._in_place()
            by_block = self._schedule.block_order is not None
            self._buckets = make_buckets(
                groups, self._trainable_override, self._fixed(), in_place, by_block
            )
            self._signature = now
            for p, reason in self._direction.out_of_reach(self._buckets):
                self._perturb_in_place(p, reason)
            if in_place != self._in_place():
                self._refresh()
            self._watch()
        if not self._buckets:
            raise ValueError("zo_fused: no parameter requires gradients; there is nothing to tune")

    def _check_module(self) -> None:
        """The module may hold another parameter now, which the forward pass then uses."""
        tables, names, params = self._places
        held = list(map(dict.get, tables, names, params))  # in loops of C
        if not all(map(operator.is_, held, params)):
            name = next(n for n, now, p in zip(names, held, params, strict=True) if now is not p)
            raise RuntimeError(
                f"the module holds another parameter {name!r} than when the optimizer was made "
                "(load_state_dict(assign=True), or an assignment?): make the optimizer anew"
            )

    def _now(self) -> tuple[Any, ...]:
        """What buckets are made from."""
        seen = signature(self.param_groups, self._fixed())
        return seen, self._trainable_override, self._in_place()

    def _fixed(self) -> tuple[str, ...]:
        """Hyper-parameters that buckets hold on to."""
        blocks = () if self._schedule.block_order is None else ("block",)
        return (*self._direction.fixed, *blocks)

    def _in_place(self) -> set[int] | None:
        """Positions of the matrices beside which nothing can be kept, where something is kept."""
        return set(self.param_groups[0]["in_place"]) if self._direction.beside else None

    def _watch(self) -> None:
        """Guard what is swept, also under another parameter that has the same memory."""
        params = [p for bucket in self._buckets for p in bucket.params]
        self._versioned = [p for p in params if not p.is_inference()]
        swept = set(map(torch.Tensor.data_ptr, params))
        everyone = [p for group in self.param_groups for p in group["params"]]
        self._guard.over([p for p in everyone if p.data_ptr() in swept])

    # ---- the step -------------------------------------------------------------------------------

    @_plain_tensors
    def estimate(self, closure: Closure) -> Tensor:
        """The first half of a step: the losses and what they tell. `step` without arguments is the
        second. For loops that call ``optimizer.step()`` themselves: this takes the place of their
        ``loss.backward()``.

        Args:
            closure: as in `step`.

        Returns:
            The mean loss, as `step`.

        Raises:
            As `step`; also RuntimeError in a CUDA graph capture.

        Whoever looks at the weights before `step` finds theta, at the price of a sweep. Another
        estimate takes the place of one that waits.
        """
        _check_closure(closure)
        if capturing():
            raise RuntimeError("only step(closure) can be captured in a graph, not its halves")
        with self._going_away(), self._at_theta_on_errors():
            self._drop_pending()
            self._pending = self._estimate(self._interruptible(closure))
            self._direction.attach([])  # who looks meets the guard, not what is beside the weights
            return self._pending[0]

    @contextmanager
    def _at_theta_on_errors(self) -> Iterator[None]:
        """Whatever goes wrong in a step: the closure, memory for the state, a hyper-parameter."""
        self._half_applied = False
        try:
            yield
        except BaseException:
            # While a graph is captured, nothing has been done that could be taken back.
            if not (self._half_applied or capturing() or clock() is not None):
                self._flush()
            raise

    def _check_eps(self, begins: bool = False) -> None:
        """The losses of a step tell a slope only if they were taken eps apart."""
        now = [float(group.get("eps", 1.0)) for group in self.param_groups]
        if begins:
            self._eps = now
        elif now != self._eps:
            raise ValueError(
                f"eps changed in the middle of a step, from {self._eps} to {now}: change it between"
                " steps"
            )

    def _drop_pending(self) -> None:
        if self._pending is not None:
            self._pending = None
            self._flush()

    @_plain_tensors
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        loss_plus: Loss | Sequence[Loss] | None = None,
        loss_minus: Loss | Sequence[Loss] | None = None,
    ) -> Tensor:
        """One step, from a closure, from losses, or from what `estimate` found.

        Args:
            closure: computes the loss, any number that says how bad the weights are (also one
                without a derivative), without a backward pass; a large batch in parts, if it likes.
                Called twice, at ``theta + eps z`` and ``theta - eps z`` (one-sided: theta), under
                `torch.no_grad`, with the same state of torch's global generators, so dropout masks
                agree; these generators end where one call leaves them. The model's train or eval
                mode is yours. Several queries or blocks call it more often.
            loss_plus, loss_minus: the two losses, from `perturb` or `perturbed`; with several
                queries, sequences of them.

        Returns:
            The mean over the queries of ``(L+ + L-) / 2``, float32 tensor [].

        Raises:
            TypeError: the loss is not a scalar.
            Whatever the closure raises; the weights are then at theta.

        The closure must not rebind a parameter (``p.data = ...``) while something else keeps its
        old memory: sweeps would go on there. Between steps it may be done.

        If a loss is not finite, the weights go back to theta, the step is counted in
        `skipped_steps` and nothing is applied.

        On a GPU a step with a closure can be captured in a CUDA graph, after two ordinary ones, and
        replayed as often as you like: each replay is the next step, with its own noise. What the
        host gives (eps, a lr that is no tensor on the device) stays as it was when captured.
        """
        if closure is not None:
            _check_closure(closure)
        with self._going_away(), self._at_theta_on_errors():
            if capturing():
                return self._capture(closure and self._interruptible(closure))
            if closure is None and loss_plus is None and loss_minus is None and self._pending:
                return self._step_pending()
            self._drop_pending()
            if closure is not None:
                if loss_plus is not None or loss_minus is not None:
                    raise TypeError("step() takes a closure or two losses, not both")
                return self._finish(*self._estimate(self._interruptible(closure)))
            self._look_again()
            if loss_plus is None and loss_minus is None and self._probed():
                return None  # type: ignore[return-value]
            if loss_plus is None or loss_minus is None:
                raise TypeError(_NEEDS_LOSSES)
            if self.needs_closure:
                raise TypeError(f"{type(self).__name__}.step() needs a closure")
            self._check_changes()
            plus, minus = self._given(loss_plus), self._given(loss_minus)
            return self._finish(*self._from_losses(plus, minus))

    def _step_pending(self) -> Tensor:
        """The second half of a step."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._look_again()
        self._check_eps()
        if self._now() != self._signature:
            raise RuntimeError("parameters changed between estimate() and step(): estimate anew")
        return self._finish(*pending)

    def _probed(self) -> bool:
        """Whether this is torch.distributed.checkpoint, which makes the state of optimizers by a
        step with zero gradients and lr 0, and puts both back only if nothing is raised."""
        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        return (
            bool(grads)
            and not any(float(group["lr"]) for group in self.param_groups)
            and not any(bool(grad.any()) for grad in grads)
        )

    def _given(self, losses: Loss | Sequence[Loss]) -> list[Any]:
        """The losses that a user gives, one a query."""
        several = isinstance(losses, Sequence) or (isinstance(losses, Tensor) and losses.dim() == 1)
        given = list(losses) if several else [losses]  # type: ignore[arg-type]
        if self._schedule.block_order == "simultaneous":
            raise ValueError('block_order="simultaneous" needs a closure')
        if len(given) != self._schedule.queries:
            raise ValueError(
                f"step() needs loss_plus and loss_minus of {self._schedule.queries} queries each, "
                f"got {len(given)}"
            )
        return [self._scalar(loss) for loss in given]

    def _capture(self, closure: Closure | None) -> Tensor:
        """Record a step whose number is read on the device; the host's state stays as it is."""
        if closure is None:
            raise RuntimeError("only a step with a closure can be captured")
        if self._log is not None:
            raise RuntimeError("a captured step can't write the replay log: close_log() first")
        reason = (
            self._direction.not_capturable(self._schedule.deferred) or self._rule.not_capturable
        )
        if self._schedule.block_order == "sequential":
            reason = "whose turn it is, is for the host to say"
        if reason:
            raise RuntimeError(f"this step can't be captured in a graph: {reason}")
        devices = {bucket.device for bucket in self._buckets}
        if self._counter is None or self._schedule.deferred != self._ahead or len(devices) != 1:
            raise RuntimeError(
                "take two steps before you capture one, over parameters on one device"
            )
        step, restores = self.step_count, self.param_groups[0]["restores"]
        before = (self._at, self._query, self._path, self._ahead)
        self._path = list(self._path)
        try:
            with running(Clock(self._counter, step)):
                loss = self._finish(*self._estimate(closure))
                self._counter.add_(1)
        finally:  # nothing has run yet
            self._count(step=step, restores=restores)
            self._at, self._query, self._path, self._ahead = before
        self._captured = True
        return loss

    def _estimate(self, closure: Closure) -> tuple[Tensor, Vector]:
        """The mean loss, float32 [], and the projected gradients, float32."""
        return self._from_losses(*self._schedule.pairs(self._evaluate(closure)))

    def _from_losses(self, plus: list[Any], minus: list[Any]) -> tuple[Tensor, Vector]:
        eps = float(self.param_groups[0]["eps"])
        distance = eps if self._schedule.one_sided else 2 * eps
        device = self._buckets[0].device
        loss = (sum(plus) + sum(minus)) / (2 * len(plus))
        grads = [(above - below) / distance for above, below in zip(plus, minus, strict=True)]
        return float32_scalar(loss), to_float32(stacked(grads, device))

    def _finish(self, loss: Tensor, grads: Vector) -> Tensor:
        with self._timed("update"):
            self._update(grads)
        return loss

    def _evaluate(self, closure: Closure) -> dict[Position, Any]:
        """The losses of a step's positions."""
        generators: GeneratorStates | None = None  # also for evaluations after these
        while True:
            try:
                if self._direction.paired:
                    return self._evaluate_pairs(closure)
                if self._schedule.block_order is not None:
                    self._refresh()  # what blocks there are
                losses: dict[Position, Any] = {}
                for position in self._schedule.positions(self._blocks()):
                    self._perturb(position)
                    if not losses:
                        generators = GeneratorStates(bucket.device for bucket in self._buckets)
                    elif generators is not None:
                        generators.rewind()
                    losses[position] = self._loss(closure)
                self._generators = generators
                return losses
            except UsedOtherwise as use:
                self._flush()
                if generators is not None:
                    generators.rewind()
                self._perturb_in_place(use.param, f"is used by {use.function}")

    def _loss(self, closure: Closure) -> Any:
        """The loss where the weights are."""
        with self._timed("forward"), self._direction.watching():
            try:
                return self._scalar(closure())
            except RuntimeError as error:
                if "does not require grad and does not have a grad_fn" in str(error):
                    error.add_note(_NO_BACKWARD)
                raise

    def _evaluate_pairs(self, closure: Closure) -> dict[Position, Any]:
        self._look_again()
        self._perturb(Position(0.0))
        losses: dict[Position, Any] = {}
        generators = GeneratorStates(bucket.device for bucket in self._buckets)
        for query in range(self._schedule.queries):
            if query:
                generators.rewind()
            with self._timed("forward"), self._direction.watching():
                where = (self._buckets, self.param_groups, self.seed, self.step_count, query)
                both = self._direction.both(*where, closure).unbind()
            losses |= {
                Position(s, query): self._scalar(x) for s, x in zip((1.0, -1.0), both, strict=True)
            }
        return losses

    def _perturb_in_place(self, param: Tensor, reason: str) -> None:
        """From the next evaluation on, this parameter is perturbed in place."""
        everyone = [p for group in self.param_groups for p in group["params"]]
        position = next(i for i, p in enumerate(everyone) if p is param)
        name = parameter_table(self.param_groups)[position][0] or position
        if position in self.param_groups[0]["in_place"]:
            raise RuntimeError(f"parameter {name} {reason} although it is perturbed in place")
        logger.info("parameter %s is perturbed in place: it %s", name, reason)
        self._count(in_place=(*self.param_groups[0]["in_place"], position))

    def _scalar(self, loss: Any) -> Any:
        """A loss as a number of the host, or as float64 tensor [] on the first parameter's GPU."""
        if not isinstance(loss, Tensor | Real):
            raise TypeError(f"the closure must return a scalar loss, got {type(loss).__name__}")
        if isinstance(loss, Tensor) and (loss.numel() != 1 or loss.is_complex()):
            raise TypeError(f"the closure must return a scalar loss, got shape {tuple(loss.shape)}")
        if not self._buckets:
            self._refresh()
        if isinstance(loss, Tensor) and loss.is_floating_point() and loss.element_size() < 4:
            dtype = str(loss.dtype).removeprefix("torch.")
            self._warn(
                f"the loss has dtype {dtype}, whose grid is coarser than the difference of two "
                "evaluations; compute it in float32 (logits.float() before the loss)"
            )
        device = self._buckets[0].device
        if on_host(device):
            return float(loss)
        value = loss.detach() if isinstance(loss, Tensor) else vector([float(loss)], device)
        return value.reshape(()).to(device=device, dtype=torch.float64)

    def _update(self, grads: Vector) -> None:
        """Take back the perturbation and apply the update of these projected gradients."""
        self._check_changes()
        if self._at and not self._ahead:
            self._check_eps()
        if not self._at or self._ahead:
            self._refresh()
        step, finite = self.step_count, all_finite(grads)
        with np.errstate(all="ignore"):  # what is not finite is not applied
            self._apply(grads, finite)
        path, self._path = self._path, []
        self.projected_grad = as_tensor(grads).reshape(() if len(grads) == 1 else -1)
        try:
            self._note(step, path, self.projected_grad, finite)
        finally:  # the weights have made the step, also where its line can't be written
            self._count(step=step + 1, restores=0)
            self._advance_counter(step + 1)

    def _apply(self, grads: Vector, finite: Flag) -> None:
        """Restore, update and the next perturbation, in one sweep of every bucket."""
        groups, step = self.param_groups, self.step_count
        blocks, queries, deferred = self._blocks(), self._schedule.queries, self._schedule.deferred
        turn = self._schedule.turn(blocks, step)
        back = [-at for at in self._at] or [0.0] * len(groups)
        updates = []
        for bucket in self._buckets:
            if turn not in (None, bucket.block):
                continue
            lr, eps = bucket.hyper(groups, "lr"), bucket.hyper(groups, "eps", 1.0)
            # A group with its own eps has its own estimate from the same two losses.
            share = float(groups[0].get("eps", 1.0)) / eps
            scale = self._direction.update_scale(bucket)
            mine = on(grads, bucket.device)
            if self._schedule.block_order == "simultaneous":
                mine = mine[blocks.index(bucket.block) * queries :]
            shares = [(mine[query] * share) / queries for query in range(queries)]
            update = Update(
                bucket=bucket,
                groups=groups,
                seed=self.seed,
                step=step,
                displaced=self._query,
                restore=bucket.constant(back),
                grads=shares if scale is None else [grad * scale for grad in shares],
                lr=lr,
                decay=1 - lr * bucket.hyper(groups, "weight_decay"),
                ahead=eps if deferred else None,
                finite=flag_on(finite, bucket.device),
                rounding=self._rounding_key(bucket.device),
            )
            updates.append(update)
        self._prepare(updates)
        self._moved = True
        for update in updates:
            self._rule.apply(update, self._direction, self.state)
            self._half_applied = True
        self._half_applied = False
        self._at = [float(group["eps"]) for group in groups] if deferred else []
        self._query = 0
        self._ahead = deferred
        self._direction.attach(self._buckets if self._at else [])
        if any(self._direction.window_ends(bucket, step) for bucket in self._buckets):
            self._settle(query=0)

    def _prepare(self, updates: list[Update]) -> None:
        """The state of new buckets: if there is no memory for it, nothing has moved yet."""
        for update in updates:
            update.bucket.once("state", partial(self._make_state, update))

    def _make_state(self, update: Update) -> bool:
        self._rule.prepare(update, self._direction, self.state)
        return True

    def _advance_counter(self, step: int) -> None:
        """The step on the device follows that of the host."""
        device = self._buckets[0].device
        if clock() is not None or on_host(device):
            return
        if self._counter is None or self._counter.device != device:
            self._counter = torch.zeros((), dtype=torch.int64, device=device)
        self._counter.fill_(step)

    def _rounding_key(self, device: torch.device, query: int = 0) -> Tensor | None:
        if self.param_groups[0].get("rounding", "nearest") == "nearest":
            return None
        stream = Stream(Purpose.ROUNDING, self.step_count, query=query)
        return stream_keys(self.seed, [stream], device)

    def _note(self, step: int, path: list[Any], grads: Tensor, finite: Flag) -> None:
        """Count and report skipped steps; write the log."""
        if isinstance(finite, bool) or self._log is not None:
            applied = bool(finite)
            if not applied:
                self._skipped = self._skipped + 1
                logger.warning("step %d skipped: a loss was not finite; weights restored", step)
            self._watch_idle(applied and not bool(grads.any()))
            if self._log is not None:
                values = [float(f"{grad:.9g}") for grad in grads.reshape(-1).tolist()]
                self._log.update(step, path, values if applied else None, self._settings())
        else:
            if not isinstance(self._skipped, Tensor):
                self._skipped = torch.full(
                    (), self._skipped, dtype=torch.int64, device=grads.device
                )
            self._skipped.add_(~finite)

    def _watch_idle(self, idle: bool) -> None:
        self._idle = self._idle + 1 if idle else 0
        if self._idle == _IDLE_STEPS:
            self._warn(
                f"the losses of a step were equal {_IDLE_STEPS} times in a row, so nothing moved: "
                "eps is too small for the weights' dtype, or the loss does not depend on them (is "
                "it of another model, or a copy?), or it is rounded"
            )

    def _warn(self, message: str) -> None:
        """Once."""
        if message not in self._told:
            self._told.add(message)
            logger.warning("%s", message)

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.timings is None else self._add_time(self.timings, name)

    @contextmanager
    def _add_time(self, timings: dict[str, float], name: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            timings[name] = timings.get(name, 0.0) + time.perf_counter() - start

    def _synchronize(self) -> None:
        for bucket in self._buckets:
            if bucket.device.type == "cuda":
                torch.cuda.synchronize(bucket.device)

    # ---- the replay log -------------------------------------------------------------------------

    @_plain_tensors
    def start_log(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        """Write a replay log from here on, a line a step (docs/replay.md).

        Args:
            path: file to write. It is replaced, unless
            resume: the run goes on from a checkpoint at the present step: the log is continued, and
                lines of later steps are dropped.

        Raises:
            ValueError: the log is of another run, or the optimizer already has momentum that a new
                log would lack.
        """
        self.flush()
        self.close_log()
        with self._alone():
            self._refresh()
        if not resume and self.step_count > 0 and self.state:
            raise ValueError(
                "a replay log of this method must start with its first step; "
                "pass resume=True to continue the log of this run"
            )
        header = {
            "contract": CONTRACT_VERSION,
            "transform": self._direction.options.get("transform", "portable"),
            "method": type(self).__name__,
            "options": self._options,
            "seed": self.seed,
            "first_step": self.step_count,
            "parameters": parameter_table(self.param_groups),
            "base": fingerprint([p for g in self.param_groups for p in g["params"]]),
            "path": self._usual_path(),
            **self._settings(),
        }
        if resume:
            restores = self.param_groups[0]["restores"]
            self._log = replay_log.Writer.resume(path, header, self.step_count, restores)
        else:
            self._count(restores=0)
            self._log = replay_log.Writer.create(path, header)

    def _usual_path(self) -> list[Any]:
        """The perturbations of an ordinary step."""
        return self._schedule.usual_path(self._blocks()) if not self._direction.paired else []

    def close_log(self) -> None:
        """Stop writing the replay log."""
        self._log = None

    def _settings(self) -> dict[str, Any]:
        hyper = self.defaults.keys() - {"initial_lr", *_COUNTERS}
        return settings(self.param_groups, hyper, self._buckets)

    @_plain_tensors
    def replay_event(self, event: replay_log.Event) -> None:
        """Do to the weights what a logged event did (used by `zo_fused.replay`)."""
        with uninterrupted():
            self._replay_event(event)

    def _replay_event(self, event: replay_log.Event) -> None:
        self._trainable_override = set(event.trainable)
        for group, values in zip(self.param_groups, event.groups, strict=True):
            group.update({name: v for name, v in values.items() if name in self.defaults})
        self._count(step=event.step, in_place=tuple(event.in_place))
        for entry in event.path:
            if isinstance(entry, dict):
                self._refresh()
                self._go(entry["at"], 0, entry)
            else:
                sign, *rest = entry
                self._perturb(Position(sign, *map(int, rest)))
        if event.restored:
            self._flush()
        else:
            if not self._buckets:
                self._refresh()
            several = len(self._blocks()) if self._schedule.block_order == "simultaneous" else 1
            grads = event.projected_grads or [math.nan] * (several * self._schedule.queries)
            self._update(to_float32(vector(grads, self._buckets[0].device)))
