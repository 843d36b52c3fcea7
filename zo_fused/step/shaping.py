"""From the rewards of a population to the scores that an evolution strategy climbs along.

Sums of float64 on the device where the rewards are; the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zo_fused.step.vectors import Vector


def zscore(rewards: Vector) -> Vector:
    """``(R - mean) / (std + 1e-8)`` with the standard deviation of the population (es-at-scale,
    arXiv 2509.24372). Zeros where all rewards are equal: there is nothing to choose, and the
    rounding of their mean must not be taken for a difference."""
    spread = rewards.std(correction=0) + 1e-8
    return torch.where(rewards.max() == rewards.min(), 0.0, (rewards - rewards.mean()) / spread)


def centered_rank(rewards: Vector) -> Vector:
    """Ranks, spread evenly from -1/2 to 1/2 (Salimans et al. 2017, arXiv 1703.03864). Equal rewards
    share the mean of their ranks: the order of the members says nothing."""
    apart = rewards[:, None] - rewards[None, :]
    return apart.sign().sum(dim=1) / max(1, 2 * (len(rewards) - 1))


def unshaped(rewards: Vector) -> Vector:
    """The rewards."""
    return rewards


# Rewards, float64 [members], to scores of that shape.
SHAPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "zscore": zscore,
    "centered_rank": centered_rank,
    "none": unshaped,
}
