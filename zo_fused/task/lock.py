"""One process at a time in a run's directory."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zo_fused.task.errors import UserError, warn


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block in which no other process may lock this folder. The lock is the system's (``flock``
    of the folder itself), so it leaves no file behind, and ends with the process however that dies.

    Args:
        folder: it must exist.

    Raises:
        UserError: another process has it.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"another process is at work in {folder}: wait for its end, or choose another "
                    "--output"
                ) from None
            warn(f"{folder} can't be locked ({error.strerror}): let no other run write there")
        yield
    finally:
        os.close(file)
