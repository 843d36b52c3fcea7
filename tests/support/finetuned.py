"""Runs of ``zo-fused finetune`` on a tiny random model: what they are made of, what they leave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.tiny_models import opt_tokenizer

from zo_fused.task.scoring import Scorer

TEXTS = {"negative": ["It was bad .", "a dull film"], "positive": ["It was fun .", "a warm film"]}


def write_base(directory: Path) -> Path:
    """A model directory: two layers of random OPT and a byte-level tokenizer."""
    corpus = [" great terrible It was"] * 9
    opt_tokenizer(corpus, vocab_size=320).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=320,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.OPTForCausalLM(config).save_pretrained(directory)
    return directory


def write_data(directory: Path) -> Path:
    """A data directory with all splits and a task."""
    lines = [
        json.dumps({"text": text, "label": label}) for label in TEXTS for text in TEXTS[label] * 3
    ]
    for split in ("train", "dev", "test"):
        (directory / f"{split}.jsonl").write_text("\n".join(lines))
    verbalizer = {"negative": " terrible", "positive": " great"}
    task = {"template": "{text} It was", "verbalizer": verbalizer}
    (directory / "task.json").write_text(json.dumps(task))
    return directory


def words_of(base: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a short run; later ones win."""
    words = f"finetune --model {base} --train {data} --output {output} --device cpu --steps 6"
    return [*words.split(), "--batch-size", "4", "--eval-steps", "3", "--lr", "1e-3", *more]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(history: Path) -> list[str]:
    """The lines of a history, with all digits but for seconds, which no two runs share."""
    entries = read(history)
    for entry in entries:
        entry.pop("seconds", None)
    return [json.dumps(entry) for entry in entries]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, log, history and the names of files."""
    tuned = [path.name for path in one.glob("*.safetensors")]
    assert tuned
    for name in tuned:
        assert_equal(load_file(one / name), load_file(other / name))
    assert (one / "replay.jsonl").read_bytes() == (other / "replay.jsonl").read_bytes()
    assert without_times(one / "history.jsonl") == without_times(other / "history.jsonl")
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}


class Stop:
    """Makes a scorer's loss raise at its n-th call."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], Any]
    ) -> None:
        original = Scorer.loss
        self.calls = 0

        def loss(scorer: Scorer, batch: Any, kind: str = "classification") -> torch.Tensor:
            self.calls += 1
            if self.calls == call:
                action()
            return original(scorer, batch, kind)

        monkeypatch.setattr(Scorer, "loss", loss)
