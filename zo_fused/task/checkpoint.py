"""Checkpoints: ``checkpoint-<step>/`` in a run's directory, a model directory that also holds
``checkpoint.pt`` with the optimizer's state. A checkpoint appears complete or not at all.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from zo_fused.task.errors import UserError, first_line
from zo_fused.task.files import writing
from zo_fused.task.models import save_model


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(
    run: Path, model: Any, tokenizer: Any, optimizer: Any, settings: dict[str, Any]
) -> Path:
    """Saves the run after the optimizer's last step and drops older checkpoints.

    A checkpoint of that step that is already there is kept: its weights are as exact or, after an
    interrupted step, more exact.
    """
    state = optimizer.state_dict()  # first of all: it puts perturbed weights back
    step = optimizer.step_count
    final = run / f"checkpoint-{step}"
    if not final.exists():
        temporary = run / f"{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        content = {"step": step, "optimizer": state, "settings": settings}
        with writing(temporary):
            save_model(model, tokenizer, temporary)
            with open(temporary / "checkpoint.pt", "wb") as file:  # its errors are the system's
                torch.save(content, file)
            os.replace(temporary, final)
    remove_checkpoints(run, keep=final)
    return final


def remove_checkpoints(run: Path, keep: Path | None = None) -> None:
    """Deletes the run's checkpoints, finished or not, but for one."""
    for path in run.glob("checkpoint-*"):
        if path != keep and re.fullmatch(r"checkpoint-\d+(\.tmp)?", path.name):
            shutil.rmtree(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """``{"step", "optimizer", "settings"}`` of a checkpoint.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path / "checkpoint.pt", weights_only=True)
        if content.keys() != {"step", "optimizer", "settings"}:
            raise ValueError("checkpoint.pt is no checkpoint of zo-fused")
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(f"can't resume from {path}: {first_line(error)}") from error
    return content


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
