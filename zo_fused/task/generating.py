"""Questions without candidates (SQuAD, DROP): the model writes the answer.

As in MeZO (arXiv 2305.17333): training minimises the token-mean negative log-likelihood of a right
answer ("lm"), or minus F1 or exact match of what the model writes greedily ("f1", "exact-match":
section 3.3), which have no derivative. Evaluation is by F1 and exact match of greedy generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_fused.task.adapters import virtual_tokens
from zo_fused.task.answers import SCORES
from zo_fused.task.encoding import Encoded, Tokens
from zo_fused.task.generation import greedy
from zo_fused.task.scoring import Batch, Quality, Scorer


class GenerationScorer(Scorer):
    """Scores what a causal language model writes.

    A text ends before the first of `stops`, at eos, or after `max_new_tokens`.

    Args:
        model, pad_id: as in `Scorer`.
        tokenizer: of transformers.
        stops: texts that end an answer.
        max_new_tokens: of an answer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, pad_id: int, stops: Sequence[str], max_new_tokens: int
    ) -> None:
        super().__init__(model, [], pad_id)
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.max_new_tokens = max_new_tokens
        # a model that numbers padded tokens as it is told also takes them one at a time
        self.caches = self.padding_side == "left" and {"past_key_values", "use_cache"} <= set(
            self.accepted
        )
        if virtual_tokens(model):  # of an adapter: they are in the cache already
            self.caches = False

    def write(self, prompts: Sequence[Tokens]) -> list[str]:
        """The answers, without spaces around them."""
        if self.caches:
            made = self._with_cache(prompts)
        else:
            made = greedy(prompts, self.max_new_tokens, self._next_tokens, self._ended)
        return [self._cut(self._text(ids)).strip() for ids in made]

    @torch.no_grad()
    def _with_cache(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """As `greedy` does, but each token goes through the model once."""
        inputs = self._rows(prompts, [[0]] * len(prompts)).inputs
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        made: list[Tokens] = [[] for _ in prompts]
        keep = {"logits_to_keep": 1} if "logits_to_keep" in self.accepted else {}
        cache = None
        for _ in range(self.max_new_tokens):
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                **keep,
            )
            cache = out.past_key_values
            ids = out.logits[:, -1:].float().argmax(-1)
            for text, (token,) in zip(made, ids.tolist(), strict=True):
                text.append(token)
            if all(map(self._ended, made)):
                break
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
        return made

    def _text(self, ids: Tokens) -> str:
        eos = self.tokenizer.eos_token_id
        return self.tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids)

    def _cut(self, text: str) -> str:
        return text[: min([text.find(s) for s in self.stops if s in text], default=len(text))]

    def _ended(self, ids: Tokens) -> bool:
        if self.tokenizer.eos_token_id in ids:
            return True
        text = self._text(ids)
        return any(stop in text for stop in self.stops)

    def batch(self, examples: Sequence[Encoded], loss: str = "lm") -> Batch:
        """As `Scorer.batch`, for the losses "lm", "exact-match" and "f1".

        Raises:
            ValueError: another loss, which needs candidates.
        """
        if loss not in ("lm", *SCORES):
            raise ValueError(f'there are no candidates for the loss "{loss}"')
        batch = super().batch(examples, loss)
        texts = [example.texts for example in examples]
        return Batch(batch.rows, batch.labels, batch.kind, prompts=batch.prompts, texts=texts)

    def _generated_score(self, batch: Batch, kind: str) -> Tensor:
        """The mean score of the written answers."""
        made = self.write(batch.prompts)
        scores = [SCORES[kind](text, of) for text, of in zip(made, batch.texts, strict=True)]
        return torch.tensor(scores, device=self.device).mean()

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Quality:
        """How well the examples are answered: the accuracy is the share of exact matches.

        Examples of similar length share a batch, to pad less.
        """
        right = f1 = loss = tokens = 0.0
        for part in self._parts(examples, batch_size):
            likely = self.batch(part, "lm")
            count = float(likely.rows.mask.sum())
            loss += float(self.loss(likely, "lm")) * count
            tokens += count
            for text, example in zip(self.write([e.prompt for e in part]), part, strict=True):
                right += SCORES["exact-match"](text, example.texts)
                f1 += SCORES["f1"](text, example.texts)
        return Quality(right / len(examples), loss / tokens, f1 / len(examples))
