"""Mistakes of the user, told in one sentence."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

from zo_fused.step.interrupts import uninterrupted


class UserError(Exception):
    """Something the user can put right; its text is one sentence without a final full stop."""


def warn(text: str) -> None:
    """Tells the user of what is probably a mistake; the run goes on."""
    print(f"zo-fused: warning: {text}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first non-empty line of another library's message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no memory, on a GPU or on the CPU."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def optional(name: str, install: str = "zo-fused[hf]") -> Any:
    """An optional dependency's module.

    Args:
        install: what has it.

    Raises:
        UserError: it is not installed, or can't be imported.
    """
    try:
        with uninterrupted():  # half an import would break the next one in strange ways
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs the package {name!r} ({first_line(error)}); "
            f"install it with `pip install '{install}'`"
        ) from error


class Interrupted(Exception):
    """A signal stopped a run; the text says where.

    Attributes:
        number: of the signal.
    """

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


def of_the_system(error: OSError) -> str:
    """What the system refused, and of which file."""
    if error.strerror is None:
        return first_line(error)
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}"
