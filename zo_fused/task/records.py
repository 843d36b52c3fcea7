"""Records, which are fields by name, out of data files and Hugging Face data sets."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError, first_line, optional

TABLES = {".csv": ",", ".tsv": "\t"}  # and what is between two values
SUFFIXES = (".jsonl", ".json", *TABLES, ".parquet")

Record = dict[str, Any]
Records = Iterator[tuple[str, Record]]  # with where each was read, for messages: "train.jsonl:12"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    if isinstance(value, int | float):
        names.setdefault(type(value), "a number")
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def read_file(path: Path, label_field: str) -> Records:
    """The records of a file: CSV, TSV and Parquet by its suffix, else JSON.

    Args:
        label_field: see `read_hub`.

    Raises:
        UserError: the first thing that is wrong, with file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path, label_field)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    if suffix in TABLES:
        return _table(path, content, TABLES[suffix])
    return _json(path, content)


# ---- JSON ---------------------------------------------------------------------------------------


class _Malformed(Exception):
    """Why a text is no JSON, and in which of its lines."""

    def __init__(self, why: str, line: int = 1) -> None:
        super().__init__(why)
        self.line = line


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Malformed(f"not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise _Malformed(f"not JSON ({error.msg}: column {error.colno})", error.lineno) from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        raise _Malformed(f"not JSON ({first_line(error)})") from error


def _json(path: Path, content: bytes) -> Records:
    """A record a line, or one array of them, as it is or as the only list in an object."""
    lines = [line for line in enumerate(content.splitlines(), start=1) if line[1].strip()]
    array = _array(path, content, [line for _, line in lines])
    if array is not None:
        for number, record in enumerate(array, start=1):
            yield _object(f"{path} record {number}", record)
        return
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            record = _loads(line)
        except _Malformed as error:
            known = path.suffix.lower() in SUFFIXES
            hint = "" if known else f"; data files end in {', '.join(SUFFIXES)}"
            raise UserError(f"{where}: {error}{hint}") from error
        yield _object(where, record)


def _array(path: Path, content: bytes, lines: list[bytes]) -> list[Any] | None:
    """The records of a file that is one JSON value, or None where every line is one."""
    if len(lines) > 1 and _is_json(lines[0]):
        return None
    try:
        value = _loads(content)
    except _Malformed as error:
        # a first line of one bracket is no record that went wrong
        if lines and lines[0].strip() in (b"[", b"{"):
            raise UserError(f"{path}:{error.line}: {error}") from error
        return None
    if isinstance(value, list):
        return value
    lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else []
    if len(lists) == 1 and lists[0] and all(isinstance(record, dict) for record in lists[0]):
        return lists[0]
    return None if len(lines) == 1 else [value]


def _is_json(line: bytes) -> bool:
    try:
        _loads(line)
    except _Malformed:
        return False
    return True


def _object(where: str, record: Any) -> tuple[str, Record]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {kind(record)}")
    return where, record


# ---- tables -------------------------------------------------------------------------------------


def _table(path: Path, content: bytes, delimiter: str) -> Records:
    """The rows of CSV or TSV under the names in its first line; every value is text."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error
    rows = _rows(path, text, delimiter)
    line, names = next(rows, (1, []))
    for name in names:
        if not name.strip():
            raise UserError(f"{path}:{line}: a column has no name; the first line must name them")
        if names.count(name) > 1:
            raise UserError(f"{path}:{line}: two columns have the name {name!r}")
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(
                f"{path}:{line}: {len(row)} values, but the first line names {len(names)} columns"
            )
        yield f"{path}:{line}", dict(zip(names, row, strict=True))


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each row and the line on which it begins; blank lines are left out."""
    # strict: a quotation mark that is not closed would take the rest of the file as one value
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line, limit = reader.line_num + 1, csv.field_size_limit(sys.maxsize)
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: not a row of a table ({first_line(error)})") from error
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield line, row


# ---- data sets ----------------------------------------------------------------------------------


def _parquet(path: Path, label_field: str) -> Records:
    datasets, parquet = optional("datasets"), optional("pyarrow.parquet")
    try:
        rows = datasets.Dataset(parquet.read_table(path))
    except Exception as error:  # pyarrow raises a dozen classes
        raise UserError(f"can't read {path}: {first_line(error)}") from error
    return _named(f"{path}", rows, label_field)


def read_hub(source: str, split: str, label_field: str) -> Records:
    """The rows of a data set, ``id[:config[:split]]``; `split` is for those that name none.

    Args:
        label_field: numbered classes in this field become (number, name).

    Raises:
        UserError: it can't be loaded.
    """
    datasets = optional("datasets")
    name, config, named_split = [*source.split(":", 2), "", ""][:3]
    wanted = named_split or split
    try:
        rows = datasets.load_dataset(name, config or None, split=wanted)
    except Exception as error:  # datasets raises a dozen classes, its own and others'
        raise UserError(
            f"{source!r} is neither a data file nor a data set that could be loaded "
            f"(split {wanted!r}): {first_line(error)}"
        ) from error
    return _named(f"{source}[{wanted}]", rows, label_field)


def _named(source: str, rows: Any, label_field: str) -> Records:
    names = getattr(rows.features.get(label_field), "names", None)
    for number, row in enumerate(rows, start=1):
        record = dict(row)
        label = record.get(label_field)
        if names and isinstance(label, int) and 0 <= label < len(names):
            record[label_field] = (label, names[label])
        yield f"{source} row {number}", record
