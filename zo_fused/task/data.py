"""Labelled examples from JSONL files, directories of them, and Hugging Face data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.prompt import Task

SPLITS = ("train", "dev", "test")
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_LOCAL_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Example:
    """One labelled record: all its fields, for templates, and its label as in the verbalizer."""

    fields: Mapping[str, Any]
    label: str
    source: str  # where it was read, for messages: "train.jsonl:12"


def split_file(source: str, split: str) -> Path | None:
    """The JSONL file of a split if `source` is a directory and has one."""
    path = Path(source) / f"{split}.jsonl"
    return path if path.is_file() else None


def read_examples(
    source: str, task: Task, split: str = "train", label_field: str = "label"
) -> list[Example]:
    """The examples of a JSONL file, a directory with ``<split>.jsonl``, or a data set.

    Args:
        source: a path, or ``id``, ``id:config`` or ``id:config:split`` of a data set on the
            Hugging Face Hub, e.g. ``nyu-mll/glue:sst2`` or ``stanfordnlp/imdb::train[:1000]``.
        task: says which fields and labels the records must have.
        split: train, dev or test; in a data set that is its train, validation or test split
            where `source` names none.
        label_field: the field that holds the label. A data set's numbered classes may be called
            by number or by name in the verbalizer.

    Raises:
        UserError: the first thing that is wrong, with file and line.
    """
    if label_field in task.fields:
        raise UserError(f"the template shows the answer: it uses the label field {label_field!r}")
    path = Path(source)
    if path.is_dir():
        file = split_file(source, split)
        if file is None:
            raise UserError(f"the directory {source} has no {split}.jsonl")
        path = file
    if path.is_file():
        records = _jsonl(path)
    elif path.suffix in _LOCAL_SUFFIXES or source.startswith((".", "/", "~")):
        raise UserError(f"there is no data file {source}")
    else:
        records = _hub(source, split, label_field)
    examples = [_example(where, record, task, label_field) for where, record in records]
    if not examples:
        raise UserError(f"{path if path.is_file() else source} holds no examples")
    return examples


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of each line that is not blank."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error.reason})") from error
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object but {_kind(record)}")
        yield where, record


def _hub(source: str, split: str, label_field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of a data set's rows; numbered classes become (number, name) labels."""
    datasets = optional("datasets")
    name, config, named_split = [*source.split(":", 2), "", ""][:3]
    wanted = named_split or _HUB_SPLITS[split]
    try:
        rows = datasets.load_dataset(name, config or None, split=wanted)
    except Exception as error:  # datasets raises a dozen classes, its own and others'
        raise UserError(
            f"{source!r} is neither a data file nor a data set that could be loaded "
            f"(split {wanted!r}): {first_line(error)}"
        ) from error
    names = getattr(rows.features.get(label_field), "names", None)
    for number, row in enumerate(rows, start=1):
        record = dict(row)
        label = record.get(label_field)
        if names and isinstance(label, int) and 0 <= label < len(names):
            record[label_field] = (label, names[label])
        yield f"{source}[{wanted}] row {number}", record


def _example(where: str, record: dict[str, Any], task: Task, label_field: str) -> Example:
    for field in (*task.fields, label_field):
        if field not in record:
            why = " (the template uses it)" if field in task.fields else ""
            have = ", ".join(map(repr, record)) or "none"
            raise UserError(f"{where}: no field {field!r}{why}; its fields are: {have}")
    for field in task.fields:
        value = record[field]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{where}: field {field!r} is not text but {_kind(value)}")
    label = record[label_field]
    spellings = label if isinstance(label, tuple) else (label,)
    if isinstance(spellings[0], bool) or not isinstance(spellings[0], str | int):
        raise UserError(f"{where}: field {label_field!r} is no label but {_kind(label)}")
    for spelling in map(str, spellings):
        if spelling in task.verbalizer:
            return Example(record, spelling, where)
    shown = " or ".join(map(repr, map(str, spellings)))
    known = ", ".join(map(repr, task.labels))
    raise UserError(f"{where}: label {shown} has no answer in the verbalizer, which has {known}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
