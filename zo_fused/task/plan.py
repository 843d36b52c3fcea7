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
