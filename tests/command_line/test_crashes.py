"""Runs that are killed at every file event, at random ones and at random times, and that find the
disk full, end in the bits of a run that nothing disturbed. Each test is some hundred runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from support.crashes import wrong_of

from zo_fused.methods.table import recipes

pytestmark = pytest.mark.slow

DEFERRED = "--method lozo --schedule deferred --dtype bfloat16"
FACTORED = "--method lozo --schedule factored --interval 2 --dtype float16 --lr-scheduler cosine"
ADAM = "--method zo-adam --schedule deferred --dtype bfloat16"


def run(base: Path, data: Path, more: str) -> list[str]:
    """Five steps, with checkpoints after the second and the fourth."""
    words = f"finetune --model {base} --train {data} --device cpu --steps 5 --batch-size 2"
    return [*words.split(), "--eval-steps", "2", "--lr", "1e-3", *more.split()]


@pytest.mark.parametrize("part", range(2))
def test_killed_at_every_file_event(base: Path, data: Path, tmp_path: Path, part: int) -> None:
    assert wrong_of("deaths", tmp_path, [run(base, data, DEFERRED)], first=part, apart=2) == []


def test_killed_and_without_a_checkpoint(base: Path, data: Path, tmp_path: Path) -> None:
    runs = [run(base, data, words) for words in (FACTORED, ADAM)]
    assert wrong_of("lost", tmp_path, runs, apart=11) == []


def test_killed_at_fifty_random_times(base: Path, data: Path, tmp_path: Path) -> None:
    assert wrong_of("instants", tmp_path, [run(base, data, FACTORED)], count=25) == []


def test_killed_five_times_in_a_row_with_every_method(
    base: Path, data: Path, tmp_path: Path
) -> None:
    dtypes = ("float16", "bfloat16", "float32")
    names = [name for name in recipes() if name != "qzo"]  # which needs torchao
    runs = [
        run(base, data, f"--method {name} --dtype {dtypes[i % 3]}") for i, name in enumerate(names)
    ]
    assert wrong_of("chains", tmp_path, runs, count=1) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_five_times_in_a_row_with_quantized_weights(
    base: Path, data: Path, tmp_path: Path, dtype: str
) -> None:
    pytest.importorskip("torchao")
    words = f"--method qzo --quantize int8 --dtype {dtype} --lr 1e-7 --eps 3e-5"
    assert wrong_of("chains", tmp_path, [run(base, data, words)], count=3) == []


def test_the_disk_is_full_from_an_event_on(base: Path, data: Path, tmp_path: Path) -> None:
    assert wrong_of("full", tmp_path, [run(base, data, DEFERRED)], apart=5) == []
