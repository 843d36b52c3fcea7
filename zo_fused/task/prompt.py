"""Templates and verbalizers: how a labelled record becomes a prompt and candidate answers."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zo_fused.task.errors import UserError


def _parse(template: str) -> list[tuple[str, str | None]]:
    """The template as (literal text, field name or None) pieces.

    Only plain ``{name}`` placeholders are allowed: what a data set holds is pasted as it is.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"the template {template!r} is malformed: {error}") from error
    parsed = []
    for text, name, spec, conversion in pieces:
        if name is not None and (spec or conversion or not re.fullmatch(r"[\w-]+", name)):
            written = "{" + name + (f"!{conversion}" if conversion else "")
            written += (f":{spec}" if spec else "") + "}"
            raise UserError(
                f"the template's placeholder {written!r} is not a field name in braces, "
                "such as '{text}'"
            )
        parsed.append((text, name))
    return parsed


class Task:
    """A classification task put as a question to a language model.

    Args:
        template: the prompt, with a ``{field}`` for each field of a record it shows;
            ``{{`` and ``}}`` are braces.
        verbalizer: label -> the answer that continues the prompt, verbatim: after a prompt that
            ends in a word the answer starts with a space.
        description: a line for people.

    Raises:
        UserError: the two make no task; the message says why.
    """

    def __init__(self, template: str, verbalizer: Mapping[str, str], description: str = "") -> None:
        self.template = template
        self.verbalizer = dict(verbalizer)
        self.description = description
        self._pieces = _parse(template)
        self.fields = tuple(dict.fromkeys(name for _, name in self._pieces if name is not None))
        self.labels = tuple(self.verbalizer)
        self.answers = tuple(self.verbalizer.values())
        self._validate()

    def _validate(self) -> None:
        if not self.fields:
            raise UserError(
                f"the template {self.template!r} has no placeholder, such as '{{text}}', "
                "so every prompt would be the same"
            )
        if len(self.labels) < 2:
            raise UserError(f"the verbalizer needs at least two labels, got {len(self.labels)}")
        owner: dict[str, str] = {}
        for label, answer in self.verbalizer.items():
            if not answer.strip():
                raise UserError(f"the verbalizer's answer for label {label!r} is empty")
            if answer in owner:
                raise UserError(
                    f"the verbalizer gives labels {owner[answer]!r} and {label!r} "
                    f"the same answer {answer!r}"
                )
            owner[answer] = label
            self._check_joint(label, answer)

    def _check_joint(self, label: str, answer: str) -> None:
        """An answer glued to the template's last word is a forgotten space."""
        text, name = self._pieces[-1]
        if name is None and re.search(r"[A-Za-z0-9]$", text) and re.match(r"[A-Za-z0-9]", answer):
            word = text.split()[-1] + answer
            raise UserError(
                f"the answer for label {label!r} would read {word!r} after the template; "
                f"start it with a space: {' ' + answer!r}"
            )

    def prompt(self, fields: Mapping[str, Any]) -> str:
        """The template filled in; `fields` has every name in `self.fields`."""
        return "".join(
            text + (str(fields[name]) if name is not None else "") for text, name in self._pieces
        )

    def without_words(self) -> Task:
        """The task without alignment (arXiv 2402.11592): the prompt is the fields alone, in their
        order and joined by a space; the answers stay."""
        template = " ".join(f"{{{name}}}" for name in self.fields)
        return Task(template, self.verbalizer, self.description)

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """The task in a JSON file: ``template``, ``verbalizer`` and perhaps ``description``.

        Raises:
            UserError: the file can't be read, or is no task.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"can't read the task file {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"the task file {path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"the task file {path} is not a JSON object")
        template, verbalizer = content.get("template"), content.get("verbalizer")
        if not isinstance(template, str):
            raise UserError(f"the task file {path} has no string named 'template'")
        if not isinstance(verbalizer, dict) or not all(
            isinstance(answer, str) for answer in verbalizer.values()
        ):
            raise UserError(f"the task file {path} has no 'verbalizer' from labels to strings")
        try:
            return cls(template, verbalizer, str(content.get("description", "")))
        except UserError as error:
            raise UserError(f"in the task file {path}, {error}") from error
