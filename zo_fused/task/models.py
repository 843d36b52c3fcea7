"""Loading and saving models and tokenizers of transformers, and choosing the device."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.task.errors import UserError, first_line, optional

DTYPES = ("float32", "float16", "bfloat16")


def choose_device(name: str = "auto") -> torch.device:
    """A device that exists and that a backend serves; "auto" is the GPU if there is one.

    Raises:
        UserError: there is no such device, or nothing to serve it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is no device; try cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"there is no device {name!r}: this PyTorch sees no GPU; "
                "`zo-fused doctor` says more"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"there is no device {name!r}: this PyTorch sees {torch.cuda.device_count()} GPUs"
            )
    try:
        zo_fused.backend_of(device)
    except (RuntimeError, ValueError) as error:
        raise UserError(first_line(error)) from error
    return device


def load_model(name: str, dtype: str | torch.dtype, device: torch.device) -> Any:
    """A causal language model from a directory or the Hugging Face Hub, in eval mode.

    Raises:
        UserError: it can't be loaded.
    """
    transformers = optional("transformers")
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    model = _load(transformers.AutoModelForCausalLM, name, "model", dtype=wanted)
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer.

    Raises:
        UserError: it can't be loaded.
    """
    return _load(optional("transformers").AutoTokenizer, name, "tokenizer")


def _load(auto: Any, name: str, what: str, **options: Any) -> Any:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise UserError(f"{name} is a file, not a model directory")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{name} is no model directory: it has no config.json")
    if not path.is_dir() and name.startswith((".", "/", "~")):
        raise UserError(f"there is no model directory {name}")
    try:
        with _progress_bars(sys.stderr.isatty()):
            return auto.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        where = "" if path.is_dir() else ", which is no directory here, as a Hub id"
        raise UserError(f"can't load the {what} of {name!r}{where}: {first_line(error)}") from error


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Hides the progress bars of transformers unless `shown`."""
    logging = optional("transformers").utils.logging
    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes a directory of a model, or of an adapter, and its tokenizer.

    Each file appears under its name only once it is complete.
    """
    temporary = directory / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _progress_bars(False):  # the loop has its own
        model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    mode = (temporary / "tokenizer_config.json").stat().st_mode
    for entry in temporary.iterdir():
        target = directory / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        if entry.is_file():  # safetensors makes files that nobody else can read
            entry.chmod(mode)
        os.replace(entry, target)
    temporary.rmdir()
