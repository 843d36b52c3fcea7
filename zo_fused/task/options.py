"""What a run is made of, and which of it decides the tuned weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zo_fused.task.encoding import Encoded, Encoder
from zo_fused.task.files import to_json
from zo_fused.task.lm_tasks import LmTask
from zo_fused.task.plan import Plan
from zo_fused.task.prompt import Task
from zo_fused.task.splits import Draw


@dataclass(frozen=True)
class Options:
    """Everything a run is made of."""

    model: str  # directory or Hub id
    sources: dict[str, str]  # split -> where to read it; "train" at least
    task: Task | LmTask
    method: str  # a key of `zo_fused.methods.table.recipes`
    hyper: dict[str, Any]  # arguments of the optimizer: lr, eps, ...; schedule, blocks, quantize
    plan: Plan
    output: Path
    forwards: int | None = None  # budget of forward passes that takes the place of plan.steps
    peft: str | None = None  # an adapter to tune instead of the weights
    max_length: int | None = None  # tokens of prompt and answer; None: as many as the model takes
    label_field: str = "label"
    draw: Draw = field(default_factory=Draw)  # how many examples of each split, and which
    report_to: tuple[str, ...] = ()  # experiment trackers, as transformers names them
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    resume: str | None = None  # "must" go on with a run; "auto": start it, go on, or it is done
    overwrite: bool = False
    title: str = ""  # of the picture


def settings_of(
    options: Options, encoder: Encoder | None = None, train: Sequence[Encoded] = ()
) -> dict[str, Any]:
    """What decides the tuned weights; a resumed run must have the same.

    Args:
        encoder, train: the training data; without them, all else.
    """
    plan = asdict(options.plan)
    del plan["eval_steps"]
    local = os.path.isdir(options.model)
    settings = {
        "model": os.path.abspath(options.model) if local else options.model,
        "method": options.method,
        **options.hyper,
        **plan,
        "dtype": options.dtype,
        "peft": options.peft,
    }
    if encoder is not None:
        content = repr([encoder.answers, train])
        settings["training_data"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    read: dict[str, Any] = json.loads(to_json(settings))  # as they come out of a file
    return read


def provenance(options: Options) -> dict[str, Any]:
    """What the examples were made of, and how they were drawn."""
    task = options.task
    if isinstance(task, LmTask):
        return {"task": task.name, "draw": asdict(task.draw(options.draw))}
    return {"task": task.template, "draw": asdict(options.draw)}
