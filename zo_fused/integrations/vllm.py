"""Evolution strategies on the workers of an inference engine. Nothing of vLLM is imported."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_fused.methods.es import ES
from zo_fused.replaying.rebuild import replay
from zo_fused.step.fingerprint import fingerprint
from zo_fused.sweeps.numbers import WEIGHT_DTYPES


class ZOWorker:
    """What a worker of vLLM becomes able to do, by ``collective_rpc``:

        LLM(.., worker_extension_cls="zo_fused.integrations.vllm.ZOWorker",
            enable_prefix_caching=False)

    A generation of `zo_fused.ES` (docs/methods/es.md), over any number of engines: `zo_perturb` to
    each member that an engine is to evaluate, then `zo_update` with the rewards of all members. A
    worker passes the members that other engines evaluate as well, a sweep each. So all workers
    round alike and never differ in a bit, without a copy of theta and without sending weights; nor
    do they differ from `ES` in one process over parameters of these names.

    Noise is tied to the engine's own names and shapes. vLLM fuses projections (``qkv_proj``,
    ``gate_up_proj``), so there a run is not the one that `ES` makes over the checkpoint, and its
    log fits engines of vLLM (`zo_replay`), not the checkpoint.

    The engine must not know old weights: nothing may be generated while weights move, and caches of
    keys and values (prefix caching) are of weights that were. Names begin with ``zo``, as vLLM
    refuses extensions that have a name of the worker's.
    """

    model_runner: Any

    def zo_start(self, log: str | os.PathLike[str] | None = None, **options: Any) -> None:
        """Begin, or begin anew from the weights of this moment.

        Args:
            log: where to write the replay log: of one engine, each overwrites it.
            options: of `zo_fused.ES`: ``lr``, ``eps``, ``population``, ``seed``, ...; the same on
                all engines. Not ``deferred``.

        Raises:
            ValueError: the engine shards its weights, or has quantized ones; or deferred.
            TypeError, ValueError: as `ES`.
        """
        if options.get("deferred"):
            raise ValueError("deferred leaves weights perturbed between generations: leave it out")
        before: Any = vars(self).get("zo")
        if before is not None:
            before.stop()
            before.optimizer.close_log()
        self.zo = _Generations(ES(_handles(self), **options))
        if log is not None:
            self.zo.optimizer.start_log(log)

    def zo_perturb(self, member: int) -> None:
        """Put the weights at a member of the present generation.

        Args:
            member: its number, from 0. Those of an engine come in rising order.

        Raises:
            ValueError: there is no such member, or the weights are past it.
        """
        self.zo.walk(member)

    def zo_reset(self) -> None:
        """Back to theta, up to rounding, and a generation that was begun begins anew. On all
        engines, or none."""
        self.zo.stop()

    def zo_update(self, rewards: Sequence[float]) -> float:
        """The end of a generation: theta, updated.

        Args:
            rewards: of all members, in order; the same on all engines. If one is not finite, the
                step is skipped on all.

        Returns:
            The mean reward.

        Raises:
            ValueError: it is not one reward a member. The weights have not moved then.
        """
        return self.zo.update(rewards)

    def zo_set(self, **hyper: float) -> None:
        """Change hyper-parameters between generations, as ``lr``. On all engines.

        Raises:
            ValueError: there is no such one.
        """
        for group in self.zo.optimizer.param_groups:
            for name, value in hyper.items():
                if name not in ("lr", "eps", "weight_decay"):
                    raise ValueError(f"zo_set knows lr, eps and weight_decay, not {name!r}")
                group[name] = value

    def zo_fingerprint(self) -> str:
        """A short hash of every weight, to see between generations that engines agree."""
        return fingerprint([p.detach() for p in self.model_runner.model.parameters()])

    def zo_replay(self, log: str | os.PathLike[str]) -> int:
        """Bring an engine with the base weights to those at the end of a log of `zo_start`, without
        data or generations. Returns the number of steps.

        Raises:
            FileNotFoundError, ValueError: as `zo_fused.replay`.
        """
        return replay(dict(_handles(self)), log)


class _Generations:
    """A worker's optimizer, and how far its generation is."""

    def __init__(self, optimizer: ES) -> None:
        self.optimizer = optimizer
        self._members: list[Any] = []
        self._at = -1

    def walk(self, member: int) -> None:
        count = len(self.optimizer.positions())
        if not 0 <= member < count:
            raise ValueError(f"there are the members 0 to {count - 1}, not {member}")
        if member < self._at:
            raise ValueError(
                f"the weights are at member {self._at}, past {member}: an engine takes its members "
                "in rising order"
            )
        if not self._members:
            self._members = list(self.optimizer.members())
        while self._at < member:
            if self._at >= 0:
                self._members[self._at].__exit__(None, None, None)
            self._at += 1
            self._members[self._at].__enter__()

    def update(self, rewards: Sequence[float]) -> float:
        count = len(self.optimizer.positions())
        if len(rewards) != count:
            raise ValueError(f"there are {count} members, but {len(rewards)} rewards")
        numbers = [float(reward) for reward in rewards]
        self._leave_last()
        for member, reward in zip(self._members, numbers, strict=True):
            member.reward = reward
        self._members = []
        return float(self.optimizer.step())

    def stop(self) -> None:
        if self._members:  # by the way that all engines go
            self._leave_last()
            self._members = []
        self.optimizer.flush()

    def _leave_last(self) -> None:
        self.walk(len(self.optimizer.positions()) - 1)
        self._members[-1].__exit__(None, None, None)
        self._at = -1


def _handles(worker: Any) -> list[tuple[str, nn.Parameter]]:
    """Parameters of our own over the memory of the model's, which may be of classes of the
    engine's and require no gradient.

    Raises:
        ValueError: they are shards, or one is of a dtype that can't be tuned.
    """
    shards = getattr(worker, "parallel_config", None)
    by_experts = getattr(shards, "enable_expert_parallel", False)
    if getattr(shards, "tensor_parallel_size", 1) > 1 or by_experts:
        raise ValueError(
            "shards of a weight would get the same noise: tensor_parallel_size=1, without expert "
            "parallelism, and more engines instead"
        )
    made = []
    for name, p in worker.model_runner.model.named_parameters():
        if p.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{name} is {p.dtype}: quantized weights can't be perturbed, load the model in "
                "float16, bfloat16 or float32"
            )
        with torch.inference_mode(p.is_inference()):
            made.append((name, nn.Parameter(p.data.as_subclass(Tensor))))
    return made
