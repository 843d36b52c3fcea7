"""Replay logs as tests read and change them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zo_fused.step.log_records import line_of


def records_of(log: Path) -> list[Any]:
    """What the lines of a log say."""
    return [json.loads(line)[0] for line in log.read_text().splitlines()]


def write_records(log: Path, records: Iterable[Any]) -> None:
    """A log that says this, with the checksums that belong to it."""
    lines, checksum = [], 0
    for record in records:
        line, checksum = line_of(record, checksum)
        lines.append(line)
    log.write_bytes(b"".join(lines))


def write_texts(log: Path, texts: Iterable[str]) -> None:
    """The same of records that need not be JSON."""
    lines, checksum = [], 0
    for text in texts:
        checksum = zlib.crc32(text.encode(), checksum)
        lines.append(f'[{text},"{checksum:08x}"]\n')
    log.write_text("".join(lines))
