"""The options of ``zo-fused finetune``. What is not given is None and gets its default later."""

from __future__ import annotations

import argparse
from typing import Any

from zo_fused.cli import defaults
from zo_fused.cli.config import add_config_option, add_preset_option
from zo_fused.cli.method_help import HINT, add_method_options
from zo_fused.cli.method_options import by_method
from zo_fused.cli.parser import (
    Parser,
    add_trust_option,
    choice,
    data_seed,
    dtype_choice,
    folder,
    run_seed,
    shown,
    whole,
)


def run_parser() -> Parser:
    """A parser of these options alone: of the lines of a config, or of a run of a comparison."""
    parser = Parser(prog="zo-fused finetune", allow_abbrev=False)
    add_options(parser)
    return parser


def method_choice() -> dict[str, Any]:
    """Arguments of ``add_argument`` for the name of a method."""
    return choice(by_method(), {"zosignsgd": "zo-sign"})


def _pair(text: str) -> tuple[str, str]:
    label, sign, answer = text.partition("=")
    if not sign or not label:
        raise argparse.ArgumentTypeError(f"must look like label=answer, got {text!r}")
    return label, answer


def _names(text: str) -> tuple[str, ...]:
    names = dict.fromkeys(word.strip() for word in text.split(","))
    return tuple(name for name in names if name and name != "none")


def _default(name: str) -> str:
    """What a help text says of it."""
    embedded = defaults.EMBEDDED_COMMON.get(name)
    other = "" if embedded is None else f"; on the embedded model: {shown(embedded)}"
    return f"default: {shown(defaults.COMMON[name])}{other}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    from_file = parser.add_argument_group("from a file")
    add_config_option(from_file, ", as `zo-fused init` writes one")
    add_preset_option(from_file)
    add_data_options(parser)
    add_method_options(parser.add_argument_group("method", HINT), **method_choice())
    run = add_run_options(parser)
    run.add_argument("--steps", type=whole, help=f"({_default('steps')})")
    run.add_argument("--seed", type=run_seed, help=f"({_default('seed')})")
    run.add_argument(
        "--output",
        metavar="DIR",
        type=folder,
        help="directory to write (default: one in ./zo-fused-runs)",
    )
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        choices=("auto",),
        help="go on with the run in the output directory, from its log and its last checkpoint; "
        "auto: begin it if it is not there, and do nothing if it is finished",
    )
    run.add_argument(
        "--overwrite", action="store_true", help="replace what the output directory holds"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is tuned on what."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", metavar="DIR_OR_ID", help="model directory or Hub id")
    add_trust_option(data)
    data.add_argument(
        "--peft",
        **choice(defaults.BY_PEFT),
        help="tune an adapter of peft instead of the weights: lora (r 8, alpha 16), prefix (5 "
        "tokens) or prompt (10 tokens); the output directory then holds the adapter",
    )
    for split, what in (
        (
            "train",
            "JSON lines or array, CSV, TSV or Parquet file, directory with such files "
            "{train,dev,test}.* and task.json, or data set of the Hub as id[:config[:split]]",
        ),
        ("dev", "same, for evaluation while training"),
        ("test", "same, for evaluation before and after"),
    ):
        data.add_argument(f"--{split}", metavar="DATA", help=what)
    data.add_argument(
        "--task",
        metavar="NAME_OR_FILE",
        help="task of a paper (mezo_sst2, ...), other task of lm_eval, YAML file in its format, or "
        "JSON file with template and verbalizer",
    )
    data.add_argument(
        "--template",
        metavar="TEXT",
        help='prompt, e.g. "{text} It was"; for BERT and RoBERTa "{text} It was {mask}."',
    )
    data.add_argument(
        "--verbalizer",
        metavar="LABEL=ANSWER",
        nargs="+",
        type=_pair,
        help='answer of each label, e.g. "0= terrible" "1= great" (note the spaces)',
    )
    data.add_argument(
        "--no-template",
        action="store_true",
        default=None,
        help="without task alignment: the prompt is the template's fields, joined by a space, and "
        "none of its words; the answers stay",
    )
    data.add_argument(
        "--max-length",
        metavar="TOKENS",
        type=whole,
        help="of prompt and answer; longer prompts lose tokens on their left, and the summary "
        "says how many did (default: as many as the model takes)",
    )
    data.add_argument("--label-field", metavar="NAME", help=f"({_default('label_field')})")
    for split, many in (("train", 1000), ("dev", 500), ("test", 1000)):
        where = "training set, where --dev is not given" if split == "dev" else f"{split} set"
        data.add_argument(
            f"--{split}-examples",
            metavar="N",
            type=whole,
            help=f"draw so many from the {where} (default: {many} of a task by name or of YAML, "
            f"{'none' if split == 'dev' else 'all'} of others)",
        )
    data.add_argument(
        "--k",
        metavar="N",
        type=whole,
        help="draw so many of each class from the training set for train, and as many for dev",
    )
    data.add_argument(
        "--data-seed",
        metavar="SEED",
        type=data_seed,
        help=f"of the draws ({_default('data_seed')})",
    )


def add_run_options(parser: argparse.ArgumentParser) -> Any:
    """Adds the options that say how long and how to train; returns their group."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--forwards",
        metavar="N",
        type=whole,
        help="budget of training forward passes over a batch, in place of --steps",
    )
    run.add_argument("--batch-size", type=whole, help=f"({_default('batch_size')})")
    run.add_argument(
        "--micro-batch-size",
        type=whole,
        help="examples in memory at once: a batch is evaluated in pieces, its loss is the same",
    )
    run.add_argument(
        "--eval-steps",
        type=whole,
        metavar="STEPS",
        help="between evaluations and checkpoints; with --forwards in steps of two forward passes "
        f"({_default('eval_steps')})",
    )
    run.add_argument(
        "--lr-scheduler",
        **choice(("constant", "linear", "cosine")),
        help=f"({_default('lr_scheduler')})",
    )
    run.add_argument(
        "--loss",
        **choice(("classification", "lm", "accuracy", "exact-match", "f1")),
        help="cross entropy over the answers, likelihood of the right one, the negative share of "
        "right predictions, or minus the exact match or F1 of what the model generates greedily; "
        f"es climbs minus the loss ({_default('loss')})",
    )
    run.add_argument(
        "--dtype",
        **dtype_choice(),
        help=f"of the weights ({_default('dtype')})",
    )
    run.add_argument(
        "--report-to",
        metavar="NAMES",
        type=_names,
        help="experiment trackers, as transformers names them, with commas between them: "
        "tensorboard, trackio, wandb, mlflow, ...; they are told every step (default: none)",
    )
    run.add_argument("--device", help=f"cpu, cuda, cuda:1, ... ({_default('device')})")
    return run
