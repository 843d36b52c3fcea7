"""What an interrupted run goes on from: ``checkpoint-<step>/`` in its directory, a checkpoint of
transformers' Trainer, which is a model directory, too, with the run's settings beside it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from zo_fused.task.errors import UserError, first_line

SETTINGS = "settings.json"


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_checkpoints(run: Path, keep: Path | None = None) -> None:
    """Deletes the run's checkpoints, finished or not, but for one."""
    for path in run.glob("checkpoint-*"):
        if path != keep and re.fullmatch(r"checkpoint-\d+(\.tmp)?", path.name):
            shutil.rmtree(path)


def load_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The optimizer's state and the run's settings.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        optimizer = torch.load(path / "optimizer.pt", weights_only=True)
        settings, state = (
            json.loads((path / name).read_text(encoding="utf-8"))
            for name in (SETTINGS, "trainer_state.json")
        )
        if "param_groups" not in optimizer or "global_step" not in state:
            raise ValueError("it is no checkpoint of zo-fused")
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(f"can't resume from {path}: {first_line(error)}") from error
    return optimizer, settings


def check_settings(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to resume a run under other settings than it was started with.

    Raises:
        UserError: the first difference.
    """
    for name in (*now, *(name for name in saved if name not in now)):
        was, given = saved.get(name), now.get(name)
        if was != given:
            raise UserError(
                f"can't resume: the run was started with {name.replace('_', ' ')} {was!r}, "
                f"not {given!r}"
            )
