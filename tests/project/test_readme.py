"""The README's and docs' Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def programs(path: Path) -> list[str]:
    """A page's blocks. Those of a tutorial, which is read from its top, are one program."""
    blocks = re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    return ["\n".join(blocks)] if path.parent.name == "tutorials" else blocks


BLOCKS = [
    pytest.param(block, id=f"{path.name}-{i}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for i, block in enumerate(programs(path))
]


# No GPU; TRL and peft.
@pytest.mark.filterwarnings("ignore:'pin_memory'", "ignore:.(is_)?gradient_checkpointing")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.usefixtures("no_hub")
def test_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchao", "trl"):  # in no extra; in one that few need
        if package in block:
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "__main__"})


def test_the_first_example_tunes_and_saves(
    no_hub: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len([line for line in block.splitlines() if line and line[0] != "#"]) <= 19
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("lr=1e-6", "lr=1e-4"), "example", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    assert (tmp_path / "tuned" / "tokenizer.json").is_file()


def test_there_are_examples() -> None:
    assert BLOCKS


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=str
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
