"""The optimizer of a run: of a method by its name, with options as the command line has them."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import zo_fused
from zo_fused.methods.table import recipes
from zo_fused.task.errors import UserError, first_line
from zo_fused.task.plan import Plan

SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deferred": {"deferred": True},
    "factored": {"mode": "factored"},
    "paired": {"mode": "factored", "paired": True},
}


def make_optimizer(
    method: str,
    hyper: dict[str, Any],
    model: Any,
    seed: int = 0,
    steps: int = 1,
    tokens: Iterable[Sequence[int]] | None = None,
) -> Any:
    """The optimizer of a method.

    Args:
        method, hyper: as in `Options`.
        steps: of the run, for methods with a schedule over all of it.
        tokens: of the answers, for methods that leave the other rows of the head alone; None: all
            tokens may be answers.

    Raises:
        UserError: the method has no such schedule, or refuses an argument.
    """
    made, _ = recipes()[method]
    hyper = dict(hyper)
    schedule, blocks = hyper.pop("schedule"), hyper.pop("blocks", None)
    hyper.pop("quantize", None)  # the model is
    takes = inspect.signature(made).parameters.keys()
    arguments = SCHEDULES[schedule]
    if "mode" in takes:  # some choose it themselves, if it is not said
        arguments = {"mode": "inplace", **arguments}
    if not arguments.keys() <= takes:
        known = [name for name, needs in SCHEDULES.items() if needs.keys() <= takes]
        raise UserError(
            f"the schedule {schedule!r} is not for the method {method}, which has "
            f"{', '.join(known)}"
        )
    if "total_steps" in takes:
        hyper["total_steps"] = steps
    if "rows" in takes and tokens is not None:
        hyper["rows"] = _rows_of_head(model, tokens)
    try:
        params = model
        if blocks is not None:
            params, arguments = zo_fused.layer_blocks(model), {"block_order": blocks}
            if "module" in takes:  # some look at its layers
                arguments["module"] = model
        return made(params, **hyper, **arguments, seed=seed)
    except ValueError as error:
        raise UserError(first_line(error)) from error


def _rows_of_head(model: Any, tokens: Iterable[Sequence[int]]) -> dict[str, list[int]]:
    """The rows of these tokens in what the model has for a head, if it is tuned."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return {
        name: sorted({token for answer in tokens for token in answer})
        for name, p in model.named_parameters()
        if p is weight and p is not None and p.requires_grad
    }


def steps_within(budget: int, optimizer: Any) -> int:
    """How many steps a budget of forward passes allows."""
    # not more than a pass a step
    return bisect_right(range(budget + 1), budget, key=optimizer.forwards_of) - 1


def within_budget(plan: Plan, budget: int | None, optimizer: Any) -> Plan:
    """The plan, with as many steps as a budget of forward passes allows, if there is one.

    Evaluations are then as many forward passes apart as if each step had two.

    Raises:
        UserError: it is too small for a step.
    """
    if budget is None:
        return plan
    steps = steps_within(budget, optimizer)
    if steps < 1:
        raise UserError(
            f"the budget of {budget} forward passes is too small for a step, "
            f"which takes {optimizer.forwards_of(1)}"
        )
    apart = max(1, round(2 * plan.eval_steps * steps / optimizer.forwards_of(steps)))
    return replace(plan, steps=steps, eval_steps=apart)
