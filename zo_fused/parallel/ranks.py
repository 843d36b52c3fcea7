"""The losses of a step over all ranks: each evaluates its own, one collective tells all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from zo_fused.checks import bounded
from zo_fused.noise.keys import on_host
from zo_fused.parallel.agreement import check_agreement
from zo_fused.parallel.groups import Groups, groups_of
from zo_fused.parallel.options import Option, check_parallel
from zo_fused.recording import capturing

Place = TypeVar("Place")
Row = Sequence[Any]  # numbers of the host, or float tensors [] on the run's device

# What is told beside the losses: whether a rank failed, and which; where it is in the run, twice
# (the square of a mean is the mean of squares where all are equal).
_TOLD = 4


class Run(NamedTuple):
    """What ranks must have in common."""

    device: torch.device  # of losses
    step: int
    flushes: int  # since the last update
    about: Callable[[], Mapping[str, Any]]
    weights: Callable[[], Mapping[str, Tensor]]
    check: Callable[[Groups], None]  # of how ranks share a step; may raise, on all ranks


class Ranks:
    """The ranks that take part in an optimizer's steps. Alone, a process evaluates and no more.

    Args:
        run: says what is compared, and where the run is.

    Attributes:
        option: as the user gave it.
    """

    def __init__(self, option: Option, run: Callable[[], Run]) -> None:
        self.option = option
        self._parallel = check_parallel(option)
        self._run = run
        self._weight: Any = 1.0  # of this rank's losses in the present step
        self._refused: Exception | None = None  # that weight, which the others are to know
        self._checked: int | None = None  # the step in which all were compared last
        self._late: tuple[int, Tensor] | None = None  # what a step's ranks told, on a GPU

    def groups(self) -> Groups | None:
        """The groups of the ranks; None: there are no others."""
        return groups_of(self._parallel)

    def weigh(self, weight: Any) -> None:
        """Losses of the coming step count so much: a number, or a tensor of one, on any device.

        Raises:
            TypeError: it is neither.
            ValueError: it is negative or not finite. Where there are others, `rows` raises it.
        """
        if isinstance(weight, Tensor) and weight.numel() == 1 and weight.device.type != "cpu":
            self._weight = weight.detach().reshape(()).double()  # the host doesn't wait
        else:
            try:
                self._weight = bounded("weight", weight, "a finite number >= 0", _not_negative)
            except (TypeError, ValueError) as error:
                if self.groups() is None:
                    raise
                self._refused = error

    def meet_anew(self) -> None:
        """The next step compares everything, as the first does."""
        self._checked = self._late = None

    def refuse_shared_queries(self, name: str, instead: str) -> None:
        """Raises:
        RuntimeError: ranks share a step's perturbations, so not each of them goes its own way.
        """
        if (groups := self.groups()) and groups.query is not None:
            raise RuntimeError(
                f"{name} goes to all perturbations of a step, and ranks share them "
                f"(zo_fused.Parallel(query=..)): use {instead}"
            )

    def rows(
        self,
        places: Sequence[Place],
        width: int,
        go: Callable[[Place], None],
        take: Callable[[Place], Row],
        whole: bool = False,
    ) -> list[Row]:
        """The numbers of all places, `width` each, as means over the ranks that took them.

        Args:
            go: goes to a place. Every rank goes to all, in order: in 16 bits the way leaves traces.
            take: evaluates there.
            whole: whether every rank takes all.

        Raises:
            Whatever `take` raises, and RuntimeError on the other ranks, where all have gone to all
            places nevertheless; also if ranks are not at the same step of the same run.
        """
        groups = self.groups()
        if groups is None:
            return [_there(go, take, place) for place in places]
        run = self._run()
        self._listen(groups)
        if self._checked is None:
            self._compare(groups, run)
        mine = range(len(places)) if whole else groups.share(len(places))
        taken: list[Row] = []
        failure: BaseException | None = self._refused
        self._refused = None
        try:
            for number, place in enumerate(places):
                go(place)
                if number in mine and failure is None:
                    failure = _tried(taken, take, place)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            failure = error
        if failure is not None:
            with suppress(Exception):  # others that are not there: this error says more
                self._exchange(groups, run, mine, [], (len(places), width))
            self._late = None
            raise failure
        rows = self._exchange(groups, run, mine, taken, (len(places), width))
        every = self._parallel.check_every if self._parallel else 1
        if not capturing() and abs(run.step - (self._checked or 0)) >= every:
            self._listen(groups)
            self._compare(groups, run)
        return rows

    def _exchange(
        self, groups: Groups, run: Run, mine: range, taken: list[Row], shape: tuple[int, int]
    ) -> list[Row]:
        """Sum over ranks of weighted numbers and of weights, in one vector of float64."""
        numbers = torch.zeros(2, *shape, dtype=torch.float64, device=run.device)
        if taken:
            own = _table(taken, run.device)
            weight = torch.as_tensor(self._weight, dtype=torch.float64, device=run.device)
            weight = torch.where(weight >= 0, weight, math.nan)
            # What a rank without examples has, such as the mean of nothing, does not count.
            numbers[0, mine.start : mine.stop] = torch.where(weight == 0, 0.0, own * weight)
            numbers[1, mine.start : mine.stop] = weight
        else:
            numbers.fill_(math.nan)
        here = (run.step % 1024) * 16 + min(run.flushes, 15)
        failed = float(not taken)
        told = [failed, failed * groups.rank, here, here * here]
        vector = torch.cat([numbers.flatten(), _constant(told, run.device)])
        groups.sum_(vector)
        sums = vector[:-_TOLD].view(2, *shape)
        self._late = run.step, vector[-_TOLD:]
        means = sums[0] / sums[1]
        if on_host(run.device):
            if taken:
                self._listen(groups)
            return means.tolist()
        return [row.unbind() for row in means.unbind()]

    def _listen(self, groups: Groups) -> None:
        """What the other ranks told with their losses. On a GPU that is of the step before, for
        which the host need not wait.

        Raises:
            RuntimeError: one of them failed, or is not where this one is.
        """
        if self._late is None or capturing():
            return
        (step, told), self._late = self._late, None
        failed, who, here, squares = told.tolist()
        if failed:
            which = f"rank {who:.0f}" if failed == 1 else f"{failed:.0f} ranks"
            raise RuntimeError(f"step {step}: {which} failed, see the error there; nothing is done")
        if int(squares) * groups.size != int(here) ** 2:
            raise RuntimeError(
                "the ranks are not at the same step, or one of them has put its weights at theta "
                "alone (a flush, a save, an evaluation): do that on all ranks, and load the same "
                "state on all"
            )

    def _compare(self, groups: Groups, run: Run) -> None:
        run.check(groups)
        check_agreement(groups, run.about(), run.weights(), run.device)
        groups.share_generators(run.device)
        self._checked = run.step


def _there(go: Callable[[Place], None], take: Callable[[Place], Row], place: Place) -> Row:
    go(place)
    return take(place)


def _tried(taken: list[Row], take: Callable[[Place], Row], place: Place) -> BaseException | None:
    """Evaluate; what goes wrong is for later, when the others have been told."""
    try:
        taken.append(take(place))
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return error
    return None


def _table(rows: Sequence[Row], device: torch.device) -> Tensor:
    flat = [number for row in rows for number in row]
    if isinstance(flat[0], Tensor):
        made = torch.stack([number.double() for number in flat])
    else:
        made = torch.tensor(flat, dtype=torch.float64)
    return made.to(device).view(len(rows), -1)


def _constant(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the host, as arguments of kernels: nothing is copied."""
    full = [torch.full((), n, dtype=torch.float64, device=device) for n in numbers]
    return torch.stack(full)


def _not_negative(weight: float) -> bool:
    return 0 <= weight < math.inf
