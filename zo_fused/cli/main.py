"""``zo-fused``: the commands, and how their errors are told.

Exit codes: 0 done, 1 a comparison or check failed, 2 a mistake in what was asked (one sentence on
stderr), 130 interrupted. Anything unexpected keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from zo_fused import __version__
from zo_fused.cli import compare, doctor, finetune, plan, replay
from zo_fused.cli.parser import Parser
from zo_fused.task.errors import Interrupted, UserError


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` is the module that runs."""
    parser = Parser(
        prog="zo-fused",
        description="Zeroth-order fine-tuning of language models with forward passes only.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zo-fused {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in (
        ("finetune", finetune),
        ("compare", compare),
        ("replay", replay),
        ("plan", plan),
        ("doctor", doctor),
    ):
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=getattr(module, "DESCRIPTION", module.HELP.capitalize() + "."),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(command)
        command.set_defaults(command=module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = make_parser().parse_args(words)
        code: int = args.command.run(args, words)
    except UserError as error:
        print(f"zo-fused: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"zo-fused: interrupted: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("zo-fused: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
