"""From the losses of a step to its projected gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

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


def slopes(sides: Sequence[Side], eps: float, device: torch.device) -> Vector:
    """The projected gradient of every query, float64."""
    found = [(above - below) / (eps * apart) for above, below, apart in sides]
    return stacked(found, device)


def estimated(
    sides: Sequence[Side], eps: float, bucket: Bucket, transform: Transform | None
) -> tuple[Tensor, Vector]:
    """The mean loss, float32 [], and the projected gradients, float32 [queries], of a step.

    Args:
        bucket: on whose device they are.
        transform: of the method; None if it has none.
    """
    plus, minus = [above for above, _, _ in sides], [below for _, below, _ in sides]
    if isinstance(plus[0], Tensor):
        radii = [eps * apart for _, _, apart in sides]
        return _estimated_on_device(plus, minus, radii, bucket, transform)
    mean = (sum(plus) + sum(minus)) / (2 * len(sides))
    grads = slopes(sides, eps, bucket.device)
    return as_float32(mean), transformed(transform, grads, plus, minus).float()


def _estimated_on_device(
    plus: list[Tensor],
    minus: list[Tensor],
    radii: list[float],
    bucket: Bucket,
    transform: Transform | None,
) -> tuple[Tensor, Vector]:
    """The same bits, in three kernels of one query that nothing transforms."""
    numbers = torch.stack([loss for pair in zip(plus, minus, strict=True) for loss in pair])
    # (a + b i) (1 + i) = (a - b) + (a + b) i; products with 1 are exact, also where they are fused
    both = torch.view_as_real(torch.view_as_complex(numbers.view(-1, 2)) * bucket.turn)
    if len(plus) == 1 and transform is None:
        grads, mean = quotient(both[0], bucket.numbers([*radii, 2.0])).split(1)
        return mean.reshape(()), grads
    grads, sums = both[:, 0] / bucket.numbers(radii), both[:, 1]
    wide = ([as_float64(loss) for loss in losses] for losses in (plus, minus))
    return as_float32(sums.sum() / (2 * len(plus))), transformed(transform, grads, *wide).float()


def transformed(
    transform: Transform | None, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]
) -> Vector:
    """What a method makes of projected gradients. If one was not finite, none is: clipped, infinity
    is a number, but the step must be skipped.

    Raises:
        TypeError, ValueError: what `transform` returns is not a number a query.
    """
    if transform is None:
        return grads
    finite = all_finite(grads)  # before `transform` can write into them
    made = transform(grads, plus, minus)
    if not isinstance(made, Tensor):
        raise TypeError(f"transform() must return a tensor, got {type(made).__name__}")
    if made.shape != (len(plus),):
        raise ValueError(
            f"transform() must return {len(plus)} projected gradients, a query each, got shape "
            f"{tuple(made.shape)}"
        )
    return made if finite is True else where(finite, made, math.nan)
