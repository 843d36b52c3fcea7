"""The driver of a Ray cluster: it takes the steps that actors follow."""

from __future__ import annotations

import os
import time
from typing import Any

from torch import Tensor

from zo_fused.methods.es import ES
from zo_fused.ray.actor import Actor, Make
from zo_fused.step.fingerprint import fingerprint


class Driver:
    """Takes the steps of `zo_fused.ES` over a population that actors evaluate.

    To an actor go the numbers of its members, and after the step a number a query, by which it
    makes the same update; never weights. Actors that have not answered by the deadline are not
    waited for: the step is the estimate over the members that came, and they follow when they can.
    One that dies is replaced; the new one comes from the base weights by the log.

    Args:
        make: returns the base model and its reward. Called in every process; pickled by Ray.
        log: path of the replay log, on the driver's machine. If there is one, the run goes on.
        actors: how many.
        deadline: seconds that a step waits for rewards; longer, until two members have come.
        check_every: steps after which the weights of idle actors are compared with the driver's.
        resources: of an actor, in Ray's words: ``{"num_gpus": 1}``.
        options: of `zo_fused.ES`; not ``deferred``.

    Attributes:
        optimizer, model: of this process.
        missed: members so far that came too late or never.
    """

    def __init__(
        self,
        make: Make,
        log: str | os.PathLike[str],
        actors: int = 2,
        deadline: float = 60.0,
        check_every: int = 500,
        resources: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        import ray

        if options.get("deferred"):
            raise ValueError("deferred leaves weights perturbed between steps: leave it out")
        self._make, self._options, self._kind = make, options, ray.remote(Actor)
        self._kind = self._kind.options(**resources) if resources else self._kind
        self._deadline, self._check_every, self.missed = deadline, check_every, 0
        self.model, _ = make()
        self.optimizer = ES(self.model, parallel=None, **options)
        self.optimizer.join(log)
        self._busy: dict[Any, Any] = {}  # actors, and what keeps each from taking members
        self._proven: set[Any] = set()  # those that have answered
        for _ in range(actors):
            self.add()
        ray.get(list(self._busy.values()))

    def add(self) -> None:
        """One more actor, at any time. It takes part as soon as it has caught up."""
        log = self.optimizer.weights.log.to_send(None)
        actor: Any = self._kind.remote(self._make, log, self._options)
        self._busy[actor] = actor.fingerprint.remote()

    def step(self) -> Tensor:
        """One step. Returns the mean reward of the members that came, float32 tensor [].

        Raises:
            ray.exceptions.RayTaskError: a reward failed; the step is not made.
            ray.exceptions.RayActorError: an actor died before it had caught up.
            RuntimeError: idle actors have other weights than the driver.
        """
        optimizer, rewards = self.optimizer, self._rewards()
        while rewards.count(None) == len(rewards):  # whoever was asked has died
            rewards = self._rewards()
        self.missed += rewards.count(None)
        loss = optimizer.tell(rewards)
        assert optimizer.projected_grad is not None
        grads = optimizer.projected_grad.reshape(-1).tolist()
        for actor in self._busy:
            actor.follow.remote(grads)
        if optimizer.step_count % self._check_every == 0:
            own = fingerprint([p.detach() for p in self.model.parameters()])
            asked = [(actor, actor.fingerprint.remote()) for actor in self._free()]
            if not {own, None}.issuperset(self._answer(*one) for one in asked):
                raise RuntimeError("actors have other weights than the driver: is make() alike?")
        return loss

    def close(self) -> None:
        """End the actors and the log."""
        import ray

        self.optimizer.close_log()
        for actor in self._busy:
            ray.kill(actor)

    def _rewards(self) -> list[Any]:
        import ray

        positions = self.optimizer.positions()
        rewards: list[Any] = [None] * len(positions)
        queries = sorted({at.query for at in positions})
        while not (free := self._free()):
            ray.wait(list(self._busy.values()))
        asked = {}
        for number, actor in enumerate(free[: len(queries)]):
            mine = set(queries[number :: len(free)])  # both signs of a z go to one actor
            members = [i for i, at in enumerate(positions) if at.query in mine]
            self._busy[actor] = actor.evaluate.remote(self.optimizer.step_count, members)
            asked[self._busy[actor]] = actor, members
        end, least = time.monotonic() + self._deadline, min(2, len(rewards))
        while asked:
            enough = len(rewards) - rewards.count(None) >= least
            left = max(0.0, end - time.monotonic()) if enough else None
            if not (done := ray.wait(list(asked), timeout=left)[0]):
                break
            actor, members = asked.pop(done[0])
            for member, reward in zip(members, self._answer(actor, done[0]) or [], strict=False):
                rewards[member] = reward
        return rewards

    def _free(self) -> list[Any]:
        import ray

        for actor, task in list(self._busy.items()):
            if task is not None and ray.wait([task], timeout=0)[0]:
                self._answer(actor, task)
        return [actor for actor, task in self._busy.items() if task is None]

    def _answer(self, actor: Any, task: Any) -> Any:
        """What an actor says. None: it is dead, and another takes its place."""
        import ray

        self._busy[actor] = None
        try:
            answer = ray.get(task)
        except ray.exceptions.RayActorError:
            if actor not in self._proven:
                raise  # so would the next one
            ray.kill(actor)  # one that can't be reached may live
            del self._busy[actor]
            return self.add()
        self._proven.add(actor)
        return answer
