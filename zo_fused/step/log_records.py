"""Records of a replay log: lines of JSON, each with a checksum over all records so far.

A line is ``[record,"checksum"]``: the record in JSON, and in eight hexadecimal digits the CRC-32 of
the bytes of its JSON that goes on from the checksum of the line before (the first one from 0). So a
record that was edited, lost, doubled or moved is found, with all that follow. It finds accidents: a
CRC is no signature, and whoever means to can write a log with right checksums.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "zo_fused replay log"
VERSION = 2
# A record has every basis of a direction at most; a file that is none must not fill the memory.
_LONGEST = 1 << 28  # bytes
_MOST_VALUES = 1 << 24  # in a record: in memory a small one has tens of bytes
_LINE = re.compile(rb'\[(.*),"([0-9a-f]{8})"\]\n', re.DOTALL)
# Logs up to 0.1.0.dev0 had the record alone in a line.
_FIRST_VERSION = re.compile(rb'\{"format": ?"zo_fused replay log", ?"version": ?1,')


class Record(NamedTuple):
    """A complete line."""

    number: int  # from 1
    value: Any
    checksum: int  # of the records up to this one
    end: int  # where its line ends in the file, in bytes


def line_of(value: Any, checksum: int) -> tuple[bytes, int]:
    """The line of a record, and its checksum.

    Args:
        value: JSON.
        checksum: of the line before; 0: there is none.

    Raises:
        ValueError: a number in it is not finite, or it is longer than any log has it.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    if len(text) + 14 > _LONGEST:
        raise ValueError(f"a record of {len(text)} bytes is too long for a replay log")
    checksum = zlib.crc32(text, checksum)
    return b'[%b,"%08x"]\n' % (text, checksum), checksum


def records(path: Path) -> Iterator[Record]:
    """The records one after the other, as far as they are looked at. A last line that has no end
    was cut off by a kill; it is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a log, of another version, or damaged (with the line number).
    """
    checksum = end = 0
    with open(path, "rb") as file:
        for number in range(1, 1 << 62):
            line = file.readline(_LONGEST + 1)
            if len(line) > _LONGEST or (len(line) > _MOST_VALUES and _values(line) > _MOST_VALUES):
                raise ValueError(f"{path}, line {number}: longer than any record")
            if not line.endswith(b"\n"):
                return
            found = _LINE.fullmatch(line)
            if found is None:
                if number == 1:
                    raise ValueError(_no_log(path, line))
                raise ValueError(f"{path}, line {number}: not a record with a checksum")
            text, said = found.groups()
            checksum, end = zlib.crc32(text, checksum), end + len(line)
            if said != b"%08x" % checksum:
                raise ValueError(
                    f"{path}, line {number}: the checksum is wrong: this record was edited, or one "
                    "before it is missing, doubled or moved. Take another copy of the log, or the "
                    "lines before this one"
                )
            try:
                value = json.loads(text.decode(), parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            yield Record(number, value, checksum, end)


def _values(line: bytes) -> int:
    """Not fewer than these are in a record."""
    return sum(map(line.count, (b",", b"[", b"{")))


def _no_log(path: Path, line: bytes) -> str:
    if _FIRST_VERSION.match(line):
        return (
            f"{path} was written with version 1 (zo_fused 0.1.0.dev0); this zo_fused reads version "
            f"{VERSION}: replay it with the version that wrote it"
        )
    return f"{path} is not a zo_fused replay log"


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
