"""One fine-tuning run from options to a finished directory."""

from __future__ import annotations

import hashlib
import inspect
import os
import signal
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.directions.inputs import linear_layers
from zo_fused.methods.table import recipes
from zo_fused.step.interrupts import uninterrupted
from zo_fused.task.adapters import base_model, load_adapted
from zo_fused.task.console import in_words
from zo_fused.task.data import SPLITS, Example, read_examples
from zo_fused.task.encoding import Encoded, Encoder, maximum_length
from zo_fused.task.errors import Interrupted, UserError, first_line, optional, warn
from zo_fused.task.files import sync, to_json, write_text, writing
from zo_fused.task.generating import GenerationScorer
from zo_fused.task.generation import SCORES
from zo_fused.task.lm_tasks import LmTask
from zo_fused.task.lock import locked
from zo_fused.task.masked import MaskEncoder, MaskScorer
from zo_fused.task.memory import Outline, kept, step_peak
from zo_fused.task.models import (
    check_kind,
    choose_device,
    fills_masks,
    load_config,
    load_model,
    load_tokenizer,
    save_model,
)
from zo_fused.task.plan import Plan, told
from zo_fused.task.prompt import Task
from zo_fused.task.report import draw, peak_memory, place, sizes, summarize
from zo_fused.task.resuming import (
    HISTORY,
    LOG,
    SETTINGS,
    SUMMARY,
    Past,
    check_settings,
    find_past,
    has_begun,
    holds_others,
    is_finished,
    read_object,
    remove_checkpoints,
    write_settings,
)
from zo_fused.task.scoring import Scorer
from zo_fused.task.signals import Signals
from zo_fused.task.splits import Draw, drawn

SCHEDULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "deferred": {"deferred": True},
    "factored": {"mode": "factored"},
    "paired": {"mode": "factored", "paired": True},
}
_OWN_FILES = (SETTINGS, SUMMARY, HISTORY, LOG, "curve.png")  # in the order of their removal


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
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    resume: str | None = None  # "must" go on with a run; "auto": start it, go on, or it is done
    overwrite: bool = False
    title: str = ""  # of the picture


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
    device = _device(options.device)
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
    examples = _examples(options)
    _check_labels(options.task, examples)
    _check_template(options)
    tokenizer = load_tokenizer(options.model, options.trust_remote_code)
    todo = claim(options, held)
    if todo == "finished":  # by another process, since the look above
        return _finished(options)
    print(place(device, options.dtype), flush=True)
    past = find_past(options.output) if todo == "go on" else None
    model = _model(options, None if past is None else past.checkpoint, device)
    make_encoder = MaskEncoder if options.task.masked else Encoder
    max_length = _max_length(options, model, tokenizer)
    encoder = make_encoder(options.task, tokenizer, max_length)
    data, cut = _encode(encoder, examples)
    print(sizes({split: len(encoded) for split, encoded in data.items()}, cut, max_length))
    plan = options.plan
    tokens = None if options.plan.loss in SCORES else encoder.answers or None
    make = partial(make_optimizer, options.method, options.hyper, model, plan.seed, tokens=tokens)
    optimizer = make(plan.steps)
    options = replace(options, plan=_plan(options, optimizer))
    if options.plan.steps != plan.steps:
        plan = options.plan
        optimizer = make(plan.steps)
    settings = _settings(options, encoder, data["train"])
    if todo == "go on":
        check_settings(read_object(options.output / SETTINGS), settings)
    else:
        clear(options.output)
        write_settings(options.output, settings)
    scorer = _scorer(model, tokenizer, encoder)
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
        )
    except ValueError as error:  # the replay log is not this run's
        raise UserError(f"can't resume: {first_line(error)}") from error
    needed = expected_memory(options, model, data["train"])
    print(told(options.plan, optimizer, _title(options), options.hyper["schedule"], needed))
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
        **_provenance(options),
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
    saved, now = summary.get("settings", {}), _settings(options)
    if options.forwards is not None:  # of which the number of steps is a consequence
        del now["steps"]
    for name, value in now.items():
        if saved.get(name) != value:
            raise UserError(
                f"{output} holds a finished run with {name.replace('_', ' ')} {saved.get(name)!r}, "
                f"not {value!r}; add --overwrite in place of --resume auto to replace it"
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


def _check_template(options: Options) -> None:
    """Refuses a template that is not for this kind of model."""
    config = load_config(options.model, options.trust_remote_code)
    check_kind(config)
    masked, task = fills_masks(config), options.task
    what = f"{options.model!r} is a {'masked' if masked else 'causal'} language model"
    if isinstance(task, LmTask):
        if masked != task.masked:
            has = "no" if masked else "a"
            raise UserError(
                f"{what} ({config.model_type}), and the prompts of the task {task.name} have {has} "
                "<mask>; mezo_roberta_sst2 is one for masked language models, mezo_sst2 for others"
            )
    elif masked and not task.masked:
        raise UserError(
            f"{what} ({config.model_type}): say in the template where the answer belongs, as in "
            f"{task.template.rstrip() + ' {mask}.'!r}"
        )
    elif task.masked and not masked:
        raise UserError(
            f"{what} ({config.model_type}), which goes on from where a text ends: end the "
            "template where the answer begins, without {mask}"
        )


def _examples(options: Options) -> dict[str, list[Example]]:
    """The examples of each split that the run has."""
    task, wanted = options.task, options.draw
    if isinstance(task, LmTask):
        return task.examples(wanted)
    read = {
        split: read_examples(options.sources[split], task, split, options.label_field)
        for split in SPLITS
        if split in options.sources
    }
    sizes = {split: len(examples) for split, examples in read.items()}
    places = drawn(sizes, wanted, lambda i: read["train"][i].label)
    return {split: [read[of][i] for of, i in places[split]] for split in SPLITS if split in places}


def _scorer(model: Any, tokenizer: Any, encoder: Encoder) -> Scorer:
    rows = base_model(model).get_input_embeddings().num_embeddings
    # the tokenizer's own may have been added without an embedding; attention masks it anyway
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad_id = next((token for token in candidates if token is not None and token < rows), 0)
    task = encoder.task
    if isinstance(task, LmTask) and task.generates:
        return GenerationScorer(model, tokenizer, pad_id, task.stops, task.max_new_tokens)
    if isinstance(encoder, MaskEncoder):
        return MaskScorer(model, encoder.answers, pad_id, encoder.mask_id)
    return Scorer(model, encoder.answers, pad_id)


def _device(name: str) -> torch.device:
    device = choose_device(name)
    try:
        torch.empty(1, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:  # that PyTorch is not built for
        raise UserError(f"there is no device {name!r}: {first_line(error)}") from error
    return device


def _provenance(options: Options) -> dict[str, Any]:
    """What the examples were made of, and how they were drawn."""
    task = options.task
    if isinstance(task, LmTask):
        return {"task": task.name, "draw": asdict(task.draw(options.draw))}
    return {"task": task.template, "draw": asdict(options.draw)}


def _check_labels(task: Task | LmTask, examples: Mapping[str, Sequence[Example]]) -> None:
    """Warns of splits with one label: a constant answer has the best loss and accuracy there."""
    if not task.answers:  # each example has its own
        return
    labels = {split: {e.label for e in records} for split, records in examples.items()}
    alone = [split for split, found in labels.items() if len(found) == 1]
    if alone:
        places = " and ".join(f"{split} ({min(labels[split])!r})" for split in alone)
        warn(f"only one label in {places}: nothing to tell apart, and an accuracy means nothing")


def _max_length(options: Options, model: Any, tokenizer: Any) -> int:
    most = maximum_length(model, tokenizer)
    if options.max_length is None:
        return most
    if options.max_length > most:
        raise UserError(f"the model takes {most} tokens at most, not {options.max_length}")
    return options.max_length


def _encode(
    encoder: Encoder, examples: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, list[Encoded]], dict[str, int]]:
    """The splits' examples as tokens, and how many prompts of each were cut."""
    data, cut = {}, {}
    for split, records in examples.items():
        before = encoder.cut
        data[split] = encoder.encode(records)
        cut[split] = encoder.cut - before
    return data, cut


def _model(options: Options, checkpoint: Path | None, device: torch.device) -> Any:
    experts = None
    if recipes()[options.method][0].differentiates:  # forward mode knows no grouped_mm
        experts = "eager"
    elif options.hyper["schedule"] == "paired":  # whose vmap knows no nonzero
        experts = "batched_mm"
    loading: dict[str, Any] = {"trust_remote_code": options.trust_remote_code, "experts": experts}
    if options.peft is None:
        if checkpoint is None:  # else it was saved quantized
            loading["quantize"] = options.hyper.get("quantize")
        return load_model(str(checkpoint or options.model), options.dtype, device, **loading)
    seed = options.plan.seed
    return load_adapted(
        options.model, options.dtype, device, options.peft, seed, checkpoint, **loading
    )


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


def _plan(options: Options, optimizer: Any) -> Plan:
    """The plan, with as many steps as the budget of forward passes allows.

    Evaluations are then as many forward passes apart as if each step had two.
    """
    plan = options.plan
    if options.forwards is None:
        return plan
    budget = options.forwards
    # not more than a pass a step
    steps = bisect_right(range(budget + 1), budget, key=optimizer.forwards_of) - 1
    if steps < 1:
        raise UserError(
            f"the budget of {budget} forward passes is too small for a step, "
            f"which takes {optimizer.forwards_of(1)}"
        )
    apart = max(1, round(2 * plan.eval_steps * steps / optimizer.forwards_of(steps)))
    return replace(plan, steps=steps, eval_steps=apart)


def _title(options: Options) -> str:
    return recipes()[options.method][1].title


def expected_memory(options: Options, model: Any, train: Sequence[Encoded]) -> str:
    """What `zo-fused plan` says of this run, in words."""
    made = recipes()[options.method][0]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    of_weights = f"weights {in_words(weights)}"
    if made.quantized:  # of which a configuration says nothing
        return of_weights
    dtype = getattr(torch, options.dtype)
    tuned = [p for p in model.parameters() if p.requires_grad]
    linear = linear_layers(model)
    held = kept(
        lambda module, **rank: make_optimizer(
            options.method, {**options.hyper, "blocks": None} | rank, module
        ),
        Counter(tuple(p.shape) for p in tuned),
        dtype,
        Counter(tuple(p.shape) for p in tuned if id(p) in linear),
    )
    config = load_config(options.model, options.trust_remote_code)
    length = max(len(e.prompt) + max(map(len, e.answers), default=1) for e in train)
    size = options.plan.micro_batch_size or options.plan.batch_size
    forward = Outline(config, dtype).activations(size, length, fused=not made.differentiates)
    paired = options.hyper["schedule"] == "paired"
    peak = step_peak(weights, held, forward, paired, made.differentiates)
    told_peak = "" if peak is None else f", peak of a step about {in_words(peak)}"
    return f"{of_weights}, beside them {in_words(held.beside)}{told_peak}"


def _sizes(optimizer: Any) -> dict[str, int]:
    """How many parameters are tuned, and how many bytes of tensors the optimizer keeps for them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in kept if isinstance(value, torch.Tensor)]
    return {
        "parameters": sum(p.numel() for p in params if optimizer.moves(p)),
        "state_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def _settings(
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
    return settings
