"""Templates and verbalizers: how a labelled record becomes a prompt and candidate answers."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zo_fused.task.errors import UserError
from zo_fused.task.files import json_object

if TYPE_CHECKING:
    from zo_fused.task.data import Example

MASK = "mask"  # the placeholder of a masked language model's answer


@dataclass(frozen=True)
class Question:
    """What a model is asked: prompts, answers that go on from them, and which are right.

    Attributes:
        prompts: one that all answers follow, or one for each.
        answers: the candidates; where the model is to write the answer, the one to train on.
        right: the numbers of the right ones; the first is trained on.
        texts: where the model is to write the answer, what it may be.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    right: tuple[int, ...]
    texts: tuple[str, ...] = ()


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
    """A classification task put as a question to a language model: the same answers for all.

    Args:
        template: the prompt, with a ``{field}`` for each field of a record it shows;
            ``{{`` and ``}}`` are braces. For a masked language model (RoBERTa), ``{mask}`` is
            where the answer belongs, as in "{text} It was {mask}."; a causal one gets none.
        verbalizer: label -> the answer that continues the prompt, verbatim: after a prompt that
            ends in a word the answer starts with a space. In place of ``{mask}``: after a space
            or none, as in the template.
        description: a line for people.

    Raises:
        UserError: the two make no task; the message says why.
    """

    loss = "classification"  # what it is trained with unless the user says otherwise
    generates, max_new_tokens = False, 0  # the model writes no answer of its own

    def __init__(self, template: str, verbalizer: Mapping[str, str], description: str = "") -> None:
        self.template = template
        self.verbalizer = dict(verbalizer)
        self.description = description
        self._pieces = _parse(template)
        names = [name for _, name in self._pieces if name is not None]
        self.masked = MASK in names
        self.fields = tuple(name for name in dict.fromkeys(names) if name != MASK)
        self.labels = tuple(self.verbalizer)
        self._validate(names)
        self.answers = tuple(map(self._in_place, self.verbalizer.values()))

    def _validate(self, names: Sequence[str]) -> None:
        if names.count(MASK) > 1:
            raise UserError(
                f"the template {self.template!r} has {names.count(MASK)} masks, and an answer is "
                "one token in one {mask}"
            )
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
        text, name = self._before_answer()
        if name is None and re.search(r"[A-Za-z0-9]$", text) and re.match(r"[A-Za-z0-9]", answer):
            word = text.split()[-1] + answer
            raise UserError(
                f"the answer for label {label!r} would read {word!r} after the template; "
                f"start it with a space: {' ' + answer!r}"
            )

    def _before_answer(self) -> tuple[str, str | None]:
        """The text that the answer follows, and the field after that text and before the answer."""
        for text, name in self._pieces:
            if name == MASK:
                return text, None
        return self._pieces[-1]

    def _in_place(self, answer: str) -> str:
        """The answer as it is written into the mask: the template's space before it is its own."""
        spaced = self.masked and self._before_answer()[0].endswith(" ")
        return f" {answer.lstrip(' ')}" if spaced else answer

    def prompt(self, fields: Mapping[str, Any], mask: str = "") -> str:
        """The template filled in.

        Args:
            fields: has every name in `self.fields`.
            mask: the tokenizer's mask token. A space before it is left out: it is the answer's.
        """
        made = ""
        for text, name in self._pieces:
            if name == MASK:
                made += text.removesuffix(" ") + mask
            else:
                made += text + (str(fields[name]) if name is not None else "")
        return made

    def question(self, example: Example, mask: str = "") -> Question:
        """What the model is asked about an example; `mask` as in `prompt`."""
        prompt, right = self.prompt(example.fields, mask), self.labels.index(example.label)
        return Question((prompt,), self.answers, (right,))

    def without_words(self) -> Task:
        """The task without alignment (arXiv 2402.11592): the prompt is the fields alone, in their
        order and joined by a space; the answers stay."""
        names = (*self.fields, *([MASK] if self.masked else []))
        template = " ".join(f"{{{name}}}" for name in names)
        return Task(template, self.verbalizer, self.description)

    @classmethod
    def from_file(cls, path: str | Path) -> Task:
        """The task in a JSON file: ``template``, ``verbalizer`` and perhaps ``description``.

        Raises:
            UserError: the file can't be read, or is no task.
        """
        try:
            content = json_object(Path(path))
        except OSError as error:
            raise UserError(f"can't read the task file {path}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"the task file {path} is {error}") from error
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
