"""A replay log as bytes, which one process reads and others replay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from zo_fused.parallel.groups import Groups
from zo_fused.parallel.telling import known_to_first
from zo_fused.step.log_lines import read_lines
from zo_fused.step.log_records import FORMAT, line_of


def bytes_of_steps(path: Path, contract: int) -> bytes:
    """A log up to its last step: what follows is of a step that never came. Empty if there is no
    log, or if the process that began it was killed before its header was whole.

    Raises:
        ValueError: the file is no log, or it is damaged (with the line).
    """
    if not path.exists() or _has_no_header_yet(path):
        return b""
    end = 0
    for line in read_lines(path, contract):
        if not end or (line.event is not None and not line.event.restored):
            end = line.end
    with open(path, "rb") as file:
        return file.read(end)


def _has_no_header_yet(path: Path) -> bool:
    begin = line_of({"format": FORMAT}, 0)[0].partition(b"}")[0]
    with open(path, "rb") as file:
        found = file.read(len(begin))
        if not begin.startswith(found):
            return False
        return b"\n" not in file.read()


@contextmanager
def received(log: bytes) -> Iterator[Path]:
    """A file with the bytes of a log, as long as the block lasts."""
    with TemporaryDirectory(prefix="zo-fused-") as folder:
        path = Path(folder) / "log-of-the-first-rank"
        path.write_bytes(log)
        yield path


@contextmanager
def read_by_first(
    groups: Groups | None, device: torch.device, log: str | os.PathLike[str]
) -> Iterator[Path]:
    """A log that the first of several processes reads, as long as the block lasts.

    Args:
        groups: None: each has it itself.
        device: where collectives are.
    """
    if groups is None:
        yield Path(log)
        return
    with received(known_to_first(groups, device, Path(log).read_bytes)) as file:
        yield file
