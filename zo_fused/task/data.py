"""Labelled examples from data files, directories of them, and Hugging Face data sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError
from zo_fused.task.prompt import Question, Task
from zo_fused.task.records import SUFFIXES, TABLES, Record, Records, kind, read_file, read_hub

SPLITS = ("train", "dev", "test")
_HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class Example:
    """One labelled record: all its fields, for templates, and its label as in the verbalizer."""

    fields: Mapping[str, Any]
    label: str
    source: str  # where it was read, for messages: "train.jsonl:12"
    question: Question | None = None  # what the model is asked, where the task has said it already


def split_file(source: str, split: str) -> Path | None:
    """The data file of a split if `source` is a directory and has one.

    Raises:
        UserError: it has two.
    """
    paths = [Path(source) / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [path for path in paths if path.is_file()]
    if len(found) > 1:
        raise UserError(f"the directory {source} has both {found[0].name} and {found[1].name}")
    return found[0] if found else None


def read_examples(
    source: str, task: Task, split: str = "train", label_field: str = "label"
) -> list[Example]:
    """The examples of a data file, a directory with one for the split, or a data set.

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
    labels = _labels(task)
    records = read_records(source, split, label_field)
    return [_example(where, record, task, labels, label_field) for where, record in records]


def read_records(source: str, split: str = "train", label_field: str = "") -> Records:
    """The records of a data file, a directory with one for the split, or a data set.

    Args:
        source, split: as in `read_examples`.
        label_field: numbered classes in this field become (number, name).

    Raises:
        UserError: the first thing that is wrong, with file and line.
    """
    path = _file(source, split)
    if path is not None:
        records = read_file(path, label_field)
    elif Path(source).suffix.lower() in (*SUFFIXES, ".txt") or source.startswith((".", "/", "~")):
        raise UserError(f"there is no data file {source}")
    else:
        records = read_hub(source, _HUB_SPLITS[split], label_field)
    for first in records:
        return itertools.chain([first], records)
    raise UserError(f"{path or source} holds no examples")


def _file(source: str, split: str) -> Path | None:
    """The data file that `source` is, perhaps a pipe, or that it has for the split."""
    path = Path(source)
    if not path.is_dir():
        return path if path.exists() else None
    file = split_file(source, split)
    if file is None:
        others = ", ".join(SUFFIXES[1:])
        raise UserError(f"the directory {source} has no {split}.jsonl (nor {others})")
    return file


def _plain(label: Any) -> str | None:
    """A label without what file formats make of it: "True" is true, and 1.0 and "1.0" are 1.

    None: a value that is no label.
    """
    if isinstance(label, float):
        return f"{label:.0f}" if label.is_integer() else None
    if not isinstance(label, str | int):
        return None
    text = str(label)
    if text.lower() in ("true", "false"):
        return text.lower()
    whole, point, zeros = text.partition(".")
    number = point and zeros.strip("0") == "" and whole.removeprefix("-").isdecimal()
    return whole if number else text


def _labels(task: Task) -> dict[str, str]:
    """The labels of the verbalizer by how they are in data."""
    labels: dict[str, str] = {}
    for label in task.labels:
        other = labels.setdefault(str(_plain(label)), label)
        if other != label:
            raise UserError(f"the labels {other!r} and {label!r} of the verbalizer are the same")
    return labels


def _example(
    where: str, record: Record, task: Task, labels: dict[str, str], label_field: str
) -> Example:
    for field in (*task.fields, label_field):
        if field not in record:
            why = " (the template uses it)" if field in task.fields else ""
            have = ", ".join(map(repr, record)) or "none"
            table = Path(where.rpartition(":")[0]).suffix.lower() in TABLES
            hint = " (the first line of a table must name them)" if table else ""
            raise UserError(f"{where}: no field {field!r}{why}; its fields are: {have}{hint}")
    for field in task.fields:
        wrong = _not_text(record[field])
        if wrong:
            raise UserError(f"{where}: field {field!r} is not text but {wrong}")
    label = record[label_field]
    spellings = label if isinstance(label, tuple) else (label,)
    plain = [_plain(spelling) for spelling in spellings]
    if plain[0] is None:
        raise UserError(f"{where}: field {label_field!r} is no label but {kind(label)}")
    for spelling in plain:
        if spelling in labels:
            return Example(record, labels[spelling], where)
    shown = " or ".join(
        repr(spelling if isinstance(spelling, str) else text)
        for spelling, text in zip(spellings, plain, strict=True)
    )
    known = ", ".join(map(repr, task.labels))
    raise UserError(f"{where}: label {shown} has no answer in the verbalizer, which has {known}")


def _not_text(value: Any) -> str | None:
    """What a value is if a prompt can't have it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return kind(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can say "\ud83d"
            return "half a character"
    return None
