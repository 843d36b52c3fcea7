"""A closure's losses: where the step wants them, each with the same dropout, checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zo_fused.noise.keys import on_host
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
    where the closure's are (they go into sums of float64 as they are).
    """

    def __init__(self, weights: Weights, timer: Timer, report: Report) -> None:
        self._weights = weights
        self._timer = timer
        self._report = report
        self._generators: GeneratorStates | None = None  # before the step's first evaluation

    def losses_at(
        self, positions: Sequence[Position], closure: Closure, again: bool = False
    ) -> dict[Position, Any]:
        """The losses at positions of the present step, each with the same state of torch's global
        generators.

        Args:
            again: these follow others in the same step.
        """
        generators = self._generators if again else None
        while True:
            try:
                losses = {}
                for position in positions:
                    with self._timer("perturb"):
                        self._weights.visit(position)
                    generators = self._rewound(generators)
                    losses[position] = self.loss(closure)
                self._generators = generators
                return losses
            except UsedOtherwise as use:
                self._leave_in_place(use, generators)

    def losses_in_pairs(self, queries: int, closure: Closure) -> dict[Position, Any]:
        """The losses at both signs of every query; the weights stay at theta."""
        weights, generators = self._weights, None
        while True:
            try:
                weights.look_again()
                with self._timer("perturb"):
                    weights.visit(Position(0.0))  # nothing moves, but parameters are looked at
                losses: dict[Position, Any] = {}
                for query in range(queries):
                    generators = self._rewound(generators)
                    with self._timer("forward"), weights.beside.watching():
                        both = weights.beside.both(weights.perturbations(query), closure)
                    for sign, loss in zip((1.0, -1.0), both.unbind(), strict=True):
                        losses[Position(sign, query)] = self.scalar(loss)
                return losses
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
        with self._timer("perturb"):
            self._weights.go(place)
        self._generators = self._rewound(self._generators)
        return self.loss(closure)

    def loss(self, closure: Closure) -> Any:
        """The loss where the weights are."""
        self._weights.beside.attach(self._weights.buckets)  # a part of theta may be kept there
        with self._timer("forward"), self._weights.beside.watching():
            try:
                return self.scalar(closure())
            except RuntimeError as error:
                if "does not require grad and does not have a grad_fn" in str(error):
                    error.add_note(_NO_BACKWARD)
                raise

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
        return [self.scalar(loss) for loss in given]

    def scalar(self, loss: Any) -> Any:
        """A loss, checked.

        Raises:
            TypeError: it is no real number, and no tensor of one element.
        """
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
