"""Time of scoring candidates of several tokens, with prompts that are read once:
``python -m bench.cpu.shared_prompts --out FILE.md``.

On the embedded model, with random tokens in the sizes of tasks. All ways take turns. A candidate a
row is the definition; one row for all candidates of a prompt is what `Scorer` does; a cache of the
prompt's keys and values, then a row for each candidate, is what generation libraries do. Medians of
CPU time on one thread, which other work on the machine hardly moves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.page import publish
from zo_fused.cli.defaults import EMBEDDED_MODEL
from zo_fused.task.encoding import Encoded
from zo_fused.task.models import load_model
from zo_fused.task.scoring import Scorer

# What: examples in a batch, tokens of a prompt, candidates, their tokens. The model takes 256.
SIZES = {
    "two words of two tokens": (16, 32, 2, 2),
    "COPA": (16, 12, 2, 8),
    "WinoGrande": (16, 20, 2, 6),
    "five choices": (16, 64, 5, 4),
    "ReCoRD, short": (4, 200, 12, 12),
}


def made_up(size: tuple[int, int, int, int], vocabulary: int) -> list[Encoded]:
    """Examples of random tokens; prompts differ in length by up to a quarter."""
    count, length, candidates, tokens = size
    generator = torch.Generator().manual_seed(0)

    def ids(number: int) -> list[int]:
        return torch.randint(3, vocabulary, (number,), generator=generator).tolist()

    return [
        Encoded(
            ids(length - index % (length // 4)), 0, tuple(ids(tokens) for _ in range(candidates))
        )
        for index in range(count)
    ]


def with_a_cache(model: Any, examples: list[Encoded], pad_id: int) -> Tensor:
    """Scores by two forward passes: over the prompts, then over the candidates behind a cache.

    For candidates of equally many tokens.
    """
    count = len(examples[0].answers)
    width = max(len(example.prompt) for example in examples)
    gaps = [width - len(example.prompt) for example in examples]
    pairs = list(zip(examples, gaps, strict=True))
    ids = torch.tensor([[pad_id] * gap + example.prompt for example, gap in pairs])
    mask = torch.tensor([[0] * gap + [1] * len(example.prompt) for example, gap in pairs])
    numbers = (mask.cumsum(-1) - 1).clamp_min(0)
    known = {"attention_mask": mask, "position_ids": numbers}
    out = model(input_ids=ids, **known, use_cache=True, logits_to_keep=1)
    answers = torch.tensor([answer for example in examples for answer in example.answers])
    cache, span = out.past_key_values, answers.shape[1]
    cache.batch_repeat_interleave(count)
    longer = torch.ones(len(answers), span - 1, dtype=torch.int64)
    rest = model(
        input_ids=answers[:, :-1],
        attention_mask=torch.cat([mask.repeat_interleave(count, 0), longer], 1),
        position_ids=numbers[:, -1:].repeat_interleave(count, 0) + longer.cumsum(-1),
        past_key_values=cache,
    )
    logits = torch.cat([out.logits.repeat_interleave(count, 0), rest.logits], 1).float()
    chosen = logits.gather(-1, answers.unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).mean(-1).view(len(examples), count)


@torch.no_grad()
def times(model: Any, size: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    """Seconds of each way, from token ids to scores.

    Raises:
        AssertionError: the ways differ by more than float32 sums in another order do.
    """
    examples = made_up(size, model.config.vocab_size)
    apart, together = (Scorer(model, [], 1, share_prompt=share) for share in (False, True))
    if not together.packed:
        raise AssertionError("the embedded model takes no rows of several candidates")
    ways: dict[str, Callable[[], Tensor]] = {
        "a row each": lambda: apart.scores(apart.batch(examples)),
        "one row": lambda: together.scores(together.batch(examples)),
        "a cache": lambda: with_a_cache(model, examples, 1),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, Tensor] = {}
    for _ in range(repeats + 1):  # the first is a warm-up
        for way, scores in ways.items():
            start = time.process_time()
            found[way] = scores()
            seconds[way].append(time.process_time() - start)
    for scores in found.values():
        # sums of at most 2000 terms (the vocabulary), scores of the size of 10
        torch.testing.assert_close(scores, found["a row each"], rtol=0, atol=5e-5)
    return {way: statistics.median(taken[1:]) for way, taken in seconds.items()}


def rows(repeats: int, sizes: dict[str, tuple[int, int, int, int]] = SIZES) -> Iterator[str]:
    """Lines of the table."""
    model = load_model(str(EMBEDDED_MODEL), "float32", torch.device("cpu"))
    yield (
        "| | examples | prompt | candidates | tokens of each | a row each, ms | one row | a cache |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, size in sizes.items():
        found = times(model, size, repeats)
        apart = found["a row each"]
        ratios = (f"{apart / found[way]:.2f} times" for way in ("one row", "a cache"))
        yield "| " + " | ".join([name, *map(str, size), f"{1000 * apart:.1f}", *ratios]) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Prompts read once\n",
        "How to read it: [bench/README.md](../README.md). Ratios are of the time with a row for "
        "each candidate.\n",
        f"`python -m bench.cpu.shared_prompts --repeats {options.repeats}`\n",
        "  \n".join([*machine.of_cpu(), f"load at the start: {os.getloadavg()[0]:.1f}"]) + "\n",
    ]
    publish([*lines, *rows(options.repeats)], options.out)


if __name__ == "__main__":
    main()
