"""The parser of the command line: mistakes are told like all others."""

from __future__ import annotations

import argparse
from typing import NoReturn

from zo_fused.task.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")
