"""From the losses of a step to its projected gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zo_fused.step.buckets import Bucket
from zo_fused.step.schedule import Side
from zo_fused.step.vectors import (
    Vector,
    all_finite,
    as_float32,
    as_float64,
    quotient,
    stacked,
    where,
)

# Of a method: what the rule gets instead of projected gradients, from the losses on either side.
Transform = Callable[[Vector, Sequence[Any], Sequence[Any]], Vector]


class Estimate(NamedTuple):
    """What the losses of a step tell, before `transform`."""

    loss: Tensor  # their mean, float32 []
    grads: Vector  # projected gradients [queries]; float32 where nothing transforms them
    plus: Sequence[Any]  # the losses on either side, a query each
    minus: Sequence[Any]


def slopes(sides: Sequence[Side], eps: float, device: torch.device) -> Vector:
    """The projected gradient of every query, float64."""
    found = [(above - below) / (eps * apart) for above, below, apart in sides]
    return stacked(found, device)


def estimated(sides: Sequence[Side], eps: float, bucket: Bucket, exact: bool) -> Estimate:
    """The estimate of a step.

    Args:
        bucket: on whose device it is.
        exact: whether a method transforms the projected gradients, which then are float64.
    """
    plus, minus = [above for above, _, _ in sides], [below for _, below, _ in sides]
    if isinstance(plus[0], Tensor):
        radii = [eps * apart for _, _, apart in sides]
        return _estimated_on_device(plus, minus, radii, bucket, exact)
    mean = (sum(plus) + sum(minus)) / (2 * len(sides))
    return Estimate(as_float32(mean), slopes(sides, eps, bucket.device), plus, minus)


def _estimated_on_device(
    plus: list[Tensor], minus: list[Tensor], radii: list[float], bucket: Bucket, exact: bool
) -> Estimate:
    """The same bits, in three kernels of one query that nothing transforms."""
    numbers = torch.stack([loss for pair in zip(plus, minus, strict=True) for loss in pair])
    # (a + b i) (1 + i) = (a - b) + (a + b) i; products with 1 are exact, also where they are fused
    both = torch.view_as_real(torch.view_as_complex(numbers.view(-1, 2)) * bucket.turn)
    if len(plus) == 1 and not exact:
        grads, mean = quotient(both[0], bucket.numbers([*radii, 2.0])).split(1)
        return Estimate(mean.reshape(()), grads, plus, minus)
    grads, sums = both[:, 0] / bucket.numbers(radii), both[:, 1]
    return Estimate(as_float32(sums.sum() / (2 * len(plus))), grads, plus, minus)


def transformed(transform: Transform | None, estimate: Estimate) -> Vector:
    """What a method makes of projected gradients, float32 [queries]. If one was not finite, none
    is: clipped, infinity is a number, but the step must be skipped.

    Raises:
        TypeError, ValueError: what `transform` returns is not a number a query.
    """
    _, grads, plus, minus = estimate
    if transform is None:
        return grads.float()
    finite = all_finite(grads)  # before `transform` can write into them
    made = transform(grads, *([as_float64(loss) for loss in losses] for losses in (plus, minus)))
    if not isinstance(made, Tensor):
        raise TypeError(f"transform() must return a tensor, got {type(made).__name__}")
    if made.shape != (len(plus),):
        raise ValueError(
            f"transform() must return {len(plus)} projected gradients, a query each, got shape "
            f"{tuple(made.shape)}"
        )
    return (made if finite is True else where(finite, made, math.nan)).float()
