"""What the tasks in `papers/` make of a record where a template can't say it.

The records are in the schema of the data sets that the YAML files name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zo_fused.task.answers import exact_match, f1

Record = Mapping[str, Any]


def copa_prompt(doc: Record) -> str:
    """The premise without its full stop, and "so" or "because".

    Raises:
        ValueError: the question is neither for the effect nor for the cause.
    """
    words = {"effect": "so", "cause": "because"}
    if doc["question"] not in words:
        raise ValueError(f"the question of COPA is effect or cause, not {doc['question']!r}")
    return f"{doc['premise'].rstrip().removesuffix('.')} {words[doc['question']]}"


def copa_choices(doc: Record) -> list[str]:
    """Both choices as the end of a sentence: the first word in small letters, unless it is "I"."""
    return [_inside(doc["choice1"]), _inside(doc["choice2"])]


def _inside(sentence: str) -> str:
    first, space, rest = sentence.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def record_choices(doc: Record) -> list[str]:
    """The query with each of the passage's entities in its gap."""
    return [doc["query"].replace("@placeholder", entity) for entity in doc["entities"]]


def record_right(doc: Record) -> list[int]:
    """Which entities are right: of the first answer first, which is the one that is trained on.

    Raises:
        ValueError: none is.
    """
    right = [doc["entities"].index(a) for a in doc["answers"] if a in doc["entities"]]
    if not right:
        raise ValueError("none of the answers is an entity of the passage")
    return list(dict.fromkeys(right))


def labelled(docs: Any) -> Any:
    """Without the records whose annotators did not agree, which have the label -1."""
    return docs.filter(lambda doc: doc["label"] >= 0)


def squad_results(doc: Record, results: Sequence[str]) -> dict[str, float]:
    """F1 and exact match of a generated answer to a question of SQuAD."""
    return _scores(results[0], doc["answers"]["text"])


def drop_results(doc: Record, results: Sequence[str]) -> dict[str, float]:
    """F1 and exact match of a generated answer to a question of DROP."""
    return _scores(results[0], doc["answers_spans"]["spans"])


def _scores(text: str, right: Sequence[str]) -> dict[str, float]:
    return {"f1": f1(text, right), "exact_match": exact_match(text, right)}
