"""Scores of candidate answers, and the loss and prediction made of them.

As in MeZO (arXiv 2305.17333): an answer's score is the mean log-probability of its tokens after the
prompt, in float32 whatever the model's dtype. Training minimises the cross entropy over the
candidates' scores ("classification"), the token-mean negative log-likelihood of the right answer
("lm"), or the negative share of right predictions ("accuracy": MeZO, section 3.3; it has no
derivative), or minus a score of greedy generations ("exact-match", "f1", in `generation.py`;
they have none either). The prediction is the candidate with the highest score.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from zo_fused.task.adapters import base_model, prepended_logits, virtual_tokens
from zo_fused.task.encoding import Encoded, Tokens
from zo_fused.task.errors import UserError
from zo_fused.task.generation import SCORES, greedy
from zo_fused.task.rows import Rows, bears_left_padding, bears_packing, packed_rows

WITHOUT_DERIVATIVE = ("accuracy", *SCORES)
LOSSES = ("classification", "lm", *WITHOUT_DERIVATIVE)


@dataclass(frozen=True)
class Batch:
    """Examples ready for the model: `rows` answers them all, `labels` are the right answers."""

    rows: Rows
    labels: Tensor  # [examples]
    kind: str  # "shared": of single tokens, "candidates": of any, "right": see `lm`, "generated"
    counts: Sequence[int] = ()  # candidates of each example
    right: Tensor | None = None  # [examples, candidates] where an example has several right ones
    prompts: Sequence[Tokens] = ()  # where answers are generated token by token
    answers: Sequence[Tokens] = ()  # and what is right there, as tokens
    texts: Sequence[Sequence[str]] = ()  # or, where there are no candidates, as texts


class Quality(NamedTuple):
    """Of answers to many examples."""

    accuracy: float  # share of those whose right answer has the highest score
    loss: float  # mean cross entropy over the candidates' scores: the loss "classification"
    f1: float | None = None  # of answers that the model writes; the loss is then "lm"


class Scorer:
    """Scores answers with a causal language model.

    A prompt goes through the model once, whatever the number of its candidates: the same numbers as
    with a row for every candidate, for a fraction of the forward pass. Where all examples have the
    same answers and each is one token, a row is a prompt, and the candidates' log-probabilities are
    read off its last position. Other candidates lie behind their prompt, one after the other, and
    see the prompt and themselves (in models that bear it, see `bears_packing`; in others each has a
    row). Only the logits that are needed are computed, in models that can leave out the others.

    Args:
        model: of transformers or peft, or any module called as those are. Dropout should be off
            (``model.eval()``): it would only add noise to the two losses of a step.
        answers: token ids of each candidate; none where each example has its own.
        pad_id: any token id that the model has an embedding for.
        padding_side: "left", "right" or None: on the left where the model is known to number the
            tokens as it is told, so that fewer logits are computed; else on the right, which no
            token of a causal model sees.
        share_prompt: False gives every candidate its own row even if it is one token.
    """

    def __init__(
        self,
        model: Any,
        answers: Sequence[Tokens],
        pad_id: int,
        padding_side: str | None = None,
        share_prompt: bool = True,
    ) -> None:
        self.model = model
        self.answers = [list(ids) for ids in answers]
        self.pad_id = pad_id
        self.accepted = frozenset(inspect.signature(base_model(model).forward).parameters)
        self.prepended = prepended_logits(model)
        if virtual_tokens(model):  # the positions after them are for peft to number
            self.accepted -= {"position_ids"}
        left = "position_ids" in self.accepted and bears_left_padding(base_model(model))
        self.padding_side = padding_side or ("left" if left else "right")
        single = bool(self.answers) and all(len(ids) == 1 for ids in self.answers)
        self.shared = share_prompt and single
        # of each answer; on the device from the start, so that a loss waits for no copy
        fit = self.padding_side == "left" and "logits_to_keep" in self.accepted
        self.packed = share_prompt and fit and bears_packing(model)
        first = [ids[0] for ids in self.answers]
        self._first_tokens = torch.tensor(first, dtype=torch.int64, device=self.device)

    def check(self, examples: Sequence[Encoded]) -> None:
        """Refuses tokens that the model lacks, and a model whose scores would mean nothing.

        Raises:
            UserError: says which.
        """
        rows = getattr(base_model(self.model).get_input_embeddings(), "num_embeddings", None)
        texts = [ids for e in examples for ids in (e.prompt, *e.prompts, *e.answers)]
        highest = max(map(max, [*texts, *self.answers]))
        if rows is not None and highest >= rows:
            raise UserError(
                f"the tokenizer is not this model's: it makes the token {highest}, and the model "
                f"has embeddings for {rows}"
            )
        self._check_order(examples[0])

    def answers_of(self, example: Encoded) -> Sequence[Tokens]:
        """The candidates of an example."""
        return example.answers or self.answers

    @torch.no_grad()
    def _check_order(self, example: Encoded) -> None:
        """A text's last token must not change what the model says of those before it."""
        prompt, answers = example.prompt, self.answers_of(example)
        texts = [[*prompt[:16], answer[0]] for answer in (answers[0], answers[-1])]
        if texts[0] == texts[1]:
            texts[1][-1] = prompt[0]
        extra = {"use_cache": False} if "use_cache" in self.accepted else {}
        ids = torch.tensor(texts, device=self.device)
        one, other = base_model(self.model)(input_ids=ids, **extra).logits[:, :-1].float()
        # in 16 bits a few numbers may move, by rounding or where experts are chosen anew
        if (one - other).abs().median() > 0.03 * one.std():
            raise UserError(
                f"{type(base_model(self.model)).__name__} is no causal language model: what it "
                "says of a token depends on the tokens that follow, so it can't score answers"
            )

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(iter(self.model.parameters())).device

    def batch(self, examples: Sequence[Encoded], loss: str = "classification") -> Batch:
        """Examples as tensors on the model's device, for one loss or for predictions.

        With ``loss="lm"`` and answers of several tokens, only the right answers get rows; such a
        batch has no scores.
        """
        labels = torch.tensor([example.label for example in examples], device=self.device)
        prompts = [example.prompt for example in examples]
        if self.shared:
            # the answer's place, not its token, is what matters: `scores` reads all candidates
            return Batch(self._rows(prompts, [self.answers[0]] * len(prompts)), labels, "shared")
        answers = [self.answers_of(example) for example in examples]
        right = [of[example.label] for of, example in zip(answers, examples, strict=True)]
        if loss == "lm" or loss in SCORES:
            prompts = [e.prompts[e.label] if e.prompts else e.prompt for e in examples]
            if loss == "lm":
                return Batch(self._rows(prompts, right), labels, "right")
            rows = self._rows(prompts, [[0]] * len(prompts))
            return Batch(rows, labels, "generated", prompts=prompts, answers=right)
        counts = [len(of) for of in answers]
        if self.packed and not any(example.prompts for example in examples):
            rows = packed_rows(
                prompts, answers, self.pad_id, base_model(self.model).dtype, self.device
            )
        else:
            every = [
                prompt
                for example, count in zip(examples, counts, strict=True)
                for prompt in (example.prompts or [example.prompt] * count)
            ]
            rows = self._rows(every, [answer for of in answers for answer in of])
        return Batch(rows, labels, "candidates", counts, self._right(examples, max(counts)))

    def _right(self, examples: Sequence[Encoded], width: int) -> Tensor | None:
        if not any(example.right for example in examples):
            return None
        right = torch.zeros(len(examples), width, dtype=torch.bool)
        for row, example in zip(right, examples, strict=True):
            row[list(example.right or [example.label])] = True
        return right.to(self.device)

    def _rows(self, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> Rows:
        """Prompt and answer joined, without the answer's last token, which predicts nothing."""
        texts = [p + a[:-1] for p, a in zip(prompts, answers, strict=True)]
        width, span = max(map(len, texts)), max(map(len, answers))
        left = self.padding_side == "left"
        ids, mask, first = [], [], []
        for prompt, text in zip(prompts, texts, strict=True):
            gap = width - len(text)
            ids.append([self.pad_id] * gap + text if left else text + [self.pad_id] * gap)
            mask.append([0] * gap + [1] * len(text) if left else [1] * len(text) + [0] * gap)
            first.append(len(prompt) - 1 + (gap if left else 0))
        first = [self.prepended + f for f in first]
        needed = {f + k for f, a in zip(first, answers, strict=True) for k in range(len(a))}
        if "logits_to_keep" not in self.accepted:
            needed = set(range(self.prepended + width))
        kept = {position: index for index, position in enumerate(sorted(needed))}
        attention = torch.tensor(mask, device=self.device)
        inputs = {"input_ids": torch.tensor(ids, device=self.device)}
        if min(map(len, texts)) < width:
            inputs["attention_mask"] = attention
            if left:
                inputs["position_ids"] = (attention.cumsum(-1) - 1).clamp_min(0)
        if "logits_to_keep" in self.accepted:
            inputs["logits_to_keep"] = torch.tensor(list(kept), device=self.device)
        places = [
            [kept[f + min(k, len(a) - 1)] for k in range(span)]
            for f, a in zip(first, answers, strict=True)
        ]
        targets = [a + [0] * (span - len(a)) for a in answers]
        present = [[1.0] * len(a) + [0.0] * (span - len(a)) for a in answers]
        return Rows(
            {name: value for name, value in inputs.items() if name in self.accepted},
            torch.tensor(places, device=self.device),
            torch.tensor(targets, device=self.device),
            torch.tensor(present, device=self.device),
        )

    def _answer_logits(self, rows: Rows) -> Tensor:
        """Float32 logits [answers, tokens, vocabulary] at the positions that predict them."""
        extra = {"use_cache": False} if "use_cache" in self.accepted else {}
        logits = self.model(**rows.inputs, **extra).logits
        index = torch.arange(len(logits), device=logits.device) if rows.of is None else rows.of
        return logits[index.unsqueeze(1), rows.positions].float()

    def _answer_log_probs(self, rows: Rows) -> Tensor:
        """Log-probabilities [answers, tokens] of the answers' tokens; 0 at padding."""
        logits = self._answer_logits(rows)
        chosen = logits.gather(-1, rows.targets.unsqueeze(-1)).squeeze(-1)
        return (chosen - logits.logsumexp(-1)) * rows.mask

    def scores(self, batch: Batch) -> Tensor:
        """Mean log-probability of each candidate's tokens, float32 [examples, candidates].

        Where an example has fewer candidates than another, the rest is minus infinity.

        Raises:
            ValueError: the batch was made for the "lm" loss of right answers alone.
        """
        if batch.kind == "right":
            raise ValueError("a batch of right answers has no scores of the other candidates")
        if batch.kind == "shared":
            logits = self._answer_logits(batch.rows)[:, 0]
            return logits[:, self._first_tokens] - logits.logsumexp(-1, keepdim=True)
        means = self._answer_log_probs(batch.rows).sum(-1) / batch.rows.mask.sum(-1)
        if len(set(batch.counts)) == 1:
            return means.view(len(batch.labels), batch.counts[0])
        parts = means.split(list(batch.counts))
        return pad_sequence(parts, batch_first=True, padding_value=-torch.inf)

    def hits(self, batch: Batch, scores: Tensor) -> Tensor:
        """Whether the candidate with the highest score is right, bool [examples]."""
        picked = scores.argmax(-1)
        if batch.right is None:
            return picked == batch.labels
        return batch.right.gather(-1, picked.unsqueeze(-1)).squeeze(-1)

    def loss(self, batch: Batch, kind: str = "classification") -> Tensor:
        """The training loss, a float32 scalar.

        "classification" is the cross entropy over the candidates' scores; "lm" the mean negative
        log-likelihood of all tokens of the right answers; "accuracy" the negative share of right
        predictions. "exact-match" and "f1" are minus the mean score of what the model generates,
        greedily and from the whole vocabulary: as many tokens as the right answer has.
        """
        if kind in SCORES:
            return -self._generated_score(batch, kind)
        if kind == "classification":
            return F.cross_entropy(self.scores(batch), batch.labels)
        if kind == "accuracy":
            return -self.hits(batch, self.scores(batch)).float().mean()
        if batch.kind == "right":
            return -self._answer_log_probs(batch.rows).sum() / batch.rows.mask.sum()
        if batch.kind == "shared":
            return F.nll_loss(self.scores(batch), batch.labels)
        raise ValueError('the "lm" loss needs a batch made with loss="lm"')

    def _generated_score(self, batch: Batch, kind: str) -> Tensor:
        """The mean score of the generated answers: a forward pass for each token of the longest."""
        if batch.kind == "shared":
            right = [self.answers[label] for label in batch.labels.tolist()]
            made = [[token] for token in self._most_likely(batch.rows)]
        elif batch.kind == "generated":
            right = list(batch.answers)
            made = greedy(batch.prompts, max(map(len, right)), self._next_tokens)
        else:
            raise ValueError(f'the "{kind}" loss needs a batch made with loss="{kind}"')
        scores = [SCORES[kind](m[: len(r)], r) for m, r in zip(made, right, strict=True)]
        return torch.tensor(scores, device=self.device).mean()

    def _next_tokens(self, texts: list[Tokens]) -> list[int]:
        return self._most_likely(self._rows(texts, [[0]] * len(texts)))

    def _most_likely(self, rows: Rows) -> list[int]:
        tokens: list[int] = self._answer_logits(rows)[:, 0].argmax(-1).tolist()
        return tokens

    def mean_loss(self, batches: Sequence[Batch], kind: str = "classification") -> Tensor:
        """The loss of a batch that comes in parts, one forward pass after the other.

        The parts count as they do in the whole: by their examples or, in a loss over tokens, by
        their tokens.
        """
        if len(batches) == 1:
            return self.loss(batches[0], kind)
        counts = [
            batch.rows.mask.sum() if batch.kind == "right" else len(batch.labels)
            for batch in batches
        ]
        losses = [self.loss(batch, kind) * n for batch, n in zip(batches, counts, strict=True)]
        total: Tensor = sum(losses[1:], losses[0]) / sum(counts)
        return total

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Encoded], batch_size: int) -> Quality:
        """How well the examples are answered.

        Examples of similar length share a batch, to pad less. Where examples have their own
        candidates, of which there may be dozens, a batch has at most `batch_size` of those, too, or
        it is one example.
        """
        right, loss = 0, 0.0
        for part in self._parts(examples, batch_size):
            batch = self.batch(part)
            scores = self.scores(batch)
            right += int(self.hits(batch, scores).sum())
            loss += float(F.cross_entropy(scores, batch.labels, reduction="sum"))
        return Quality(right / len(examples), loss / len(examples))

    def _parts(self, examples: Sequence[Encoded], batch_size: int) -> list[list[Encoded]]:
        parts: list[list[Encoded]] = [[]]
        rows = 0
        for example in sorted(examples, key=lambda example: len(example.prompt)):
            rows += max(1, len(example.answers))
            if parts[-1] and rows > batch_size:
                parts.append([])
                rows = max(1, len(example.answers))
            parts[-1].append(example)
        return parts
