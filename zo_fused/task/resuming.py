"""What a run goes on from: what its directory holds.

``settings.json`` says what the run is; it is there from before the first step until the run is
finished. The log has every step, so base weights and log are enough to go on. A checkpoint,
``checkpoint-<step>/``, shortens the way: it is a model directory with the optimizer's state and the
checksums of its files in it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zo_fused.noise.streams import CONTRACT_VERSION
from zo_fused.step import log_lines
from zo_fused.task.errors import UserError, first_line, warn
from zo_fused.task.files import json_object, sync, sync_all, to_json, write_text, writing
from zo_fused.task.history import read_history

SETTINGS = "settings.json"
SUMMARY = "summary.json"
LOG = "replay.jsonl"
HISTORY = "history.jsonl"
_SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it


# ---- what is in the directory --------------------------------------------------------------------


def is_finished(run: Path) -> bool:
    """Whether a run has come to its end there."""
    return (run / SUMMARY).exists()


def has_begun(run: Path) -> bool:
    """Whether a run is there that has not come to its end."""
    return (run / SETTINGS).exists()


def holds_others(run: Path) -> bool:
    """Whether there is something but what a run may have left that was killed at its beginning."""
    return any(path.name != f"{SETTINGS}.tmp" for path in run.iterdir())


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_checkpoints(run: Path, keep: Path | None = None) -> None:
    """Deletes the run's checkpoints, complete or not, but for one."""
    for path in run.glob("checkpoint-*"):
        if path != keep and re.fullmatch(r"checkpoint-\d+(\.tmp|\.old)?", path.name):
            shutil.rmtree(put_aside(path))


def put_aside(checkpoint: Path) -> Path:
    """Half of a checkpoint that is being deleted must not look like one."""
    if checkpoint.suffix:
        return checkpoint
    aside = checkpoint.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    return aside


# ---- settings ------------------------------------------------------------------------------------


def write_settings(run: Path, settings: dict[str, Any]) -> None:
    """The run has begun."""
    write_text(run / SETTINGS, to_json(settings) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """What `SETTINGS` or `SUMMARY` says.

    Raises:
        UserError: it can't be read.
    """
    try:
        return json_object(path)
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"can't read {path}: {error}") from error


def difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first setting in which two runs differ, in words; None: there is none."""
    for name in (*now, *(name for name in saved if name not in now)):
        was, given = saved.get(name), now.get(name)
        if was != given:
            return f"{name.replace('_', ' ')} {was!r}, not {given!r}"
    return None


# ---- checkpoints ---------------------------------------------------------------------------------


def complete(written: Path, final: Path) -> None:
    """Gives a checkpoint that was written its checksums and its name, once all is on the disk, and
    deletes the others."""
    with writing(written):
        write_text(written / _SUMS, sums(written))
        sync_all(written)
        if final.exists():  # one that is damaged
            put_aside(final)
        written.replace(final)
        sync(final.parent)
    remove_checkpoints(final.parent, keep=final)


def sums(folder: Path) -> str:
    """The SHA-256 of every file in a folder, in the format of sha256sum."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _SUMS)
    lines = []
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _state(checkpoint: Path) -> dict[str, Any]:
    """The optimizer's state.

    Raises:
        ValueError: the checkpoint is not whole; says why.
    """
    try:
        said = (checkpoint / _SUMS).read_text(encoding="utf-8").splitlines()
        if differ := set(said) ^ set(sums(checkpoint).splitlines()):
            name = min(differ).partition("  ")[2]
            raise ValueError(f"{name} is not what {_SUMS} says")
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        state["param_groups"][0]["step"]
    except OSError as error:
        name = os.path.basename(error.filename or checkpoint)
        raise ValueError(f"{name}: {error.strerror}") from error
    except ValueError:
        raise
    except Exception as error:  # a damaged archive can raise almost anything
        raise ValueError(f"optimizer.pt can't be loaded: {first_line(error)}") from error
    return state


# ---- where to go on ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Past:
    """What a run goes on from.

    Attributes:
        checkpoint: whose weights are loaded; None: the base weights.
        state: of the optimizer, in the checkpoint.
        step: up to which history and log have the run.
    """

    checkpoint: Path | None
    state: dict[str, Any] | None
    step: int


def find_past(run: Path) -> Past | None:
    """What the run in this directory goes on from; None: it had no log yet, and no step.

    Raises:
        UserError: log or history is missing or damaged, while there is more than the beginning.
    """
    log, saved = _read_log(run / LOG), checkpoints(run)
    if log is None:
        if saved or ((run / HISTORY).exists() and _steps_of(run / HISTORY)):
            raise UserError(
                f"can't resume: {run / LOG} is missing; put it back, or start again with "
                "--overwrite"
            )
        return None
    done = sum(not event.restored for event in log.events)
    step = min(done, _steps_of(run / HISTORY))  # a line of the history comes after one of the log
    for checkpoint in reversed(saved):
        try:
            state = _state(checkpoint)
            at = state["param_groups"][0]["step"]
            if at > step:
                raise ValueError(f"it is of step {at}, and the log ends at step {step}")
            return Past(checkpoint, state, step)
        except ValueError as error:
            warn(f"{checkpoint} is passed over: {error}")
    return Past(None, None, step)


def _read_log(path: Path) -> log_lines.Log | None:
    """None: it is not there, or its first line was cut off."""
    try:
        if not path.read_bytes().partition(b"\n")[1]:
            return None
        return log_lines.read(path, CONTRACT_VERSION)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"can't read the replay log {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"can't resume: {first_line(error)}") from error


def _steps_of(history: Path) -> int:
    steps = [entry["step"] for entry in read_history(history) if "loss" in entry]
    if steps != list(range(1, len(steps) + 1)):
        raise UserError(f"can't resume: in {history} a step is missing, or comes twice")
    return len(steps)
