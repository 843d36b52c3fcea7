"""One fine-tuning run from options to a finished directory."""

from __future__ import annotations

import hashlib
import inspect
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zo_fused
from zo_fused.task.checkpoint import (
    check_settings,
    checkpoints,
    load_checkpoint,
    remove_checkpoints,
)
from zo_fused.task.data import SPLITS, read_examples
from zo_fused.task.encoding import Encoded, Encoder, maximum_length
from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.files import to_json, write_text
from zo_fused.task.loop import Finetuning, Plan
from zo_fused.task.models import choose_device, load_model, load_tokenizer, save_model
from zo_fused.task.prompt import Task
from zo_fused.task.report import draw, peak_memory, summarize
from zo_fused.task.scoring import Scorer

METHODS = {"lozo": "LOZO", "mezo": "MeZO"}
SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deferred": {"deferred": True},
    "factored": {"mode": "factored"},
    "paired": {"mode": "factored", "paired": True},
}
_OWN_FILES = ("summary.json", "history.jsonl", "replay.jsonl", "curve.png")


@dataclass(frozen=True)
class Options:
    """Everything a run is made of."""

    model: str  # directory or Hub id
    sources: dict[str, str]  # split -> where to read it; "train" at least
    task: Task
    method: str  # a key of METHODS
    hyper: dict[str, Any]  # arguments of the optimizer: lr, eps, ...; a key of SCHEDULES
    plan: Plan
    output: Path
    label_field: str = "label"
    dtype: str = "float32"
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    title: str = ""  # of the picture


def find_checkpoint(output: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        UserError: the directory is in use, or there is nothing to resume.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {output} is a file, not a directory")
    finished, saved = (output / "summary.json").exists(), checkpoints(output)
    if resume:
        if saved:
            return saved[-1]
        state = "the run there is finished" if finished else "there is no checkpoint"
        raise UserError(f"nothing to resume in {output}: {state}")
    if output.exists() and any(output.iterdir()) and not overwrite:
        if finished:
            raise UserError(f"{output} holds a finished run; add --overwrite to replace it")
        if saved:
            raise UserError(
                f"{output} holds an interrupted run; add --resume to go on with it, "
                "or --overwrite to start again"
            )
        raise UserError(f"{output} is not empty; add --overwrite to write there all the same")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make the directory {output}: {error.strerror}") from error
    return None


def clear(output: Path) -> None:
    """Deletes what an earlier run left, but for its model, which will be replaced."""
    for name in _OWN_FILES:
        (output / name).unlink(missing_ok=True)
    remove_checkpoints(output)


def finetune(options: Options) -> dict[str, Any]:
    """Runs the options to the end; returns the summary that is also in ``summary.json``.

    The output directory is then a model directory of transformers with ``replay.jsonl``,
    ``history.jsonl``, ``curve.png`` and ``summary.json``.

    Raises:
        UserError: something the user can put right, as early as it can be known.
        Interrupted: see `Finetuning.run`.
    """
    for package in ("transformers", "tqdm", "matplotlib.figure"):
        optional(package)
    device = choose_device(options.device)
    if Path(options.model).is_dir() and options.output.resolve() == Path(options.model).resolve():
        raise UserError(f"the output {options.output} is the base model's own directory")
    examples = {
        split: read_examples(options.sources[split], options.task, split, options.label_field)
        for split in SPLITS
        if split in options.sources
    }
    tokenizer = load_tokenizer(options.model)
    checkpoint = find_checkpoint(options.output, options.resume, options.overwrite)
    model = load_model(str(checkpoint or options.model), options.dtype, device)
    encoder = Encoder(options.task, tokenizer, maximum_length(model, tokenizer))
    data = {split: encoder.encode(records) for split, records in examples.items()}
    settings = _settings(options, encoder, data["train"])
    optimizer = _optimizer(options, model)
    if checkpoint is None:
        clear(options.output)
    else:
        content = load_checkpoint(checkpoint)
        check_settings(content["settings"], settings)
        optimizer.load_state_dict(content["optimizer"])
    first_step = optimizer.step_count
    optimizer.timings = {}
    scorer = Scorer(model, encoder.answers, _pad_id(tokenizer))
    try:
        run = Finetuning(
            model,
            tokenizer,
            optimizer,
            scorer,
            data,
            options.plan,
            options.output,
            settings,
            resume=checkpoint is not None,
        )
    except ValueError as error:  # the replay log is not this run's
        raise UserError(first_line(error)) from error
    history = run.run()
    measured = optimizer.step_count - first_step
    summary = summarize(history, optimizer.timings, measured, peak_memory(device))
    summary |= {
        "settings": settings,
        "device": str(device),
        "backend": zo_fused.backend_of(device),
        "zo_fused": zo_fused.__version__,
    }
    save_model(model, tokenizer, options.output)
    draw(history, options.title, options.output / "curve.png")
    write_text(options.output / "summary.json", to_json(summary, indent=2) + "\n")
    remove_checkpoints(options.output)
    return summary


def _pad_id(tokenizer: Any) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _optimizer(options: Options, model: Any) -> Any:
    method = getattr(zo_fused, METHODS[options.method])
    hyper = dict(options.hyper)
    schedule = hyper.pop("schedule")
    arguments = SCHEDULES[schedule]
    if not arguments.keys() <= inspect.signature(method).parameters.keys():
        raise UserError(f"the schedule {schedule!r} is not for the method {options.method}")
    try:
        return method(model, **hyper, **arguments, seed=options.plan.seed)
    except ValueError as error:
        raise UserError(first_line(error)) from error


def _settings(options: Options, encoder: Encoder, train: list[Encoded]) -> dict[str, Any]:
    """What decides the tuned weights; a resumed run must have the same."""
    plan = asdict(options.plan)
    del plan["eval_steps"]
    local = os.path.isdir(options.model)
    content = repr([encoder.answers, [(example.prompt, example.label) for example in train]])
    return {
        "model": os.path.abspath(options.model) if local else options.model,
        "method": options.method,
        **options.hyper,
        **plan,
        "dtype": options.dtype,
        "training_data": hashlib.sha256(content.encode()).hexdigest()[:16],
    }
