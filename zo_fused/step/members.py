"""A population whose rewards come from outside: weights go to a member, and on to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_fused.step.access import Access, plain_tensors
from zo_fused.step.estimates import Estimate, transformed
from zo_fused.step.evaluation import WRITES
from zo_fused.step.optimizer import ZerothOrderOptimizer
from zo_fused.step.report import Report
from zo_fused.step.schedule import Position
from zo_fused.step.timing import Timer
from zo_fused.step.vectors import vector
from zo_fused.step.weights import Weights

Found = Callable[[Mapping[Position, Any]], Estimate]


class Member:
    """One of a population. ``with member:`` puts the weights at its place.

    Attributes:
        number: of the member, from 0.
        position: where it is: ``theta + position.sign * eps * z`` of its query.
        reward: how good it is, higher is better: a number, or a tensor of one, which is copied. To
            be set within the block or after it.
        entered: whether the weights have been there.
    """

    def __init__(self, generation: Generation, number: int, position: Position) -> None:
        self.number = number
        self.position = position
        self.entered = False
        self._reward: Any = None
        self._generation = generation

    @property
    def reward(self) -> Any:
        return self._reward

    @reward.setter
    def reward(self, value: Any) -> None:
        self._reward = value.detach().clone() if isinstance(value, Tensor) else value

    def __enter__(self) -> Member:
        self._generation.enter(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._generation.leave(self, error)

    def __repr__(self) -> str:
        sign = "+" if self.position.sign > 0 else "-"
        return f"member {self.number} (theta {sign} eps z[{self.position.query}])"


class Generation:
    """The members of a step.

    Between the blocks of two members the weights stay where they are, and the parameters are
    guarded: whoever looks finds theta. So from one member to the next there is one sweep, and none
    from the last one to the update.

    Args:
        estimate: from the rewards to what the step needs.
    """

    def __init__(
        self,
        weights: Weights,
        access: Access,
        timer: Timer,
        report: Report,
        positions: Sequence[Position],
        estimate: Found,
    ) -> None:
        self.members = [Member(self, number, at) for number, at in enumerate(positions)]
        self._weights = weights
        self._access = access
        self._timer = timer
        self._report = report
        self._estimate = estimate
        self._step = weights.groups.step
        self._eps = weights.groups.eps()
        self._inside: Member | None = None
        self._versions: Any = None  # of the parameters, when its block began

    def __call__(self) -> Estimate:
        """What the rewards tell.

        Raises:
            ValueError: a member has no reward, or its block was never entered.
            TypeError: a reward is no number.
        """
        missing = [member for member in self.members if member.reward is None]
        if missing:
            raise ValueError(
                f"no reward: {', '.join(map(repr, missing))}; set member.reward of each before "
                "step()"
            )
        elsewhere = [member for member in self.members if not member.entered]
        if elsewhere:
            raise ValueError(
                f"a reward without `with member:`, so of other weights than the member's: "
                f"{', '.join(map(repr, elsewhere))}; enter each, one after the other, and evaluate "
                "there: for member in opt.members(): with member: member.reward = .."
            )
        self._check_eps()
        return self._estimate({member.position: member.reward for member in self.members})

    @plain_tensors
    def enter(self, member: Member) -> None:
        """Put the weights at a member.

        Raises:
            RuntimeError: another member's block is open, or the generation is over.
        """
        if self._inside is not None:
            raise RuntimeError(f"{member} within the block of {self._inside}: one at a time")
        with self._access.going_away():
            if self._access.pending is not self:
                raise RuntimeError(
                    f"{member} is of a generation that is over: members() makes the next one"
                )
            self._check_eps()
            changed = self._weights.parameters.changed(self._weights.direction)
            if changed and any(m.entered for m in self.members):
                raise RuntimeError(
                    "parameters changed in the middle of a generation, so its rewards are not of "
                    "one population: take all members anew"
                )
            self._weights.look_again()
            torch.clear_autocast_cache()
            with self._timer("perturb"):
                self._weights.visit(member.position)
            self._access.pending = None  # within the block the weights are for all to see
            self._inside = member
            member.entered = True
        self._versions = self._weights.parameters.versions()

    @plain_tensors
    def leave(self, member: Member, error: BaseException | None) -> None:
        """The weights stay, guarded; after an error they are at theta.

        Raises:
            RuntimeError: they were moved within the block, so the reward is of other weights.
        """
        self._inside = None
        written = self._weights.parameters.versions() != self._versions
        with self._access.alone():
            over = self._access.pending is not None or self._weights.groups.step != self._step
            if not over:  # no step, estimate or other generation was begun within
                self._access.pending = self
                there = self._weights.along(member.position)
                if error is None and self._weights.place == there:
                    if written:
                        self._report.warn(f"the block of a member {WRITES}")
                    return
            member.reward = None
            self._weights.flush()
        if error is None:
            raise RuntimeError(
                f"the weights were moved within the block of {member} (by step, flush, state_dict, "
                "a copy, ..), so its reward is not that of its weights"
            )

    def stop(self) -> None:
        """Nobody wants the other members: back to theta."""
        if self._access.pending is self:
            self._access.flush()

    def _check_eps(self) -> None:
        if self._weights.groups.eps() != self._eps:
            raise ValueError(
                f"eps changed in the middle of a generation, from {self._eps} to "
                f"{self._weights.groups.eps()}: change it between steps"
            )


class Population(ZerothOrderOptimizer):
    """An optimizer that takes rewards: its `positions` are the members of a step, and its
    `difference` is given their rewards."""

    takes_rewards = True
    why_skipped = "a reward was not finite"
    needs_closure = True  # a loss has no place here
    needs = (
        "step() needs a closure that returns the reward, step(lambda: reward(model)), or rewards: "
        "for member in opt.members(): with member: member.reward = .."
    )

    def members(self) -> Iterator[Member]:
        """The population of the coming step, for rewards that don't come from a closure:

            for member in opt.members():
                with member:
                    member.reward = score(model)
            opt.step()

        Within the block the weights are the member's; the next block takes them on to the next
        member in one sweep, and `step` applies the update on the way back. Between blocks whoever
        looks at a parameter finds theta, at the price of a sweep. After an exception or Ctrl-C in a
        block, or if the loop ends early, the weights are at theta. Evaluate under `torch.no_grad`.

        Members may come in any order (``list(opt.members())``), and a reward may be set after the
        block. Every one needs its block and a reward: `step` names those that have none, and works
        again when they have. A reward that is not finite makes the step be skipped and counted in
        `skipped_steps`; give a member that failed a low reward instead.

        Raises:
            RuntimeError: in ``with member``: another's block is open, a step or another `members`
                has ended this generation, or a parameter was frozen or replaced in the middle of
                it; at its end: the weights were moved within. At once: ranks share the members of a
                step, which takes a closure.
            TypeError, ValueError: in `step`: a reward is no number, or is missing.
        """
        self.ranks.refuse_shared_queries("members()", "step(closure)")
        return self._members()

    def _members(self) -> Iterator[Member]:
        generation = self._begin()
        try:
            yield from generation.members
        except GeneratorExit:
            generation.stop()
            raise

    @plain_tensors
    def tell(self, rewards: Sequence[Any]) -> Tensor:
        """The step of a population that was evaluated elsewhere, where each member is
        ``theta + sign * eps * z`` of its query (`positions`), exactly. Nothing is visited here, and
        no mean over ranks is taken: tell all of them the same.

        Args:
            rewards: of all members, in order: numbers. None: it did not come. The step is then that
                of the others, as if they were the population; of antithetic ones, of whole pairs.

        Returns:
            Their mean reward, float32 tensor [].

        Raises:
            TypeError, ValueError: it is no sequence with one number a member, or of no member
                (pair) it is one.
        """
        if not isinstance(rewards, (Sequence, Tensor, np.ndarray)) or isinstance(rewards, str):
            raise TypeError(
                "rewards must be a list, with one of each member in the order of positions(), not "
                f"{type(rewards).__name__}"
            )
        with self._access.a_step():
            self._access.drop_pending()
            self.weights.look()
            positions = self.positions()
            if len(rewards) != len(positions):
                raise ValueError(f"there are {len(positions)} members, but {len(rewards)} rewards")
            of_members = zip(positions, rewards, strict=True)
            missing = {at.query for at, reward in of_members if reward is None}
            came = sorted({at.query for at in positions} - missing)
            if not came:
                raise ValueError("no reward has come, so there is no step to make")
            found = self.difference(
                {
                    at: self._evaluation.scalar(reward)
                    for at, reward in zip(positions, rewards, strict=True)
                    if at.query not in missing
                }
            )
            grads = torch.zeros(self.weights.queries(), device=self.weights.buckets[0].device)
            grads[came] = transformed(self._transform, found) * (len(grads) / len(came))
            with self._timer("update"):
                self.update(grads)
            return found.loss

    @plain_tensors
    def follow(self, grads: Sequence[float]) -> None:
        """A step that `tell` made in another process, of the same weights.

        Args:
            grads: `projected_grad` there, a number a query.

        Raises:
            ValueError: there are not as many.
        """
        with self._access.a_step():
            self._access.drop_pending()
            self.weights.look()
            if len(grads) != (queries := self.weights.queries()):
                raise ValueError(f"a step has {queries} projected gradients, not {len(grads)}")
            self.update(vector(grads, self.weights.buckets[0].device).float())

    @plain_tensors
    def _begin(self) -> Generation:
        parts = (self.weights, self._access, self._timer, self._report)
        with self._access.going_away():
            self._access.drop_pending()
            generation = Generation(*parts, self.positions(), self._of_members)
            self._access.pending = generation
        return generation

    def _of_members(self, rewards: Mapping[Position, Any]) -> Estimate:
        told = self._evaluation.told(list(rewards.values()))
        return self.difference(dict(zip(rewards, told, strict=True)))
