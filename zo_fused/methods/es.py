"""ES: evolution strategies, from rewards instead of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from zo_fused.checks import choice, switch, whole
from zo_fused.directions.homing import Homing
from zo_fused.directions.per_query import PerQuery
from zo_fused.methods.table import Recipe, method
from zo_fused.parallel.options import Option
from zo_fused.rules.sgd import SGD
from zo_fused.step.direction import Direction
from zo_fused.step.estimates import Estimate
from zo_fused.step.members import Population
from zo_fused.step.schedule import Position
from zo_fused.step.shaping import SHAPINGS
from zo_fused.step.vectors import Vector, stacked


@method(Recipe("es", "ES"))
class ES(Population):
    """Evolution strategies (Salimans et al. 2017, arXiv 1703.03864): of language models, as in
    es-at-scale (arXiv 2509.24372); of low rank, as in EGGROLL (arXiv 2511.16652).

    A step takes the *rewards* R_i, higher is better, of a population of N members
    ``theta + eps s_i z_i``, and ``theta = theta + lr (1/N sum_i S_i s_i z_i - weight_decay theta)``
    with the scores S that `shaping` makes of the rewards. Each member has a z of its own and
    ``s_i = 1``; antithetic ones come in pairs of ``s = 1, -1`` with the same z.

    A group with an eps of its own has its scores times the first group's eps over its own, as an
    estimate of the gradient has: all groups follow that of one objective.

    Shapings: "zscore", ``(R - mean) / (std + 1e-8)``, as es-at-scale; "centered_rank", ranks from
    -1/2 to 1/2, equal rewards sharing theirs; "none", ``R / eps``, so that the sum estimates the
    gradient of the mean reward around theta (antithetic, it is MeZO's with N/2 queries). If all
    rewards are equal, the first two leave theta where it is.

    Rewards come from a closure, called once a member, ``opt.step(closure)``, or from outside
    (generation, a simulator): see `members`.

    N forward passes. Sweeps: one a member and one for the update, which draws all z in registers;
    one less with ``deferred``. No state. If a reward is not finite, the step is skipped.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, param groups, or the module.
        lr: learning rate (alpha). es-at-scale takes sigma / 2; there is no division by sigma.
        population: N, members of a step.
        shaping: "zscore", "centered_rank" or "none".
        antithetic: members in pairs; N is even then.
        direction: "dense", z of independent elements; "lowrank", ``z = U V^T / sqrt(rank)`` of a
            matrix, with U (m, rank) and V (n, rank) of each z alone, dense z of vectors.
        rank: columns of U and V, for direction "lowrank".
        eps: radius of the perturbation (sigma).
        weight_decay: decay, with the learning rate as factor.
        rounding: of the update in 16-bit weights: "nearest", or "stochastic", without bias.
        distribution: of the elements of z, or of U and V: "gaussian", "hadamard" or "rademacher".
        seed, parallel, deferred: see `ZerothOrderOptimizer`.

    Attributes:
        projected_grad: minus the scores, antithetic: half the difference of a pair's, float32
            [population], or [population / 2]. It is what the replay log has.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 5e-4,
        population: int = 30,
        shaping: str = "zscore",
        antithetic: bool = False,
        direction: str = "dense",
        rank: int = 1,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        distribution: str = "gaussian",
        *,
        seed: int = 0,
        parallel: Option = "auto",
        deferred: bool = False,
    ) -> None:
        population, antithetic = (
            whole("population", population, 1, bits=32),
            switch("antithetic", antithetic),
        )
        choice("shaping", shaping, SHAPINGS)
        if antithetic and population % 2:
            raise ValueError(f"antithetic members come in pairs: population={population} is odd")
        if population == 1 and shaping != "none":
            raise ValueError(f"one reward has no {shaping}: population must be 2 or more")
        low_rank = choice("direction", direction, ("dense", "lowrank")) == "lowrank"
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rounding": rounding}
        if low_rank:
            defaults["rank"] = rank
        elif rank != 1:
            raise ValueError('rank is for direction="lowrank"')
        options = {
            "population": population,
            "shaping": shaping,
            "antithetic": antithetic,
            "direction": direction,
            "distribution": distribution,
        }
        made: Direction = PerQuery(distribution) if low_rank else Homing(distribution)
        self.shaping = shaping
        self.antithetic = antithetic
        queries = population // 2 if antithetic else population
        schedule: Any = {"seed": seed, "deferred": deferred, "queries": queries}
        schedule["parallel"] = parallel
        super().__init__(params, made, SGD(), defaults, options, **schedule)

    def positions(self) -> list[Position]:
        """Where the members are, in order."""
        everywhere = super().positions()
        return everywhere if self.antithetic else [at for at in everywhere if at.sign > 0]

    def difference(self, losses: Mapping[Position, Any]) -> Estimate:
        """The mean reward and the rewards, from the rewards."""
        plus = [reward for position, reward in losses.items() if position.sign > 0]
        minus = [reward for position, reward in losses.items() if position.sign < 0]
        device = self.weights.buckets[0].device
        rewards = _as_vector([*plus, *minus], device)
        raw = rewards[: len(plus)]
        if minus:  # not finite where one of the two is not
            raw = raw - rewards[len(plus) :]
        return Estimate(rewards.mean().float(), raw, plus, minus)

    def transform(self, grads: Vector, plus: Sequence[Any], minus: Sequence[Any]) -> Vector:
        """Minus the scores: antithetic, half the difference of a pair's.

        Args:
            minus: rewards at the other sign; none if not antithetic.
        """
        if self.shaping != "none" and len(plus) + len(minus) == 1:
            raise ValueError(f"one reward has no {self.shaping}: two must come")
        scores = SHAPINGS[self.shaping](_as_vector([*plus, *minus], grads.device))
        if self.shaping == "none":
            scores = scores / self.param_groups[0]["eps"]
        if not minus:
            return -scores
        above, below = scores.split(len(plus))
        return (below - above) / 2


def _as_vector(rewards: Sequence[Any], device: Any) -> Vector:
    return stacked([r.double() if isinstance(r, Tensor) else r for r in rewards], device)
