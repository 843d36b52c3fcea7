"""``zo-fused``: the commands, and how their errors are told.

Exit codes: 0 done, 1 a comparison or check failed, 2 a mistake in what was asked (one sentence on
stderr) or in the system (a full disk, a folder that can't be written), 130 interrupted, 138 and 143
ended by SIGUSR1 or SIGTERM, 141 nobody reads the output. Anything unexpected keeps its traceback.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from zo_fused import __version__
from zo_fused.cli import compare, doctor, evaluate, finetune, init, log, plan, replay
from zo_fused.cli.parser import Parser
from zo_fused.task.errors import Interrupted, UserError, of_the_system


def make_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; `command` is the module that runs.

    Args:
        words: that it is for: one command gets its options, some of which need torch to be told.
    """
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = Parser(
        prog="zo-fused",
        description="Zeroth-order fine-tuning of language models with forward passes only.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"zo-fused {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in (
        ("finetune", finetune),
        ("init", init),
        ("evaluate", evaluate),
        ("compare", compare),
        ("replay", replay),
        ("log", log),
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
        if name == chosen:
            module.add_options(command)
        command.set_defaults(command=module)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that it can't show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = make_parser(words).parse_args(words)
        code: int = args.command.run(args, words)
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        print(f"zo-fused: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        name = signal.Signals(stop.number).name
        what = "interrupted" if stop.number == signal.SIGINT else f"ended by {name}"
        print(f"zo-fused: {what}: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("zo-fused: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        return _refused(error)
    return code


def _refused(error: OSError) -> int:
    """Tells what the system refused; the exit code."""
    try:
        print(end="", flush=True)
    except OSError:  # it is the output; no more of it, also when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # of `| head`: in silence, as others do
        return 141
    print(f"zo-fused: {of_the_system(error)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
