"""Which examples a run trains on and which judge it: drawn by seed, as MeZO's code draws them.

The draws are those of `numpy.random.RandomState`, whose streams NumPy has frozen: from a data set
whose rows are in the order that MeZO had, they are MeZO's examples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from zo_fused.task.errors import UserError, warn

K_SHOT_TEST_SEED = 42  # of MeZO's tools/generate_k_shot_data.py, whatever the seed of the rest


@dataclass(frozen=True)
class Draw:
    """How many examples to draw. None: all of them, and no dev examples out of the training set."""

    train: int | None = None
    dev: int | None = None
    test: int | None = None
    k: int | None = None  # examples of each class, for train and again for dev
    seed: int = 0


Places = list[tuple[str, int]]  # the set that an example is in, and its number there


def drawn(
    sizes: Mapping[str, int], wanted: Draw, label_of: Callable[[int], Hashable]
) -> dict[str, Places]:
    """Examples of train, dev and test, without any twice.

    With `k`, the first k of each class in a shuffled training set are for train, and the next k for
    dev (MeZO with RoBERTa, after LM-BFF). Else train and dev are the first of a shuffled training
    set, dev being the end of them (MeZO with OPT). Where there is a dev set, dev comes from that.
    Test comes from the test set.

    Args:
        sizes: of the sets "train", and perhaps "dev" and "test".
        label_of: the class of an example of the training set; asked for `k` alone.

    Raises:
        UserError: the training set is too small to have a dev set drawn from it.
    """
    if wanted == Draw(seed=wanted.seed):
        return {split: [(split, i) for i in range(size)] for split, size in sizes.items()}
    if wanted.k is not None:
        places = _of_each_class(sizes["train"], wanted.k, wanted.seed, label_of)
    else:
        places = _in_a_row(sizes, wanted)
    for split, seed in (
        ("dev", wanted.seed),
        ("test", wanted.seed if wanted.k is None else K_SHOT_TEST_SEED),
    ):
        if split in sizes:
            count = wanted.dev if split == "dev" else wanted.test
            places[split] = [(split, i) for i in shuffled(sizes[split], seed)[:count]]
    return places


def shuffled(size: int, seed: int) -> list[int]:
    """The numbers below `size` in the order that `numpy.random.shuffle` puts them in."""
    order: list[int] = np.random.RandomState(seed).permutation(size).tolist()
    return order


def _in_a_row(sizes: Mapping[str, int], wanted: Draw) -> dict[str, Places]:
    order = [("train", i) for i in shuffled(sizes["train"], wanted.seed)]
    if "dev" in sizes or not wanted.dev:
        return {"train": order[: wanted.train]}
    both = order[: None if wanted.train is None else wanted.train + wanted.dev]
    if len(both) <= wanted.dev:
        raise UserError(
            f"the training set has {len(both)} examples, of which --dev-examples {wanted.dev} "
            "leaves none to train on"
        )
    return {"train": both[: -wanted.dev], "dev": both[-wanted.dev :]}


def _of_each_class(
    size: int, k: int, seed: int, label_of: Callable[[int], Hashable]
) -> dict[str, Places]:
    classes: dict[Hashable, Places] = {}
    for i in shuffled(size, seed):
        classes.setdefault(label_of(i), []).append(("train", i))
    for label, places in classes.items():
        if len(places) < 2 * k:
            warn(
                f"the class {label!r} has {len(places)} examples: {min(k, len(places))} are for "
                f"train, {max(0, len(places) - k)} for dev, instead of {k} each"
            )
    return {
        "train": [place for places in classes.values() for place in places[:k]],
        "dev": [place for places in classes.values() for place in places[k : 2 * k]],
    }
