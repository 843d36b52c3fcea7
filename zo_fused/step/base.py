"""torch's contract of an optimizer: groups that are checked, a state that can be saved."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from zo_fused.checks import meant, whole
from zo_fused.noise.streams import CONTRACT_VERSION, plain_name
from zo_fused.parallel.options import Option
from zo_fused.step.access import Access, plain_tensors
from zo_fused.step.capture import Capture
from zo_fused.step.direction import Direction
from zo_fused.step.evaluation import Evaluation
from zo_fused.step.groups import COUNTERS, Groups, described
from zo_fused.step.guard import Guard
from zo_fused.step.hyper import check_group, hyper, names_of
from zo_fused.step.optimizer_state import (
    check_blocks,
    check_complete,
    check_form,
    check_saved,
    in_order,
)
from zo_fused.step.parameters import Chooses, Parameters
from zo_fused.step.report import Report
from zo_fused.step.rule import Rule
from zo_fused.step.schedule import GROUP_DEFAULTS, STEP_DEFAULTS, Schedule, StepOptions, spelled_out
from zo_fused.step.sharded import Resharding
from zo_fused.step.timing import Timer
from zo_fused.step.weights import Weights


class Base(Chooses, torch.optim.Optimizer):
    """What `ZerothOrderOptimizer` has of `torch.optim.Optimizer`.

    Attributes:
        weights: where they are, and who takes them elsewhere.
        rule: what a projected gradient does.
        schedule: which losses a step takes.
        ranks: that take a step together.
        state: by parameter, and by names what a method keeps; `state_dict` saves it.
    """

    state: defaultdict[Any, Any]
    why_skipped = "a loss was not finite"  # of a skipped step, in warnings

    def __init_subclass__(cls, **keywords: Any) -> None:
        """`inspect.signature`, help() and replays see the names that ``**common`` stands for."""
        super().__init_subclass__(**keywords)
        if "__init__" in vars(cls):
            own = inspect.signature(vars(cls)["__init__"])
            own = own.replace(parameters=list(own.parameters.values())[1:])
            parents = map(vars, cls.__mro__[1:])
            above = (kind["__signature__"] for kind in parents if "__signature__" in kind)
            cls.__signature__ = spelled_out(own, next(above, None))  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Any,
        direction: Direction,
        rule: Rule,
        defaults: dict[str, Any],
        options: dict[str, Any] | None = None,
        **common: Unpack[StepOptions],
    ) -> None:
        of_method = set(vars(self))
        takes = inspect.signature(type(self)).parameters
        _check_names(type(self).__name__, common, takes)
        chosen: dict[str, Any] = {**STEP_DEFAULTS, **common}
        of_groups = {name: chosen.pop(name) for name in GROUP_DEFAULTS}
        usual = {name: value for name, value in of_groups.items() if name in takes}
        defaults = usual | defaults | {name: of_groups[name] for name in usual if name in common}
        seed = whole("seed", chosen.pop("seed"), 0, bits=64)
        parallel = chosen.pop("parallel")
        schedule = Schedule(**chosen)
        recorded = {**asdict(schedule), **(options or {})}
        recorded = {name: value for name, value in recorded.items() if name in takes}
        module = params if isinstance(params, nn.Module) else None
        if module is not None:
            Resharding(module).close()
            params = self.found_in(module)
        elif isinstance(params, Mapping) or callable(params):
            raise TypeError(
                "params must be a module, its named_parameters() or parameters(), or param groups, "
                f"got {type(params).__name__}"
            )
        _check_pair(rule, direction)
        counters: dict[str, Any] = {"seed": seed, "contract": CONTRACT_VERSION, "in_place": ()}
        counters |= {"step": 0, "restores": 0, "log": (), **_kind(self, rule, direction, recorded)}
        defaults = {"block": 0, **{name: hyper(name, value) for name, value in defaults.items()}}
        defaults |= counters
        self._assemble(defaults, module, direction, rule, schedule, recorded, parallel)
        super().__init__(self.in_groups(params), defaults)
        self._not_of_method = {"_not_of_method", *vars(self)} - of_method

    def in_groups(self, params: Any) -> Any:
        """What the optimizer was given, of a module by name, in groups of the method's own."""
        return params

    def _assemble(
        self,
        defaults: dict[str, Any],
        module: nn.Module | None,
        direction: Direction,
        rule: Rule,
        schedule: Schedule,
        options: dict[str, Any],
        parallel: Option,
    ) -> None:
        self.rule = rule
        self.schedule = schedule
        self._options = options
        self.projected_grad: Tensor | None = None
        self._groups = Groups(defaults, self.check_group)
        guard = Guard(self._show_theta)
        by_block = schedule.block_order is not None
        parameters = Parameters(self._groups, by_block, module, guard, self.moves)
        self.weights = Weights(self._groups, direction, schedule, parameters)
        self._capture = Capture(self.weights)
        self._report = Report(self.why_skipped)
        self._access = Access(self, self.weights, self._capture, guard, self._report)
        self._timer = Timer(parameters)
        self._evaluation = Evaluation(self.weights, self._timer, self._report, parallel)
        self.ranks = self._evaluation.ranks

    def _bind(self) -> None:
        """The groups and the state may be other objects now."""
        self._groups.all = self.param_groups
        self.weights.direction.state = self.state

    def _show_theta(self) -> None:
        """For whoever looks at a parameter, from any thread."""
        self._access.flush(wait=True)

    def flush(self) -> None:
        """Put the weights at theta (up to rounding), whatever the schedule keeps beside them.

        One sweep, or none if they are there.
        """
        self._access.flush()

    @property
    def direction(self) -> Direction:
        """How z is made."""
        return self.weights.direction

    @property
    def seed(self) -> int:
        """Base seed of the run."""
        return self._groups.seed

    @property
    def step_count(self) -> int:
        """Steps taken, skipped ones included (after a capture, this waits for the device)."""
        self._capture.ask()
        return self._groups.step

    @property
    def skipped_steps(self) -> int:
        """Steps that were not applied because a loss was not finite (waits for the device)."""
        return int(self._report.skipped)

    # ---- param groups ---------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its counters are those of the run.

        Raises:
            TypeError, ValueError: a hyper-parameter is not what it should be or none of this method
                (see `zo_fused.step.hyper.check_group`), or two parameters share a name.
            RuntimeError: a replay log is open, which has the groups of its start.
            NotImplementedError: parameters are sharded, where they can't be (docs/sharded.md).
        """
        self._bind()
        if self.weights.log.is_open:
            raise RuntimeError("a replay log has the groups of its start: close_log() first")
        if self.param_groups:
            self.flush()
            self._access.pending = None
        if "seed" in param_group and "contract" not in param_group:
            raise ValueError("seed is the run's: give it to the optimizer, not to a param group")
        counters = self.param_groups[0] if self.param_groups else self.defaults
        param_group |= {name: counters[name] for name in COUNTERS}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if "param_names" in group:
                group["param_names"] = [plain_name(name) for name in group["param_names"]]
            self.check_group(group)
            self.weights.parameters.check(type(self), self.rule, self.direction)
        except BaseException:
            del self.param_groups[-1]
            raise

    def check_group(self, group: dict[str, Any]) -> None:
        """Convert and check what a group says, in place. A method with hyper-parameters of its own
        looks at them here."""
        check_group(type(self).__name__, group, self.defaults)
        if group.get("rounding") != self.param_groups[0].get("rounding"):
            raise ValueError("rounding must be the same in all param groups: one sweep serves them")

    def __repr__(self) -> str:
        return described(type(self).__name__, self.param_groups)

    # ---- saving ---------------------------------------------------------------------------------

    def __del__(self) -> None:
        """An optimizer that goes away leaves its weights at theta, also after `perturb`."""
        weights = None if sys.is_finalizing() else getattr(self, "weights", None)  # torch would die
        if weights is not None and weights.place.at and not weights.ahead:
            # else parameters keep it alive
            with suppress(Exception):
                self.flush()

    def __getstate__(self) -> dict[str, Any]:
        weights = self.weights
        if weights.place.at and not weights.ahead and self._access.pending is None:
            # too late to do it here: the weights may have been copied already
            raise RuntimeError("weights are perturbed: flush() before copying or pickling")
        self.flush()  # if weights were copied before, looking at them has done this already
        parts = (self.direction, self.rule, self.schedule, self._options, self.ranks.option)
        own = {
            name: value
            for name, value in vars(self).items()
            if name not in self._not_of_method and not hasattr(type(self), name)  # as a scheduler's
        }
        known = {"_parts": parts, "_not_of_method": self._not_of_method}
        return {**own, **super().__getstate__(), **known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_parts" in state:  # unpickled, not loaded from a state_dict
            self._assemble(state["defaults"], None, *state.pop("_parts"))
        super().__setstate__(state)
        self._bind()

    def state_dict(self) -> dict[str, Any]:
        """The state, bit for bit. The weights are flushed; the replay log is on the disk."""
        self.flush()
        self._groups.count(step=self.step_count, log=self.weights.log.save())
        return super().state_dict()

    @plain_tensors
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Unlike the base class, tensors keep the dtype in which they were saved.
        Where parameters have names, each gets the state of its name, whatever the order.

        Raises:
            ValueError: this is no state, or a damaged one; it is of another method or of other
                options of it, of other parameters or blocks, or was written under another version
                of the noise contract.
        """
        self.flush()
        self._access.pending = None
        check_form(state_dict)
        kind = _kind(self, self.rule, self.direction, self._options)
        for group in state_dict["param_groups"]:
            check_saved(group, **kind)
        together = (self.rule.together, self.direction.together)
        check_complete(state_dict, names_of(self.defaults), together)
        if self.schedule.block_order is not None:
            check_blocks(state_dict["param_groups"], self.param_groups)
        loaded: dict[str, Any] = {}
        # Registered last, so it sees what the user's own hooks made of the state.
        hook = self.register_load_state_dict_pre_hook(lambda _, state: loaded.update(state))
        try:
            groups = in_order(state_dict["param_groups"], self.param_groups)
            super().load_state_dict({**state_dict, "param_groups": groups})
        finally:
            hook.remove()
        saved = [i for group in loaded["param_groups"] for i in group["params"]]
        for index, p in zip(saved, self._groups.params(), strict=True):
            for name, value in loaded["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)
        for name in [key for key in self.state if not isinstance(key, Tensor)]:
            self.state[name] = deepcopy(self.state[name])  # torch copies what is of parameters only
        for group in self.param_groups:  # a state of an earlier version has none
            group.update(block=group.get("block", 0), options=kind["options"])
            for name in ("in_place", "log"):  # nor has one that DCP has made full, of what is empty
                group[name] = tuple(group.get(name) or ())
        self.weights.parameters.forget()


def _check_names(method: str, common: Collection[str], takes: Collection[str]) -> None:
    """Raises:
    TypeError: there is no such option.
    """
    for name in common:
        if name not in STEP_DEFAULTS:
            near = meant(name, tuple(takes))
            hint = f"; did you mean {near!r}?" if near else ""
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}{hint}")


def _kind(
    optimizer: Base, rule: Rule, direction: Direction, options: dict[str, Any]
) -> dict[str, str]:
    """What a state must be of to be loaded. A run may change its schedule."""
    words = [type(rule).__name__, *map(str, direction.options.values())]
    own = sorted(options.keys() - asdict(Schedule()).keys())
    return {
        "method": f"{type(optimizer).__name__} ({', '.join(words)})",
        "options": ", ".join(f"{name}={options[name]!r}" for name in own),
    }


def _check_pair(rule: Rule, direction: Direction) -> None:
    """A rule makes its own sweeps only of directions whose z it knows.

    Raises:
        TypeError: it does not know that of this one.
    """
    kind = next((kind for kind in rule.takes if isinstance(direction, kind)), None)
    if kind is None:
        known = " or ".join(kind.__name__ for kind in rule.takes)
        why = f"is for directions of {known}, and {type(direction).__name__} is none"
    elif rule.draws and type(direction).sweep is not kind.sweep:
        why = (
            f"draws the z of {kind.__name__}, and {type(direction).__name__} has a sweep of its own"
        )
    else:
        return
    raise TypeError(
        f"the rule {type(rule).__name__} {why}: it would not take back the perturbation"
    )
