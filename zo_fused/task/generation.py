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
    prompts: Sequence[Tokens],
    count: int,
    next_tokens: Callable[[list[Tokens]], list[int]],
    ended: Callable[[Tokens], bool] = lambda made: False,
) -> list[Tokens]:
    """The most likely continuations of prompts.

    Args:
        count: tokens of each, at most; as many forward passes, each over the whole text.
        next_tokens: the most likely token after each text.
        ended: whether a continuation needs no more tokens; once all have, none are added.
    """
    made: list[Tokens] = [[] for _ in prompts]
    for _ in range(count):
        texts = [[*prompt, *more] for prompt, more in zip(prompts, made, strict=True)]
        for more, token in zip(made, next_tokens(texts), strict=True):
            more.append(token)
        if all(map(ended, made)):
            break
    return made
