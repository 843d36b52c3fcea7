"""How long and how to train, and the learning rate at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zo_fused.task.errors import optional


@dataclass(frozen=True)
class Plan:
    """How long and how to train."""

    steps: int
    batch_size: int
    eval_steps: int  # evaluate on dev and write a checkpoint every so many steps
    seed: int = 0
    loss: str = "classification"
    lr_scheduler: str = "constant"  # "linear", "cosine"
    micro_batch_size: int | None = None  # examples in a forward pass; None: all of the batch


def make_scheduler(plan: Plan, optimizer: Any) -> Any:
    """The plan's learning-rate schedule, at the optimizer's present step.

    It is a function of the step alone, so that a run that was interrupted in the middle of one goes
    on with the right rate.
    """
    return optional("transformers").get_scheduler(
        plan.lr_scheduler,
        optimizer,
        num_warmup_steps=0,
        num_training_steps=plan.steps,
        scheduler_specific_kwargs={"last_epoch": optimizer.step_count - 1},
    )


def told(plan: Plan, optimizer: Any, title: str, schedule: str, memory: str) -> str:
    """What a run is going to do, in lines.

    Args:
        title: of the method.
        schedule: as of ``--schedule``.
        memory: what it is expected to take.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    count = sum(p.numel() for p in params if optimizer.moves(p))
    passes, sweeps = optimizer.forwards, sweeps_of(optimizer, schedule)
    each = f"{passes} forward pass{'es' if passes != 1 else ''}" + (f", {sweeps}" if sweeps else "")
    total = optimizer.forwards_of(plan.steps)
    parts = f" in parts of {plan.micro_batch_size}" if plan.micro_batch_size else ""
    return (
        f"plan: {title} of {count:,} parameters, {plan.steps:,} steps with {plan.batch_size} "
        f"examples{parts}, {total:,} forward passes\n"
        f"a step: {each}; memory: {memory}"
    )


def sweeps_of(optimizer: Any, name: str) -> str:
    """How often a step reads and writes the weights, in words; empty for methods that have more to
    do than to perturb, to evaluate and to update, and for blocks of the weights."""
    schedule, places = optimizer.schedule, optimizer.positions()
    more = optimizer.differentiates or optimizer.forwards != len(places)
    if more or schedule.block_order is not None:
        return ""
    if name in ("factored", "paired"):
        return "beside the weights, which are written at the end of a window"
    there = [place if place.sign else None for place in places]  # None: theta
    # deferred: the update has gone on to where the first loss is taken
    before = [there[0] if schedule.deferred else None, *there[:-1]]
    sweeps = 1 + sum(a != b for a, b in zip(before, there, strict=True))
    return f"{sweeps} sweeps over the weights"
