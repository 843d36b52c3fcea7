"""The scripts in examples/recipes run as they stand, and tune."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import transformers

import zo_fused

RECIPES = sorted((Path(__file__).parents[2] / "examples/recipes").glob("*.py"))
EMBEDDED = Path(zo_fused.__file__).parent / "embedded/model"
TEXTS = ["a gripping film. It was great", "two dull hours. It was terrible"]


def loss(directory: Path) -> float:
    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    with torch.no_grad():
        return float(model(**batch, labels=labels).loss)


@pytest.mark.filterwarnings("ignore")  # of Lightning, TRL and transformers, about small machines
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_tunes(
    recipe: Path, no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("lightning", "trl"):
        if f"import {package}" in (text := recipe.read_text()) or f"from {package}" in text:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    bold = text.replace("lr=1e-6", "lr=3e-5").replace("learning_rate=1e-6", "learning_rate=3e-5")
    assert bold != text
    exec(compile(bold, str(recipe), "exec"), {"__name__": "__main__"})
    assert loss(tmp_path / "tuned") < loss(EMBEDDED)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_short(recipe: Path) -> None:
    """As the README says: without the docstring, comments and blank lines."""
    text = recipe.read_text()
    lines = text.splitlines()[ast.parse(text).body[0].end_lineno :]
    assert len([line for line in lines if line.strip() and not line.startswith("#")]) < 25


def test_there_are_recipes() -> None:
    names = ["accelerate_loop", "lightning_manual", "plain_loop", "sft", "trainer"]
    assert [path.stem for path in RECIPES] == names
