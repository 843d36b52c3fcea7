"""A closure's losses: where the step wants them, each with the same dropout, checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zo_fused.noise.keys import on_host
from zo_fused.parallel.options import Option
from zo_fused.parallel.ranks import Ranks
from zo_fused.step.common_run import run_of
from zo_fused.step.direction import UsedOtherwise
from zo_fused.step.generators import GeneratorStates
from zo_fused.step.report import Report
from zo_fused.step.schedule import Position
from zo_fused.step.timing import Timer
from zo_fused.step.vectors import filled
from zo_fused.step.weights import Place, Weights

Loss = Tensor | float  # or any real number, such as NumPy's
Closure = Callable[[], Loss]

_NO_BACKWARD = (
    "zo_fused: a zeroth-order closure returns the loss and calls no backward(): step() evaluates "
    "it without gradients"
)
WRITES = (
    "writes to parameters, where they are perturbed: what it has written stays, less the "
    "perturbation, and no replay log has it"
)


def check_closure(closure: Any) -> None:
    """Raises:
    TypeError: it is no function.
    """
    if not callable(closure):
        raise TypeError(
            f"a function that computes the loss is needed, got {type(closure).__name__}: "
            "opt.step(lambda: model(**batch).loss)"
        )


class Evaluation:
    """Evaluates closures.

    Losses are numbers of the host, or tensors [] on the first parameter's GPU: float64, or float32
    where the closure's are (they go into sums of float64 as they are). Where several ranks take a
    step together, they are means over the ranks, float64.

    Attributes:
        ranks: that take a step together.
    """

    def __init__(self, weights: Weights, timer: Timer, report: Report, option: Option) -> None:
        self.ranks = Ranks(option, partial(run_of, weights))
        self._weights = weights
        self._timer = timer
        self._report = report
        self._generators: GeneratorStates | None = None  # before the step's first evaluation
        self._last: tuple[Tensor, int] | None = None  # loss on a GPU, alive there, and its address

    def losses_at(
        self, positions: Sequence[Position], closure: Closure, again: bool = False
    ) -> dict[Position, Any]:
        """The losses at positions of the present step, each with the same state of torch's global
        generators.

        Args:
            again: these follow others in the same step.
        """
        rows = self.rows(positions, 1, self._weights.visit, lambda _: [self.loss(closure)], again)
        return {position: loss for position, [loss] in zip(positions, rows, strict=True)}

    def losses_in_pairs(self, queries: int, closure: Closure) -> dict[Position, Any]:
        """The losses at both signs of every query; the weights stay at theta."""
        weights = self._weights
        weights.look_again()

        def both(query: int) -> Sequence[Any]:
            return weights.beside.both(weights.perturbations(query), closure).unbind()

        rows = self.at_theta(queries, 2, both)
        weights.groups.hold_eps()  # the closure may have changed it, and no sweep will meet that
        signs = (1.0, -1.0)
        return {Position(s, q): rows[q][i] for q in range(queries) for i, s in enumerate(signs)}

    def at_theta(
        self, queries: int, width: int, take: Callable[[int], Sequence[Any]]
    ) -> list[Sequence[Any]]:
        """Numbers of each query, the weights at theta. Checked as losses are."""

        def scalars(query: int) -> list[Any]:
            with self._timer("forward"), self._weights.beside.watching():
                return [self.scalar(number) for number in take(query)]

        def look(_: int) -> None:
            self._weights.visit(Position(0.0))  # nothing moves, but parameters are looked at

        return self.rows(range(queries), width, look, scalars)

    def rows(
        self,
        places: Sequence[Any],
        width: int,
        go: Callable[[Any], None],
        take: Callable[[Any], Sequence[Any]],
        again: bool = False,
    ) -> list[Sequence[Any]]:
        """Numbers of the present step, `width` of each place, all with the same state of torch's
        global generators.

        Args:
            go: puts the weights there.
            take: evaluates there.
            again: these follow others in the same step.
        """
        generators = self._generators if again else None

        def there(place: Any) -> None:
            with self._timer("perturb"):
                go(place)

        def taken(place: Any) -> Sequence[Any]:
            nonlocal generators
            generators = self._rewound(generators)
            return take(place)

        while True:
            # A weight that has no side path must be met at the same place by all ranks.
            whole = self._weights.beside.module is not None and self._generators is None
            try:
                rows = self.ranks.rows(places, width, there, taken, whole)
                self._generators = generators
                return rows
            except UsedOtherwise as use:
                self._leave_in_place(use, generators)

    def loss_at(self, place: Place, closure: Closure) -> Any:
        """One more loss of this step, with the state of the generators that the others had.

        Raises:
            ValueError: the place has not a coefficient for every param group.
        """
        groups = len(self._weights.groups.all)
        if len(place.at) not in (0, groups):
            raise ValueError(
                f"a place has a coefficient of z for every param group: {groups}, not "
                f"{len(place.at)}"
            )

        def take(_: Place) -> list[Any]:
            return [self.loss(closure)]

        [[loss]] = self.rows([place], 1, self._weights.go, take, again=True)
        return loss

    def loss(self, closure: Closure) -> Any:
        """The loss where the weights are."""
        self._weights.beside.attach(self._weights.buckets)  # a part of theta may be kept there
        before = self._weights.parameters.last_versions()
        with self._timer("forward"), self._weights.beside.watching():
            try:
                loss = self._apart(self.scalar(closure()))
            except RuntimeError as error:
                if "does not require grad and does not have a grad_fn" in str(error):
                    error.add_note(_NO_BACKWARD)
                raise
        if self._weights.parameters.versions() != before:
            self._report.warn(f"the closure {WRITES}")
        return loss

    def given(self, losses: Loss | Sequence[Loss]) -> list[Any]:
        """The losses that a user gives, one a query.

        Raises:
            ValueError: there are not as many.
            TypeError: as `scalar`.
        """
        several = isinstance(losses, Sequence) or (isinstance(losses, Tensor) and losses.dim() == 1)
        given = list(losses) if several else [losses]  # type: ignore[arg-type]
        if not self._weights.buckets:
            self._weights.look()
        if len(given) != (queries := self._weights.queries()):
            raise ValueError(
                f"step() needs loss_plus and loss_minus of {queries} queries each, got {len(given)}"
            )
        return self.told(given)

    def told(self, losses: Sequence[Any]) -> list[Any]:
        """Losses, or rewards, that come from outside.

        Raises:
            TypeError: as `scalar`.
        """

        def take(_: None) -> list[Any]:
            return [self.scalar(loss) for loss in losses]

        [row] = self.ranks.rows([None], len(losses), lambda _: None, take)
        return list(row)

    def scalar(self, loss: Any) -> Any:
        """A loss, checked.

        Raises:
            TypeError: it is no real number, and no tensor of one element.
        """
        if not isinstance(loss, Tensor | Real) and getattr(loss, "ndim", None) == 0:
            loss = loss.item()  # NumPy's bool, and its arrays of shape ()
        if not isinstance(loss, Tensor | Real):
            raise TypeError(f"the closure must return a scalar loss, got {type(loss).__name__}")
        if isinstance(loss, Tensor) and (loss.numel() != 1 or loss.is_complex()):
            raise TypeError(f"the closure must return a scalar loss, got shape {tuple(loss.shape)}")
        if not self._weights.buckets:
            self._weights.look()
        if isinstance(loss, Tensor) and loss.is_floating_point() and loss.element_size() < 4:
            dtype = str(loss.dtype).removeprefix("torch.")
            self._report.warn(
                f"the loss has dtype {dtype}, whose grid is coarser than the difference of two "
                "evaluations; compute it in float32 (logits.float() before the loss)"
            )
        device = self._weights.buckets[0].device
        if on_host(device):
            return float(loss)
        value = loss.detach() if isinstance(loss, Tensor) else filled(float(loss), device)
        kept = torch.float32 if value.dtype == torch.float32 else torch.float64
        return value.reshape(()).to(device=device, dtype=kept)

    def _apart(self, loss: Any) -> Any:
        """A loss that stays. A closure that returns the same memory every time, as the output of a
        CUDA graph, would overwrite it with the next one."""
        if not isinstance(loss, Tensor):
            return loss
        before, self._last = self._last, (loss, loss.data_ptr())
        return loss if before is not None and before[1] != self._last[1] else loss.clone()

    def _rewound(self, generators: GeneratorStates | None) -> GeneratorStates:
        if generators is None:
            return GeneratorStates(bucket.device for bucket in self._weights.buckets)
        generators.rewind()
        self._weights.draws = bool(generators.gpu_moved)
        return generators

    def _leave_in_place(self, use: UsedOtherwise, generators: GeneratorStates | None) -> None:
        """Start again from theta; this weight has no side path."""
        self._weights.flush()
        if generators is not None:
            generators.rewind()
        self._weights.parameters.keep_in_place(use.param, f"is used by {use.function}")
