"""Writes a task for the embedded model: `{train,dev,test}.jsonl` and `task.json`.

The texts come from the grammar beside this script.  A part of the skeletons and a third of the
opinion words and phrases never occur in the training set, and no text occurs twice in the three
files.  With `--corpus FILE` the unlabelled pre-training corpus is written as well, one document
per line.

`--task sentiment` is the embedded task: one opinion, two labels.  `--task opinions` is harder, for
benchmarks: longer texts with two opinions between sentences that have none, and four labels, for
which all opinions must be read and told from each other.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from grammar import (
    DOMAINS,
    EVAL_SKELETONS,
    LABELS,
    SHARED_SKELETONS,
    TRAIN_SKELETONS,
    Filler,
    fill,
    neutral_sentence,
    pretraining_document,
)
from tqdm import tqdm

EMBEDDED = Path(__file__).resolve().parents[2] / "zo_fused" / "embedded"
TASKS = {
    "sentiment": {
        "template": "{text} It was",
        "verbalizer": {"negative": " terrible", "positive": " great"},
        "description": "Sentiment of short reviews (negative or positive), made by a grammar.",
    },
    "opinions": {
        "template": "{text} It was",
        "verbalizer": {
            "negative": " terrible",
            "positive": " great",
            "mixed": " enough",
            "none": " over",
        },
        "description": "Longer reviews with two opinions (both negative, both positive, one of "
        "each) or none, made by a grammar.",
    },
}
OPINIONS = {"negative": (0, 0), "positive": (1, 1), "mixed": (0, 1), "none": ()}


def sentiment(name: str, skeletons: list[str], rng: Random, held_out: bool) -> str:
    """A short review of a label."""
    return fill(rng.choice(skeletons), LABELS.index(name), rng, held_out)


def opinions(name: str, skeletons: list[str], rng: Random, held_out: bool) -> str:
    """A review of a label, with an opinion a skeleton and sentences without one around them."""
    domain = DOMAINS[rng.choice(sorted(DOMAINS))]
    labels = list(OPINIONS[name])
    rng.shuffle(labels)
    fillers = [Filler(domain, label, rng, held_out) for label in labels]
    about = Filler(domain, 0, rng)
    for filler in fillers:
        filler.thing = about.thing
    parts = [f.text(rng.choice(skeletons)) for f in fillers]
    for _ in range(rng.randint(1, 2) if parts else rng.randint(3, 5)):
        aside = neutral_sentence(rng) if rng.random() < 0.5 else about.text("{intro}.")
        if aside not in parts:
            parts.insert(rng.randint(0, len(parts)), aside)
    return " ".join(parts)


MAKERS = {"sentiment": sentiment, "opinions": opinions}


def labelled_texts(
    task: str, skeletons: list[str], size: int, rng: Random, seen: set[str], held_out: bool
) -> list[dict]:
    """`size` shuffled examples, as many of each label, with no text that is in `seen`."""
    examples = []
    names = list(TASKS[task]["verbalizer"])
    for name in names:
        wanted = len(examples) + size // len(names)
        while len(examples) < wanted:
            text = MAKERS[task](name, skeletons, rng, held_out)
            if text.lower() not in seen:
                seen.add(text.lower())
                examples.append({"text": text, "label": name})
    rng.shuffle(examples)
    return examples


def make_splits(task: str, sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """The three labelled sets; dev and test also use the held-out skeletons and words."""
    rng, seen = Random(seed), set()
    splits = {}
    for split, size in sizes.items():
        extra = TRAIN_SKELETONS if split == "train" else 2 * EVAL_SKELETONS
        splits[split] = labelled_texts(
            task, SHARED_SKELETONS + extra, size, rng, seen, held_out=split != "train"
        )
    return splits


def read_texts(folder: Path = EMBEDDED / "data") -> set[str]:
    """All labelled texts, in lower case."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    return {json.loads(line)["text"].lower() for line in lines}


def contains_any(document: str, texts: set[str]) -> bool:
    """Whether a run of whole sentences of the document is one of the (lower-case) texts."""
    sentences = document.lower().replace("? ", "?|").replace("! ", "!|").replace(". ", ".|")
    sentences = sentences.split("|")
    spans = ((i, j) for i in range(len(sentences)) for j in range(i, min(i + 4, len(sentences))))
    return any(" ".join(sentences[i : j + 1]) in texts for i, j in spans)


def pretraining_corpus(
    excluded: set[str], seed: int, prompt_share: float = 0.08, agreement: float = 0.55
) -> Iterator[str]:
    """Endless unlabelled documents, none of which contains an excluded text."""
    rng = Random(seed)
    while True:
        document = pretraining_document(rng, prompt_share, agreement)
        if not contains_any(document, excluded):
            yield document


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="sentiment")
    parser.add_argument("--out", type=Path, default=EMBEDDED / "data")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--dev", type=int, default=500)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--corpus", type=Path, help="also write the pre-training corpus here")
    parser.add_argument("--documents", type=int, default=120000, help="documents of the corpus")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    sizes = {"train": args.train, "dev": args.dev, "test": args.test}
    for split, examples in make_splits(args.task, sizes, args.seed).items():
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (args.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(examples)} examples")
    task = json.dumps(TASKS[args.task], indent=2, ensure_ascii=False) + "\n"
    (args.out / "task.json").write_text(task, encoding="utf-8")

    if args.corpus:
        documents = islice(pretraining_corpus(read_texts(args.out), args.seed + 1), args.documents)
        with args.corpus.open("w", encoding="utf-8") as file:
            for document in tqdm(documents, total=args.documents, unit="doc"):
                file.write(document + "\n")


if __name__ == "__main__":
    main()
