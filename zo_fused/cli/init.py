"""``zo-fused init``: a config of ``zo-fused finetune``, with every option and its default."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from zo_fused.cli import defaults
from zo_fused.cli.config import PRESETS, presets, settable
from zo_fused.cli.method_help import of_one
from zo_fused.cli.method_options import OPTIONS, by_method
from zo_fused.cli.parser import choice, shown
from zo_fused.cli.run_options import method_choice, run_parser
from zo_fused.task.errors import UserError

HELP = "write a config of finetune, with every option and its default"

DESCRIPTION = """\
Write a YAML file for `zo-fused finetune --config`: the options of a method, each with what it does
and its default, behind a #. Without the # an option counts."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, default=Path("run.yaml"),
        help="to write (default: run.yaml)",
    )  # fmt: skip
    parser.add_argument("--method", **method_choice(), help=f"(default: {defaults.METHOD})")
    parser.add_argument("--preset", **choice(presets()), help="a copy of this preset instead")


def text(method: str) -> str:
    """The file of a method."""
    parser = run_parser()
    values = defaults.defaults(method, embedded=False)
    lines = ["# zo-fused finetune --config FILE. What is on the command line goes before it."]
    own = by_method()[method]
    for group in parser._action_groups:
        told: list[str] = []
        for action in settable(parser):
            name = action.dest
            if action not in group._group_actions or (name in OPTIONS and name not in own):
                continue
            about = of_one(name, method) if name in OPTIONS else action.help or ""
            if f"{action.metavar}".startswith("{") and name != "method":
                about = f"{action.metavar}: {about}"
            told += textwrap.wrap(about, 96, initial_indent="# ", subsequent_indent="# ")
            line = f"{name.replace('_', '-')}: {_value(values | {'method': method}, name)}"
            told.append(line if name == "method" else f"#{line}".rstrip())
        if told:
            lines += ["", f"# ---- {group.title} ----", "", *told]
    return "\n".join(lines) + "\n"


def _value(values: dict[str, Any], name: str) -> str:
    if name == "verbalizer":
        return "{negative: ' terrible', positive: ' great'}"
    value = values.get(name)
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else shown(value)


def run(args: argparse.Namespace, argv: list[str]) -> int:
    """Writes the file; the exit code."""
    if args.preset is not None and args.method is not None:
        raise UserError("--preset and --method exclude each other")
    if args.preset is not None:
        content = (PRESETS / f"{args.preset}.yaml").read_text(encoding="utf-8")
    else:
        content = text(args.method or defaults.METHOD)
    try:
        with args.file.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise UserError(f"{args.file} is there already") from None
    print(f"{args.file} is written; `zo-fused finetune --config {args.file}` runs it")
    return 0
