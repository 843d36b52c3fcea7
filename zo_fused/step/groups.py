"""The param groups of an optimizer: hyper-parameters, checked before use, and a run's counters."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from zo_fused.noise.keys import on_host
from zo_fused.step.hyper import names_of

# Kept in every param group, where `state_dict` leaves integers as they are. in_place: positions of
# the matrices that a direction can't keep its changes beside. log: of a state, `StepLog.save`.
COUNTERS = ("seed", "step", "restores", "contract", "in_place", "log", "method", "options")


class Groups:
    """The param groups of an optimizer.

    Args:
        defaults: its hyper-parameters and counters.
        check: converts and checks what a group says, in place.

    Attributes:
        all: the groups.
    """

    def __init__(self, defaults: dict[str, Any], check: Callable[[dict[str, Any]], None]) -> None:
        self.defaults = defaults
        self.all: list[dict[str, Any]] = []
        self._check = check
        self._eps: list[float] = []  # when the present step first perturbed
        self._seen: list[Any] = []  # in the groups, when they were checked last,
        self._inside: list[tuple[Tensor, float]] = []  # and in the tensors there

    def check_changes(self) -> None:
        """A scheduler or the user may have changed groups; looks at what has, before it is used."""
        names = names_of(self.defaults)
        now = [group.get(name) for group in self.all for name in names]
        now += map(len, self.all)
        same = len(now) == len(self._seen) and all(map(operator.is_, now, self._seen))
        if same and all(float(tensor) == value for tensor, value in self._inside):
            return
        for group in self.all:
            self._check(group)
        now = [group[name] for group in self.all for name in names]
        tensors = [v for v in now if isinstance(v, Tensor) and on_host(v.device)]
        self._inside = [(tensor, float(tensor)) for tensor in tensors]
        self._seen = [*now, *map(len, self.all)]

    def eps(self) -> list[float]:
        """The perturbation radius of each group; 1 for methods that have none."""
        return [float(group.get("eps", 1.0)) for group in self.all]

    def hold_eps(self, begins: bool = False) -> None:
        """The losses of a step tell a slope only if they were taken eps apart.

        Args:
            begins: whether this is the step's first perturbation.

        Raises:
            ValueError: eps is not what it was then.
        """
        now = self.eps()
        if begins:
            self._eps = now
        elif now != self._eps:
            raise ValueError(
                f"eps changed in the middle of a step, from {self._eps} to {now}: change it between"
                " steps"
            )

    def params(self) -> list[Tensor]:
        """All parameters, in the optimizer's order."""
        return list(chain.from_iterable(group["params"] for group in self.all))

    def shared(self, name: str, default: Any = None) -> Any:
        """What all groups have under a name."""
        return self.all[0].get(name, default)

    @property
    def seed(self) -> int:
        """Base seed of the run."""
        return int(self.all[0]["seed"])

    @property
    def step(self) -> int:
        """Steps taken, as far as the host knows."""
        return int(self.all[0]["step"])

    @property
    def restores(self) -> int:
        """Perturbations that were taken back since then without an update."""
        return int(self.all[0]["restores"])

    def take(self, logged: Sequence[dict[str, Any]]) -> None:
        """Set hyper-parameters to those that a log has of each group."""
        names = self.defaults.keys() - set(COUNTERS)
        for group, values in zip(self.all, logged, strict=True):
            group.update({name: value for name, value in values.items() if name in names})

    def count(self, **counters: Any) -> None:
        """Set counters."""
        for group in self.all:
            group.update(counters)


def described(name: str, param_groups: list[dict[str, Any]]) -> str:
    """An optimizer as `repr` shows it."""
    hidden = {"params", "param_names", *COUNTERS} - {"seed"}
    lines = [f"{name} ("]
    for number, group in enumerate(param_groups):
        lines.append(f"Parameter Group {number}")
        lines += [f"    {key}: {group[key]}" for key in sorted(group.keys() - hidden)]
    return "\n".join([*lines, ")"])
