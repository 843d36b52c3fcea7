"""Files of a run: JSON that is read, and writing so that a process that is killed, or a machine
that loses power, never leaves half of one."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zo_fused.task.errors import first_line


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of what the system refuses in this block which file it was, as an `OSError`; also where
    a library made an error of its own of it."""
    try:
        yield
    except Exception as error:
        number = _refusal(error)
        if number is None:
            raise
        named = error.filename if isinstance(error, OSError) else None
        raise OSError(number, os.strerror(number), named or str(path)) from error


def _refusal(error: BaseException) -> int | None:
    """The number of the system's error at the root of another."""
    told = re.search(r"\(os error (\d+)\)", str(error))  # by libraries in Rust
    if told:
        return int(told[1])
    if isinstance(error, OSError):
        return error.errno
    return None if error.__context__ is None else _refusal(error.__context__)


def write_text(path: Path, text: str) -> None:
    """Replaces a file by one with this text, at once; it is on the disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it can't be read.
        ValueError: it holds something else: "not JSON (..)", "not a JSON object".
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def sync(path: Path) -> None:
    """What is in a file, or which names a folder has, is on the disk when this returns."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_all(folder: Path) -> None:
    """A folder with all that is in it is on the disk when this returns."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
