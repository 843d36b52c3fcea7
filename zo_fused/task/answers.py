"""How right a generated text is, as SQuAD (arXiv 1606.05250, section 6.1) and MeZO measure it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal(text: str) -> list[str]:
    """The words of an answer: small letters, no ASCII punctuation, no a, an and the."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(text: str, right: Sequence[str]) -> float:
    """1 if the text has the words of one of the right answers, else 0."""
    return float(any(normal(text) == normal(answer) for answer in right))


def f1(text: str, right: Sequence[str]) -> float:
    """2 P R / (P + R) of the words in common, in any order, with the best of the right answers.

    0 where nothing is in common, so also where text and answer have no words at all.
    """
    words, best = normal(text), 0.0
    for answer in right:
        others = normal(answer)
        common = sum((Counter(words) & Counter(others)).values())
        if common:
            best = max(best, 2 * common / (len(words) + len(others)))
    return best


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {"exact-match": exact_match, "f1": f1}
