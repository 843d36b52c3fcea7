"""One fine-tuning run from options to a finished directory."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.methods.table import recipes
from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.encoding import Encoder
from zo_fused.task.errors import Interrupted, UserError, first_line, optional
from zo_fused.task.files import sync, to_json, write_text, writing
from zo_fused.task.generation import SCORES
from zo_fused.task.lock import locked
from zo_fused.task.masked import MaskEncoder
from zo_fused.task.models import load_tokenizer, save_model
from zo_fused.task.optimizers import make_optimizer, within_budget
from zo_fused.task.options import Options, provenance, settings_of
from zo_fused.task.plan import told
from zo_fused.task.preparing import (
    check_labels,
    check_template,
    check_trackers,
    encode,
    examples_of,
    expected_memory,
    load,
    make_scorer,
    max_length_of,
    working_device,
)
from zo_fused.task.report import draw, peak_memory, place, sizes, summarize
from zo_fused.task.resuming import (
    HISTORY,
    LOG,
    SETTINGS,
    SUMMARY,
    Past,
    difference,
    find_past,
    has_begun,
    holds_others,
    is_finished,
    read_object,
    remove_checkpoints,
    write_settings,
)
from zo_fused.task.signals import Signals

_OWN_FILES = (SETTINGS, SUMMARY, HISTORY, LOG, "curve.png")  # in the order of their removal


def claim(options: Options, held: ExitStack) -> str:
    """Locks the output directory, made where it is missing, and says what is to be done there:
    "begin", "go on", or nothing, as the run is "finished".

    Raises:
        UserError: another process is at work there, it holds something else, or there is nothing
            to resume.
    """
    output, must = options.output, options.resume == "must"
    if output.exists() and not output.is_dir():
        raise UserError(f"the output {output} is a file, not a directory")
    if must and not output.exists():
        raise UserError(f"nothing to resume: there is no directory {output}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't make the directory {output}: {error.strerror}") from error
    if not os.access(output, os.W_OK | os.X_OK):
        raise UserError(f"the directory {output} can't be written")
    held.enter_context(locked(output))
    if options.overwrite:
        return "begin"
    if is_finished(output):
        if options.resume == "auto":
            return "finished"
        if must:
            raise UserError(f"nothing to resume in {output}: the run there is finished")
        raise UserError(f"{output} holds a finished run; add --overwrite to replace it")
    if has_begun(output):
        if options.resume is None:
            raise UserError(
                f"{output} holds an interrupted run; add --resume to go on with it, "
                "or --overwrite to start again"
            )
        return "go on"
    if must:
        raise UserError(f"nothing to resume in {output}: no run has begun there")
    if holds_others(output):
        raise UserError(f"{output} is not empty; add --overwrite to write there all the same")
    return "begin"


def clear(output: Path) -> None:
    """Deletes what an earlier run left, but for its model, which will be replaced. First of all
    what tells it from no run."""
    for name in _OWN_FILES:
        (output / name).unlink(missing_ok=True)
    remove_checkpoints(output)


def finetune(options: Options) -> dict[str, Any]:
    """Runs the options to the end; returns the summary that is also in ``summary.json``.

    The output directory is then a model directory of transformers, or one of an adapter of peft,
    with ``replay.jsonl``, ``history.jsonl``, ``curve.png`` and ``summary.json``.

    Raises:
        UserError: something the user can put right, as early as it can be known.
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1 (a step is finished first, but for Ctrl-C); the same
            options with ``resume="auto"`` go on, and end in the bits of a run that never stopped.
    """
    with ExitStack() as held:
        try:
            return _finetune(options, held)
        except KeyboardInterrupt as stop:
            number = getattr(stop, "number", signal.SIGINT)
            raise Interrupted("no step was under way, and none is lost", number) from None


def _finetune(options: Options, held: ExitStack) -> dict[str, Any]:
    signals = held.enter_context(Signals())
    for package in ("transformers", "accelerate", "matplotlib.figure"):
        optional(package)
    with uninterrupted():
        from zo_fused.task.trainer import Finetuning
    device = working_device(options.device)
    check_trackers(options.report_to)
    if Path(options.model).is_dir() and options.output.resolve() == Path(options.model).resolve():
        raise UserError(f"the output {options.output} is the base model's own directory")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
    if processes > 1:
        raise UserError(
            f"there are {processes} processes, and this command runs in one; "
            "zo_fused.hf.ZOTrainer takes several"
        )
    if options.resume == "auto" and is_finished(options.output):
        with locked(options.output):
            return _finished(options)
    examples = examples_of(options)
    check_labels(options.task, examples)
    check_template(options)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    todo = claim(options, held)
    if todo == "finished":  # by another process, since the look above
        return _finished(options)
    print(place(device, options.dtype), flush=True)
    past = find_past(options.output) if todo == "go on" else None
    model = load(options, None if past is None else past.checkpoint, device)
    make_encoder = MaskEncoder if options.task.masked else Encoder
    max_length = max_length_of(options, model, tokenizer)
    encoder = make_encoder(options.task, tokenizer, max_length)
    data, cut = encode(encoder, examples)
    print(sizes({split: len(encoded) for split, encoded in data.items()}, cut, max_length))
    plan = options.plan
    tokens = None if options.plan.loss in SCORES else encoder.answers or None
    make = partial(make_optimizer, options.method, options.hyper, model, plan.seed, tokens=tokens)
    optimizer = make(plan.steps)
    options = replace(options, plan=within_budget(plan, options.forwards, optimizer))
    if options.plan.steps != plan.steps:
        plan = options.plan
        optimizer = make(plan.steps)
    settings = settings_of(options, encoder, data["train"])
    if todo == "go on":
        if differs := difference(read_object(options.output / SETTINGS), settings):
            raise UserError(f"can't resume: the run was started with {differs}")
    else:
        clear(options.output)
        write_settings(options.output, settings)
    scorer = make_scorer(model, tokenizer, encoder)
    for encoded in data.values():
        scorer.check(encoded)
    if past is not None:  # after the last forward pass of those: what looks at weights moves them
        catch_up(optimizer, past, options.output)
    first_step = optimizer.step_count
    optimizer.timings = {}
    try:
        run = Finetuning(
            model,
            tokenizer,
            optimizer,
            scorer,
            data,
            options.plan,
            options.output,
            resumed=past is not None,
            paired=options.hyper["schedule"] == "paired",
            signals=signals,
            report_to=options.report_to,
        )
    except ValueError as error:  # the replay log is not this run's
        raise UserError(f"can't resume: {first_line(error)}") from error
    needed = expected_memory(options, model, data["train"])
    title = recipes()[options.method][1].title
    print(told(options.plan, optimizer, title, options.hyper["schedule"], needed))
    try:
        history = run.run()
    except (RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith("paired=True"):
            given, other = "schedule paired", "schedule factored"
        elif optimizer.differentiates and str(error).startswith(type(optimizer).__name__):
            given, other = f"method {options.method}", "method mezo"
        else:
            raise
        raise UserError(
            f"--{given} is not for this model; take --{other} ({first_line(error)})"
        ) from error
    measured = optimizer.step_count - first_step
    summary = summarize(history, optimizer.timings, measured, peak_memory(device))
    summary |= _sizes(optimizer) | {
        "settings": settings,
        **provenance(options),
        "max_length": max_length,
        "cut_prompts": cut,
        "device": str(device),
        "backend": zo_fused.backend_of(device),
        "zo_fused": zo_fused.__version__,
    }
    with writing(options.output):
        save_model(model, tokenizer, options.output)
        draw(history, options.title, options.output / "curve.png")
        sync(options.output / "curve.png")
    write_text(options.output / SUMMARY, to_json(summary, indent=2) + "\n")
    tidy(options.output)
    return summary


def tidy(output: Path) -> None:
    """Deletes what only a run that is not finished needs."""
    remove_checkpoints(output)
    (output / SETTINGS).unlink(missing_ok=True)


def _finished(options: Options) -> dict[str, Any]:
    """The summary of a run that has come to its end.

    Raises:
        UserError: it can't be read, or is of another run than these options are.
    """
    output = options.output
    summary = read_object(output / SUMMARY)
    now = settings_of(options)
    if options.forwards is not None:  # of which the number of steps is a consequence
        del now["steps"]
    saved = summary.get("settings", {})
    if differs := difference({name: saved[name] for name in saved if name in now}, now):
        raise UserError(
            f"{output} holds a finished run with {differs}; add --overwrite in place of "
            "--resume auto to replace it"
        )
    tidy(output)
    print(f"the run in {output} is finished")
    return summary


def catch_up(optimizer: Any, past: Past, output: Path) -> None:
    """Takes a fresh optimizer, whose weights are those of `past`, to where its run goes on.

    Raises:
        UserError: state or log are not of this run.
    """
    start = time.perf_counter()
    try:
        if past.state is not None:
            optimizer.load_state_dict(past.state)
        for group in optimizer.param_groups:  # as a scheduler leaves them that begins with the run
            group.setdefault("initial_lr", group["lr"])
        first = optimizer.step_count
        if not optimizer.state_beyond_log:  # else the steps are made anew
            optimizer.replay(output / LOG, until=past.step, progress=sys.stderr.isatty())
    except (KeyError, TypeError, ValueError) as error:
        source = output if past.checkpoint is None else past.checkpoint
        raise UserError(f"can't resume from {source}: {first_line(error)}") from error
    step, seconds = optimizer.step_count, time.perf_counter() - start
    where = "the base weights" if past.checkpoint is None else past.checkpoint.name
    replayed = f" and {step - first} steps of {LOG}, in {seconds:.2g} s" if step > first else ""
    print(f"going on after step {step}: {where}{replayed}", flush=True)


def _sizes(optimizer: Any) -> dict[str, int]:
    """How many parameters are tuned, and how many bytes of tensors the optimizer keeps for them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in kept if isinstance(value, torch.Tensor)]
    return {
        "parameters": sum(p.numel() for p in params if optimizer.moves(p)),
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
