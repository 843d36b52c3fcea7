"""The parser of the command line: mistakes are told like all others."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from zo_fused.task.errors import UserError

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
} | {f"torch.{name}": name for name in ("float32", "float16", "bfloat16")}


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


def choice(names: Iterable[str], others: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Arguments of ``add_argument`` for an option that is one of `names`, however it is written:
    letters may be large, and dashes missing.

    Args:
        others: further names, in small letters without dashes, of some of these.
    """
    names = list(names)
    known = {_squashed(name): name for name in names} | dict(others or {})

    def read(text: str) -> str:
        key = _squashed(text)
        if key in known:
            return known[key]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {known[close[0]]}?" if close else f"choose from {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} ({hint})")

    return {"type": read, "metavar": f"{{{','.join(names)}}}"}


def dtype_choice() -> dict[str, Any]:
    """The same of a dtype of weights."""
    return choice(("float32", "float16", "bfloat16"), _DTYPES)


def _below_power(text: str, power: int) -> int:
    digits = len(str(1 << power))
    if not re.fullmatch(rf"[0-9]{{1,{digits}}}", text) or int(text) >= 1 << power:
        raise argparse.ArgumentTypeError(f"must be a whole number below 2**{power}, got {text!r}")
    return int(text)


def run_seed(text: str) -> int:
    return _below_power(text, 64)


def data_seed(text: str) -> int:
    return _below_power(text, 32)


def whole(text: str) -> int:
    """A count; of more than 2**31 there is no memory and no time for."""
    value = int(text) if re.fullmatch(r"[0-9]{1,18}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    if value >= 1 << 31:
        raise argparse.ArgumentTypeError(f"must be below 2**31, got {text!r}")
    return value


def pair(text: str) -> tuple[float, float]:
    """Two numbers."""
    try:
        first, second = map(float, re.split("[/,]", text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must look like 0.9/0.999, got {text!r}") from None
    return first, second


def truth(text: str) -> bool:
    """Of an option that is on where nothing is said."""
    known = {"true": True, "yes": True, "false": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be yes or no, got {text!r}")
    return known[text.lower()]


def shown(value: Any) -> str:
    """A default as a help text has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return "/".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def folder(text: str) -> Path:
    """A folder to write; libraries in Rust take no name that is not UTF-8."""
    if not text:  # of a variable that is not set; it would be the present folder
        raise argparse.ArgumentTypeError("the name is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"the name {text!r} is not UTF-8 text") from error
    return Path(text)


def _squashed(text: str) -> str:
    return re.sub(r"[-_ ]", "", text).lower()
