"""``zo-fused compare``: several methods under one budget of forward passes."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_fused.cli import defaults, finetune
from zo_fused.cli.config import add_config_option, merged
from zo_fused.cli.method_options import OPTIONS
from zo_fused.cli.parser import Parser, folder, run_seed
from zo_fused.cli.run_options import add_data_options, add_run_options, method_choice, run_parser
from zo_fused.cli.runs import Run, run_all
from zo_fused.task.errors import Interrupted, UserError, first_line

HELP = "compare methods on one task under one budget of forward passes"

DESCRIPTION = """\
Fine-tune the same model on the same data with several methods and seeds, each with the same number
of training forward passes; write a table (compare.md, compare.json) and a picture (compare.png).

Every run is a `zo-fused finetune` in a process and a directory of its own. Runs that are finished
are not done again: the same command goes on after Ctrl-C, and one with more methods or seeds adds
them. With no model and data, the embedded ones."""

METHODS = "mezo,lozo,zo-adam"
SEEDS = "0,1,2"
OUTPUT = Path("zo-fused-runs") / "compare"
_OWN = ("config", "methods", "seeds", "forwards", "output", "command")


def _written(option: str) -> str:
    """An option of a method, in a list of methods."""
    value = "" if OPTIONS[option].get("action") == "store_true" else "=VALUE"
    return option.replace("_", "-") + value


# What a config of `zo-fused finetune` may hold, and a comparison has in another place.
_ELSEWHERE = {
    **{name: f"is a method's: methods: lozo:{_written(name)}" for name in OPTIONS},
    "method": "is one of several: methods: lozo,mezo",
    "seed": "is one of several: seeds: 0,1,2",
    "steps": "is not the same for all methods: forwards: 1000",
    "preset": "is of one method",
    "resume": "is what the same command does",
    "overwrite": "is of one run; a new comparison takes another output",
}


def _seeds(text: str) -> list[int]:
    return [run_seed(word.strip()) for word in text.split(",")]


def _methods(text: str) -> list[str]:
    """The methods under their own names: each has a directory, and none comes twice."""
    methods = []
    for word in text.split(","):
        name, *given = word.split(":")
        methods.append(":".join([method_choice()["type"](name), *given]))
    return methods


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("comparison")
    add_config_option(group, " of this command")
    group.add_argument(
        "--methods",
        type=_methods,
        help="names as of `zo-fused finetune --method`, with commas between them; options of a "
        f"method follow after colons, as in mezo:queries=4:one-sided (default: {METHODS})",
    )
    group.add_argument("--seeds", type=_seeds, help=f"(default: {SEEDS})")
    group.add_argument(
        "--output",
        metavar="DIR",
        type=folder,
        help=f"directory to write (default: {OUTPUT})",
    )
    add_data_options(parser)
    add_run_options(parser)


def method_words(text: str) -> list[str]:
    """``mezo:queries=4:one-sided`` as options of ``zo-fused finetune``.

    Raises:
        UserError: an option is none of a method's.
    """
    name, *given = text.split(":")
    words = [f"--method={name}"]
    for option in given:
        key = option.partition("=")[0]
        if key.replace("-", "_") not in OPTIONS:
            raise UserError(f"--methods: {key!r} in {text!r} is no option of a method")
        words.append(f"--{option}")
    return words


def _shared_words(args: argparse.Namespace) -> list[str]:
    """The options that every run has, as they were given."""
    words: list[str] = []
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in _OWN or value is None:
            continue
        if isinstance(value, list):
            words += [option, *("=".join(pair) for pair in value)]
        elif isinstance(value, tuple):
            words.append(f"{option}={','.join(value)}")
        else:
            words.append(option if value is True else f"{option}={value}")
    return words


def make_runs(
    methods: Sequence[str], seeds: Sequence[int], shared: Sequence[str], output: Path
) -> list[Run]:
    """Every method with every seed; the seeds take turns, so that a drift of the machine is all's.

    Args:
        methods: with their options, as in ``--methods``.
        shared: options of ``zo-fused finetune`` that every run has.

    Raises:
        UserError: a run could not start, or `output` holds runs with other shared options.
    """
    for name, given in (("methods", methods), ("seeds", seeds)):
        twice = [item for item in given if given.count(item) > 1]
        if twice:
            raise UserError(f"--{name} has {twice[0]!r} twice")
    parser = run_parser()
    runs = []
    for seed in seeds:
        for method in methods:
            words = (*shared, *method_words(method), f"--seed={seed}")
            chosen = finetune.options(parser.parse_args(words))
            if not ("dev" in chosen.sources or chosen.draw.dev or chosen.draw.k):
                raise UserError("a comparison needs --dev data")
            place = output / re.sub("[:/]", "_", method) / f"seed-{seed}"
            runs.append(Run(method, seed, ("finetune", *words), place))
    _claim(output, [word for word in shared if not word.startswith("--report-to=")])
    return runs


def _claim(output: Path, shared: list[str]) -> None:
    """Writes down what all runs in a directory have in common."""
    from zo_fused.task.files import to_json, write_text

    file = output / "options.json"
    try:
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != shared:
                raise UserError(f"{output} holds a comparison with other options; give --output")
            return
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"the output {output} is not an empty directory")
        output.mkdir(parents=True, exist_ok=True)
        write_text(file, to_json(shared) + "\n")
    except OSError as error:
        raise UserError(f"can't use the directory {output}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"can't use the directory {output}: {first_line(error)}") from error


def report(runs: Sequence[Run], output: Path, forwards: int) -> str:
    """Writes ``compare.md``, ``compare.json`` and ``compare.png``; returns the table.

    Raises:
        UserError: no run is finished.
    """
    from zo_fused.task import comparison
    from zo_fused.task.comparison_picture import draw
    from zo_fused.task.files import to_json, write_text

    done = [run for run in runs if run.finished]
    if not done:
        raise UserError("no run came to its end, so there is nothing to compare")
    outcomes = [comparison.read_outcome(run.method, run.seed, run.output) for run in done]
    rows = comparison.summarize(outcomes)
    table = comparison.markdown(rows)
    seeds = ", ".join(f"{seed}" for seed in sorted({run.seed for run in done}))
    note = f"Budget: {forwards} training forward passes. Means over seeds {seeds} (and ranges)."
    write_text(output / "compare.md", f"{table}\n\n{note}\n")
    content: dict[str, Any] = {
        "forwards": forwards,
        "methods": rows,
        "runs": [
            {"method": outcome.method, "seed": outcome.seed, "summary": outcome.summary}
            for outcome in outcomes
        ],
    }
    write_text(output / "compare.json", to_json(content, indent=2) + "\n")
    title = f"{forwards} training forward passes, mean and range over seeds {seeds}"
    draw(outcomes, title, output / "compare.png")
    return f"{table}\n\n{note}"


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Runs what is not finished and prints the table; the exit code."""
    parser = Parser(prog="zo-fused compare", allow_abbrev=False)
    add_options(parser)
    args = merged(parser, args, _ELSEWHERE)
    methods, seeds = args.methods or _methods(METHODS), args.seeds or _seeds(SEEDS)
    output = args.output or OUTPUT
    table = defaults.defaults(defaults.METHOD, embedded=args.model is None)
    forwards = args.forwards or 2 * table["steps"]
    shared = [*_shared_words(args), f"--forwards={forwards}"]
    runs = make_runs(methods, seeds, shared, output)
    try:
        failures = run_all(runs)
    except Interrupted as stop:
        again = shlex.join(["zo-fused", *argv])
        raise Interrupted(f"{stop}; go on with `{again}`", stop.number) from None
    for failure in failures:
        print(f"zo-fused: {failure}", file=sys.stderr)
    print(report(runs, output, forwards))
    print(f"compare.md, compare.json, compare.png and the runs are in {output}")
    return 1 if failures else 0
