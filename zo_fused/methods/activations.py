"""Steps that look at what linear layers are given, for directions with `Activations`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from zo_fused.directions.activations import FIRST_PASSES, Activations
from zo_fused.directions.low_rank import LowRank
from zo_fused.step.buckets import labels
from zo_fused.step.estimates import Estimate
from zo_fused.step.evaluation import Closure, Loss
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.schedule import Position

logger = logging.getLogger("zo_fused")

_NOTHING_LEFT = (
    'others="frozen" leaves nothing to tune: no weight of an nn.Linear that nothing else of the '
    'model holds is there and requires gradients; others="random" tunes others, too'
)


class SeesActivations(ZerothOrderOptimizer):
    """An optimizer whose direction may be `LowRank` with `Activations`.

    Where a V must be made, the step evaluates the closure at theta first: in the first step
    `FIRST_PASSES` times, then once. With ``one_sided`` the last of them is the baseline.
    """

    _freezes = False

    @property
    def _activations(self) -> Activations | None:
        direction = self.direction
        return direction.activations if isinstance(direction, LowRank) else None

    def forwards_of(self, steps: int) -> int:
        total, activations = super().forwards_of(steps), self._activations
        if not steps or activations is None or not activations.layers():
            return total
        alone = 0 if self.schedule.one_sided else 1  # of a look; else it is the baseline, too
        again = 0 if activations.refresh is None else (steps - 1) // activations.refresh
        return total + FIRST_PASSES - 1 + alone * (1 + again)

    def is_other(self, p: Tensor) -> bool:
        """Whether a parameter that no linear layer alone holds is frozen by ``others="frozen"``."""
        return True

    def freeze_others(self) -> None:
        """From now on, and in groups that are added, others are no business of this optimizer. If
        nothing is left, steps say so."""
        self._freezes = True
        for group in self.param_groups:
            self._leave_others(group)
        self.weights.parameters.checks.append(self._check_left)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._freezes:
            self._leave_others(self.param_groups[-1])
            if not self.param_groups[-1]["params"]:
                del self.param_groups[-1]
                raise ValueError(_NOTHING_LEFT)

    add_param_group.__doc__ = ZerothOrderOptimizer.add_param_group.__doc__

    def _check_left(self) -> None:
        if not any(self.moves(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(_NOTHING_LEFT)

    def _leave_others(self, group: dict[str, Any]) -> None:
        assert self._activations is not None
        layers = self._activations.layers()
        kept = [i for i, p in enumerate(group["params"]) if id(p) in layers or not self.is_other(p)]
        for name in ("params", "param_names"):
            if group.get(name):
                group[name] = [group[name][i] for i in kept]

    def _wanting(self) -> dict[int, tuple[Tensor, int, int]]:
        """The weights that need a V before this step."""
        if self._activations is None:
            return {}
        self.weights.look_again()
        self.weights.look()
        return self._activations.wanting(self.weights.buckets, self.state, self.step_count)

    def _need_no_inputs(self) -> None:
        """Raises:
        RuntimeError: this step must see what layers are given.
        """
        if self._activations is None:
            return
        self.look()
        if self._activations.wanting(self.weights.buckets, self.state, self.step_count):
            raise RuntimeError(
                'basis="activations" makes V from what layers are given, so the first step '
                "(with refresh: the first of each window) must be step(closure)"
            )

    def perturb(self, sign: float, query: int = 0) -> None:
        if not self.weights.place.at:
            self._need_no_inputs()
        super().perturb(sign, query)

    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        loss_plus: Loss | Sequence[Loss] | None = None,
        loss_minus: Loss | Sequence[Loss] | None = None,
        weight: Any = 1.0,
    ) -> Tensor:
        if loss_plus is not None and not self.weights.place.at:
            self._need_no_inputs()
        return super().step(closure, loss_plus=loss_plus, loss_minus=loss_minus, weight=weight)

    step.__doc__ = ZerothOrderOptimizer.step.__doc__

    def measure(self, closure: Closure) -> Estimate:
        wanting = self._wanting()
        if not wanting:
            return super().measure(closure)
        weights, step = self.weights, self.step_count
        assert self._activations is not None
        weights.flush()  # in the windows that it began with
        losses: dict[Position, Any] = {}

        def evaluate(watched: Callable[[], AbstractContextManager[None]]) -> None:
            def watching() -> Any:  # twice, where factored mode finds other uses of weights
                with watched():
                    return closure()

            losses.update(self.losses_at([Position(0.0)], watching, again=bool(losses)))

        others = self.ranks.groups()
        total = others.sum_ if others else None
        if not self._activations.find(wanting, self.state, self.seed, step, evaluate, total):
            return self.difference(dict.fromkeys(self.positions(), math.nan))
        assert isinstance(self.direction, LowRank)
        self.direction.forget(weights.buckets)
        weights.beside.attach([])  # `_tell` looks at the module itself
        self._tell()
        if weights.beside.paired:
            return super().measure(closure)
        to_take = [position for position in self.positions() if position not in losses]
        return self.difference(losses | self.losses_at(to_take, closure, again=True))

    def _tell(self) -> None:
        """Once, which matrices have a V of another kind."""
        assert self._activations is not None
        if self._activations.found > 1:
            return
        linear = self._activations.layers()
        moving = {id(p) for bucket in self.weights.buckets for p in bucket.params}
        params = [p for group in self.param_groups for p in group["params"]]
        for label, p in zip(labels(self.param_groups), params, strict=True):
            if p.dim() < 2 or id(p) not in moving:
                continue
            if id(p) not in linear:
                why = "no nn.Linear alone holds it"
            elif self._activations.right(self.state[p], self.step_count) is None:
                why = "its layer was not used"
            else:
                continue
            logger.info("parameter %s has a random V: %s", label.strip("'"), why)
