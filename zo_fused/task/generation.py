"""Greedy generations of answers, and how right they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from zo_fused.task.encoding import Tokens


def exact_match(generated: Tokens, right: Tokens) -> float:
    """1 if all tokens are the right ones, else 0."""
    return float(list(generated) == list(right))


def f1(generated: Tokens, right: Tokens) -> float:
    """2 P R / (P + R) of the tokens in common, in any order (arXiv 1606.05250, section 6.1)."""
    common = sum((Counter(generated) & Counter(right)).values())
    return 2 * common / (len(generated) + len(right))


SCORES = {"exact-match": exact_match, "f1": f1}


def greedy(
    prompts: Sequence[Tokens], count: int, next_tokens: Callable[[list[Tokens]], list[int]]
) -> list[Tokens]:
    """The most likely continuations of prompts.

    Args:
        count: tokens of each; as many forward passes, each over the whole text.
        next_tokens: the most likely token after each text.
    """
    texts = [list(prompt) for prompt in prompts]
    for _ in range(count):
        picked = next_tokens(texts)
        texts = [[*text, token] for text, token in zip(texts, picked, strict=True)]
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
