"""The parser of the command line: mistakes are told like all others."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from zo_fused.task.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def add_trust_option(parser: Any) -> None:
    """Adds the option without which no code of a model's own is run."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="run the Python code that comes with the model, as some models need",
    )
