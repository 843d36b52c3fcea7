"""The benchmark of memory: what it counts, its cases, its tables."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from torch import nn

from bench.training import hybrid_memory
from bench.training.hybrid_memory import Case, Memory


def test_saved_are_activations_but_not_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))
    x = torch.randn(3, 4)
    saved = hybrid_memory.Saved(model)
    saved.watch(lambda: model(x).sum())()
    assert saved.most == 4 * (3 * 4 + 3 * 8)  # the input and tanh's output, once
    with torch.no_grad():
        nothing = hybrid_memory.Saved(model)
        nothing.watch(lambda: model(x).sum())()
    assert nothing.most == 0


def test_cases_over_length_and_depth() -> None:
    options = argparse.Namespace(
        model="opt-125m", dtype="fp32", layers=None, loss="last",
        lengths=[64, 128], tokens=[128], depths=[6, 12],
    )  # fmt: skip
    lengths, depths = hybrid_memory.cases(options)
    at_64 = [case.method for case in lengths if case.tokens == 64]
    at_128 = [case.method for case in lengths if case.tokens == 128]
    assert at_64 == ["MeZO", "SGD"]
    assert at_128 == ["MeZO", "Hybrid 4", "Hybrid 8", "SGD", "AdamW"]
    assert {case.layers for case in lengths} == {12}
    assert [(case.method, case.layers) for case in depths] == [
        ("MeZO", 6), ("MeZO", 12), ("SGD", 6), ("SGD", 12),
    ]  # fmt: skip


def test_tables_of_given_numbers() -> None:
    def case(method: str, layers: int, tokens: int) -> Case:
        return Case(method, "opt-125m", "fp32", layers, tokens, "last")

    lengths = {
        case("MeZO", 12, 64): Memory(501_000_000, 900_000_000, 909_000_000, 0),
        case("MeZO", 12, 128): Memory(501_000_000, 900_000_000, 912_000_000, 0),
        case("Hybrid 4", 12, 128): Memory(501_000_000, 900_000_000, 1_900_000_000, 58_400_000),
    }
    lines = list(hybrid_memory.markdown(lengths, {case("MeZO", 6, 128): Memory(1, 2, 3, 4)}))
    assert "| tokens | MeZO | Hybrid, 4 of 12 layers ZO |" in lines
    assert "| 64 | 909 |  |" in lines  # the peak
    assert "| 128 | 12 | 1000 |" in lines  # beyond what was there
    assert "| 128 | 0 | 58 |" in lines  # saved
    assert "| layers | MeZO |" in lines
    assert "(weights: 501 MB;" in "\n".join(lines)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.md"
    sizes = ["--layers", "3", "--lengths", "8", "--tokens", "8", "--depths"]
    hybrid_memory.main(["--model", "opt-tiny", *sizes, "--out", str(out)])
    text = out.read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| tokens | MeZO | Hybrid, 1 of 3 layers ZO | Hybrid, 2 of 3 layers ZO | SGD |" in text
    assert "torch " + torch.__version__ in text
    assert "Over the depth" not in text
