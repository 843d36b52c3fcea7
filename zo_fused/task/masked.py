"""Masked language models (BERT, RoBERTa): the answer is one token in the place of a mask.

As in MeZO's experiments with RoBERTa (arXiv 2305.17333, section 3.1; templates of LM-BFF): the
prompt holds a mask token, an answer's score is its log-probability there, and the loss is the cross
entropy over the answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_fused.task.adapters import base_model
from zo_fused.task.data import Example
from zo_fused.task.encoding import Encoded, Encoder, Tokens, answer_ids, plain_ids
from zo_fused.task.errors import UserError
from zo_fused.task.prompt import Question, Task
from zo_fused.task.rows import Rows
from zo_fused.task.scoring import Scorer

if TYPE_CHECKING:
    from zo_fused.task.lm_tasks import LmTask


class MaskEncoder(Encoder):
    """Turns examples of a task whose template has a ``{mask}`` into token ids.

    Args:
        task: of prompts with one mask, and the same answers for all examples.
        tokenizer: as in `Encoder`.
        max_length: longest text, special tokens included. Of longer texts, what is farthest from
            the mask is cut.

    Raises:
        UserError: the tokenizer has no mask token, or an answer is not one token.
    """

    def __init__(self, task: Task | LmTask, tokenizer: Any, max_length: int) -> None:
        self.mask_id = tokenizer.mask_token_id
        if self.mask_id is None:
            raise UserError("the tokenizer has no mask token, for which {mask} stands")
        super().__init__(task, tokenizer, max_length)
        for answer, ids in zip(task.answers, self.answers, strict=True):
            if len(ids) > 1 or ids == [tokenizer.unk_token_id]:
                raise UserError(self._not_one_token(answer, ids))
        bare = list(tokenizer(tokenizer.mask_token)["input_ids"])
        at = bare.index(self.mask_id)
        self._start, self._end = bare[:at], bare[at + 1 :]
        self.room = max_length

    def _not_one_token(self, answer: str, ids: Tokens) -> str:
        cure = "take another word for its label"
        if len(answer_ids(self.tokenizer, f" {answer}")) == 1 and len(ids) > 1:
            cure = f"with a space before it, {' ' + answer!r}, it is one token"
        return (
            f"the answer {answer!r} must be one token, as it stands in one mask, but the tokenizer "
            f"makes {self.tokenizer.convert_ids_to_tokens(ids)} of it; {cure}"
        )

    def question(self, example: Example) -> Question:
        """What the model is asked, with the tokenizer's mask token in it."""
        mask = self.tokenizer.mask_token
        if mask in self.task.question(example).prompts[0]:
            raise UserError(f"{example.source}: the text holds {mask!r}, the mask token itself")
        return self.task.question(example, mask)

    def prompt_ids(self, text: str) -> Tokens:
        """Token ids of a text, special tokens included, at most `self.room`."""
        ids = plain_ids(self.tokenizer, text)
        at = ids.index(self.mask_id)
        before, after = ids[:at], ids[at + 1 :]
        room = self.room - len(self._start) - len(self._end) - 1
        left = min(len(before), max(room - len(after), room // 2))
        right = min(len(after), room - left)
        self.cut += left + right < len(before) + len(after)
        before, after = before[len(before) - left :], after[:right]
        return [*self._start, *before, self.mask_id, *after, *self._end]


class MaskScorer(Scorer):
    """Scores a fixed set of answers of one token each at the mask of a text.

    Only the logits at the masks are computed.

    Args:
        model: a masked language model of transformers, or one with an adapter of peft.
        answers: token ids of each candidate, one each.
        pad_id: any token id that the model has an embedding for.
        mask_id: of the mask token, which is once in every text.
    """

    def __init__(self, model: Any, answers: Sequence[Tokens], pad_id: int, mask_id: int) -> None:
        super().__init__(model, answers, pad_id, padding_side="right")
        self.mask_id = mask_id

    def _check_order(self, example: Encoded) -> None:
        """An encoder may look at what follows."""

    def _rows(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> Rows:
        width = max(map(len, prompts))
        gaps = [width - len(prompt) for prompt in prompts]
        ids = [p + [self.pad_id] * gap for p, gap in zip(prompts, gaps, strict=True)]
        inputs = {"input_ids": torch.tensor(ids, device=self.device)}
        if any(gaps):
            mask = [[1] * (width - gap) + [0] * gap for gap in gaps]
            inputs["attention_mask"] = torch.tensor(mask, device=self.device)
        places = torch.tensor([[p.index(self.mask_id)] for p in prompts], device=self.device)
        targets = torch.tensor([answer[:1] for answer in answers], device=self.device)
        return Rows(inputs, places, targets, torch.ones_like(targets, dtype=torch.float32))

    def _answer_logits(self, rows: Rows) -> Tensor:
        with self._head_on(rows.positions):
            logits = self.model(**rows.inputs).logits
        if logits.shape[1] == 1:
            return logits.float()
        index = torch.arange(len(logits), device=logits.device).unsqueeze(1)
        return logits[index, rows.positions].float()

    @contextmanager
    def _head_on(self, positions: Tensor) -> Iterator[None]:
        """The model's head sees the encoder's output at these positions alone."""
        model = base_model(self.model)
        encoder = model.base_model
        if encoder is model:
            yield
            return

        def pick(module: Any, args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            index = torch.arange(len(hidden), device=hidden.device).unsqueeze(1)
            output.last_hidden_state = hidden[index, positions]
            return output

        handle = encoder.register_forward_hook(pick)
        try:
            yield
        finally:
            handle.remove()
