"""What tests of ``zo-fused finetune`` share: a tiny model, its data, and no network."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for new processes; this one has read it already
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(importlib.import_module(module), "HF_HUB_OFFLINE", True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, fresh_heap: None) -> None:
    """Without what takes half of a short run: a memory plan, and collecting garbage."""
    from zo_fused.task import run

    monkeypatch.setattr(run, "expected_memory", lambda *_: "untold")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.finetuned import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.finetuned import write_data

    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def arguments(base: Path, data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a short run; later ones win."""
    from support.finetuned import words_of

    def make(*more: str, output: Any = tmp_path / "out") -> list[str]:
        return words_of(base, data, output, *more)

    return make
