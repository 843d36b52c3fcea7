"""Writes the embedded sentiment task: `zo_fused/embedded/data/{train,dev,test}.jsonl`.

The texts come from the grammar beside this script.  A part of the skeletons and a third of the
opinion words and phrases never occur in the training set, and no text occurs twice in the three
files.  With `--corpus FILE` the unlabelled pre-training corpus is written as well, one document
per line.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

from grammar import (
    EVAL_SKELETONS,
    LABELS,
    SHARED_SKELETONS,
    TRAIN_SKELETONS,
    fill,
    pretraining_document,
)
from tqdm import tqdm

EMBEDDED = Path(__file__).resolve().parents[2] / "zo_fused" / "embedded"
TASK = {
    "template": "{text} It was",
    "verbalizer": {"negative": " terrible", "positive": " great"},
    "description": "Sentiment of short reviews (negative or positive), made by a grammar.",
}


def labelled_texts(
    skeletons: list[str], size: int, rng: Random, seen: set[str], held_out: bool
) -> list[dict]:
    """`size` shuffled examples, half of each label, with no text that is in `seen`."""
    examples = []
    for label, name in enumerate(LABELS):
        wanted = len(examples) + size // 2
        while len(examples) < wanted:
            text = fill(rng.choice(skeletons), label, rng, held_out)
            if text.lower() not in seen:
                seen.add(text.lower())
                examples.append({"text": text, "label": name})
    rng.shuffle(examples)
    return examples


def make_splits(sizes: dict[str, int], seed: int) -> dict[str, list[dict]]:
    """The three labelled sets; dev and test also use the held-out skeletons and words."""
    rng, seen = Random(seed), set()
    splits = {}
    for split, size in sizes.items():
        extra = TRAIN_SKELETONS if split == "train" else 2 * EVAL_SKELETONS
        splits[split] = labelled_texts(
            SHARED_SKELETONS + extra, size, rng, seen, held_out=split != "train"
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
    for split, examples in make_splits(sizes, args.seed).items():
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (args.out / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{split}: {len(examples)} examples")
    task = json.dumps(TASK, indent=2, ensure_ascii=False) + "\n"
    (args.out / "task.json").write_text(task, encoding="utf-8")

    if args.corpus:
        documents = islice(pretraining_corpus(read_texts(args.out), args.seed + 1), args.documents)
        with args.corpus.open("w", encoding="utf-8") as file:
            for document in tqdm(documents, total=args.documents, unit="doc"):
                file.write(document + "\n")


if __name__ == "__main__":
    main()
