"""From text to token ids.

Prompt and answer are tokenised apart and their ids are joined. So the answer's span is known
exactly and is the same after every prompt: a BPE merge across the boundary can't move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zo_fused.task.adapters import virtual_tokens
from zo_fused.task.data import Example
from zo_fused.task.errors import UserError
from zo_fused.task.prompt import Question, Task

if TYPE_CHECKING:
    from zo_fused.task.lm_tasks import LmTask

Tokens = list[int]


@dataclass(frozen=True)
class Encoded:
    """A question as token ids.

    Attributes:
        prompt: what the answers follow (bos included where the tokenizer puts one).
        label: the number of the right answer; where several are, of the one to train on.
        answers: this example's own; (): those that all examples have.
        prompts: one for each answer, where they don't follow the same; else ().
        right: the numbers of all right answers, where there are several; else ().
        texts: what the answer may be, where the model is to write it; else ().
    """

    prompt: Tokens
    label: int
    answers: tuple[Tokens, ...] = ()
    prompts: tuple[Tokens, ...] = ()
    right: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


def plain_ids(tokenizer: Any, text: str) -> Tokens:
    """Token ids without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_ids(tokenizer: Any, answer: str) -> Tokens:
    """Token ids of an answer as a continuation.

    SentencePiece-like tokenizers put a space before every text, so " great" alone would get two.
    After a line break, which never merges with what follows, the answer is tokenised as it would
    be inside a text; where the line break does merge, the answer is tokenised alone.
    """
    anchor, joined = plain_ids(tokenizer, "\n"), plain_ids(tokenizer, "\n" + answer)
    if anchor and joined[: len(anchor)] == anchor and len(joined) > len(anchor):
        return joined[len(anchor) :]
    return plain_ids(tokenizer, answer)


def maximum_length(model: Any, tokenizer: Any) -> int:
    """The most tokens of a text that model and tokenizer both take."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if first is not None and name.endswith("position_embeddings"):
            positions = module.num_embeddings - first - 1  # RoBERTa's numbers start after it
    limits = [tokenizer.model_max_length, positions]
    return min(int(limit) for limit in limits if limit is not None) - virtual_tokens(model)


class Encoder:
    """Turns examples of one task into token ids.

    Args:
        task: what the examples are asked.
        tokenizer: of transformers.
        max_length: longest row of prompt and answer. Longer prompts lose tokens on their left
            (never the bos); answers are never cut. Room is left for the longest answer, so every
            candidate of an example follows the same prompt, and for what the model is to write.

    Attributes:
        answers: token ids of the candidates, where all examples have the same; else [].
        cut: prompts that have lost tokens so far.

    Raises:
        UserError: an answer has no tokens, two have the same, or one is too long for the model.
    """

    def __init__(self, task: Task | LmTask, tokenizer: Any, max_length: int) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cut = 0
        self.answers = [self._answer(answer) for answer in task.answers]
        for index, ids in enumerate(self.answers):
            if ids in self.answers[:index]:
                other = task.answers[self.answers.index(ids)]
                raise UserError(
                    f"the tokenizer makes the same tokens of the answers {other!r} and "
                    f"{task.answers[index]!r}"
                )
        self.room = self._room(self.answers)

    def _answer(self, answer: str) -> Tokens:
        ids = answer_ids(self.tokenizer, answer)
        if not ids:
            raise UserError(f"the tokenizer makes no tokens of the answer {answer!r}")
        return ids

    def _room(self, answers: Sequence[Tokens]) -> int:
        """The most tokens of a prompt that these answers may follow."""
        room = self.max_length - max([self.task.max_new_tokens, *map(len, answers)])
        if room < 2:
            raise UserError(
                f"the longest answer leaves no room for a prompt: there are {self.max_length} "
                "tokens for both"
            )
        return room

    def question(self, example: Example) -> Question:
        """What the model is asked."""
        return self.task.question(example)

    def prompt_ids(self, text: str) -> Tokens:
        """Token ids of a prompt, at most `self.room`.

        The tokenizer decides whether a text starts with bos. An eos that some tokenizers put at
        the end is left out, since the answer follows.
        """
        bos = self.tokenizer.bos_token_id
        special = self.tokenizer(text)["input_ids"]
        start = [bos] if bos is not None and special and special[0] == bos else []
        ids = plain_ids(self.tokenizer, text)
        over = max(0, len(start) + len(ids) - self.room)
        self.cut += over > 0
        return start + ids[over:]

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The examples in their order.

        Raises:
            UserError: a prompt has no tokens at all, or an example's own answers are as those that
                the constructor refuses.
        """
        return [self._encode(example) for example in examples]

    def _encode(self, example: Example) -> Encoded:
        question = self.question(example)
        answers: tuple[Tokens, ...] = ()
        if not self.answers:
            answers = tuple(map(self._answer, question.answers))
            self.room = self._room(answers)
        prompts = tuple(map(self.prompt_ids, question.prompts))
        if not all(prompts):
            raise UserError(f"{example.source}: the prompt is empty")
        return Encoded(
            prompts[0],
            question.right[0],
            answers,
            prompts if len(prompts) > 1 else (),
            question.right if len(question.right) > 1 else (),
            question.texts,
        )
