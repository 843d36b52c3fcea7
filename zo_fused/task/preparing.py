"""What a run needs before its first step: device, examples, model, their tokens, a scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zo_fused.directions.inputs import linear_layers
from zo_fused.methods.table import recipes
from zo_fused.task.adapters import base_model, load_adapted
from zo_fused.task.console import in_words
from zo_fused.task.data import SPLITS, Example, read_examples
from zo_fused.task.encoding import Encoded, Encoder, maximum_length
from zo_fused.task.errors import UserError, first_line, optional, warn
from zo_fused.task.generating import GenerationScorer
from zo_fused.task.lm_tasks import LmTask
from zo_fused.task.masked import MaskEncoder, MaskScorer
from zo_fused.task.memory import Outline, kept, step_peak
from zo_fused.task.models import check_kind, choose_device, fills_masks, load_config, load_model
from zo_fused.task.optimizers import make_optimizer
from zo_fused.task.options import Options
from zo_fused.task.prompt import Task
from zo_fused.task.scoring import Scorer
from zo_fused.task.splits import drawn


def working_device(name: str) -> torch.device:
    device = choose_device(name)
    try:
        torch.empty(1, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:  # that PyTorch is not built for
        raise UserError(f"there is no device {name!r}: {first_line(error)}") from error
    return device


def check_trackers(names: Sequence[str]) -> None:
    """Refuses experiment trackers that this environment has not, before what takes long."""
    if not names:
        return
    installed = optional("transformers.integrations").get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise UserError(
                f"--report-to {name}: transformers knows no such tracker, or it is not installed; "
                f"there is {', '.join(installed) or 'none'}"
            )


def examples_of(options: Options) -> dict[str, list[Example]]:
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


def check_labels(task: Task | LmTask, examples: Mapping[str, Sequence[Example]]) -> None:
    """Warns of splits with one label: a constant answer has the best loss and accuracy there."""
    if not task.answers:  # each example has its own
        return
    labels = {split: {e.label for e in records} for split, records in examples.items()}
    alone = [split for split, found in labels.items() if len(found) == 1]
    if alone:
        places = " and ".join(f"{split} ({min(labels[split])!r})" for split in alone)
        warn(f"only one label in {places}: nothing to tell apart, and an accuracy means nothing")


def check_template(options: Options) -> None:
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


def load(options: Options, checkpoint: Path | None, device: torch.device) -> Any:
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


def max_length_of(options: Options, model: Any, tokenizer: Any) -> int:
    most = maximum_length(model, tokenizer)
    if options.max_length is None:
        return most
    if options.max_length > most:
        raise UserError(f"the model takes {most} tokens at most, not {options.max_length}")
    return options.max_length


def encode(
    encoder: Encoder, examples: Mapping[str, Sequence[Example]]
) -> tuple[dict[str, list[Encoded]], dict[str, int]]:
    """The splits' examples as tokens, and how many prompts of each were cut."""
    data, cut = {}, {}
    for split, records in examples.items():
        before = encoder.cut
        data[split] = encoder.encode(records)
        cut[split] = encoder.cut - before
    return data, cut


def make_scorer(model: Any, tokenizer: Any, encoder: Encoder) -> Scorer:
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
