"""Loading and saving models and tokenizers of transformers, and choosing the device."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import zo_fused
from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.files import sync, sync_all

DTYPES = ("float32", "float16", "bfloat16")
QUANTIZERS = {"int8": "Int8WeightOnlyConfig"}  # of torchao.quantization: a scale a row
# No attention mask, or convolutions, pools, patches or hashes that run across it.
_SEE_PADDING = {"blt", "convbert", "fnet", "funnel", "mobilebert", "nystromformer", "prophetnet"}
_SEE_PADDING |= {"reformer", "yoso"}


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


def fills_masks(config: Any) -> bool:
    """Whether a model is an encoder that fills in masks, and no causal language model."""
    if getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        return False
    own = getattr(config, "auto_map", None) or {}
    return _kinds("MASKED")(type(config)) or "AutoModelForMaskedLM" in own


def check_kind(config: Any) -> None:
    """Refuses what is no language model, causal or masked.

    Raises:
        UserError: names the architecture.
    """
    name = config.model_type or type(config).__name__
    own = getattr(config, "auto_map", None) or {}
    if getattr(config, "is_encoder_decoder", False):
        what = "have an encoder and a decoder, which zo-fused can't tune"
    elif config.model_type in _SEE_PADDING:
        what = "look at padding, so that a text's loss would depend on the others in its batch"
    elif fills_masks(config) or _kinds("CAUSAL")(type(config)) or "AutoModelForCausalLM" in own:
        return
    else:
        what = "are no language models that zo-fused can tune"
    raise UserError(
        f"{name} models {what}; take a causal language model (OPT, Llama) or a masked one (RoBERTa)"
    )


def _kinds(which: str) -> Callable[[type], bool]:
    auto = optional("transformers.models.auto.modeling_auto")
    return getattr(auto, f"MODEL_FOR_{which}_LM_MAPPING").__contains__


def load_config(name: str, trust_remote_code: bool = False, alone: bool = False) -> Any:
    """A model's configuration, from a directory or the Hugging Face Hub.

    Args:
        alone: whether it may be a file, config.json, without a model.

    Raises:
        UserError: it can't be loaded.
    """
    auto = optional("transformers").AutoConfig
    checked = not (alone and Path(name).is_file())
    return _load(auto, name, "configuration", trust_remote_code, checked)


def load_model(
    name: str,
    dtype: str | torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    experts: str | None = None,
    quantize: str | None = None,
) -> Any:
    """A language model from a directory or the Hugging Face Hub, in eval mode.

    An encoder (BERT, RoBERTa) is loaded with its head for masked tokens, anything else as a causal
    language model.

    Args:
        trust_remote_code: whether Python code that comes with the model may run.
        experts: `experts_implementation` of transformers, for mixtures of experts.
        quantize: a key of `QUANTIZERS`: of torchao, for all linear layers but the head. None: as
            the model is.

    Raises:
        UserError: it can't be loaded, or not all its weights are there; it is to be quantized, and
            is already, or torchao is not installed.
    """
    transformers = optional("transformers")
    config = load_config(name, trust_remote_code)
    check_kind(config)
    masked = fills_masks(config)
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    options: dict[str, Any] = {} if experts is None else {"experts_implementation": experts}
    if quantize is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"the model {name!r} is quantized already: leave out --quantize")
        scheme = getattr(optional("torchao.quantization", "torchao"), QUANTIZERS[quantize])
        options["quantization_config"] = transformers.TorchAoConfig(scheme())
    model, found = _load(
        auto,
        name,
        "model",
        trust_remote_code,
        config=config,
        dtype=wanted,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `found`
        **options,
    )
    _check_complete(name, found)
    return model.to(device).eval()


def _check_complete(name: str, found: dict[str, Any]) -> None:
    """Refuses what transformers fills with random numbers."""
    if found["mismatched_keys"]:
        key, saved, wanted = min(found["mismatched_keys"])
        raise UserError(
            f"the checkpoint {name!r} does not fit its config.json: {key} has shape "
            f"{tuple(saved)}, not {tuple(wanted)}"
        )
    missing = sorted(found["missing_keys"])
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"the checkpoint {name!r} lacks weights of the language model: {missing[0]}{others}"
        )


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer.

    Raises:
        UserError: it can't be loaded, or it is empty, as where the directory has none.
    """
    tokenizer = _load(optional("transformers").AutoTokenizer, name, "tokenizer", trust_remote_code)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"can't load the tokenizer of {name!r}: the directory holds none")
    return tokenizer


def _load(
    auto: Any,
    name: str,
    what: str,
    trust_remote_code: bool,
    checked: bool = True,
    **options: Any,
) -> Any:
    path = Path(name)
    if checked:
        if path.exists() and not path.is_dir():
            raise UserError(f"{name} is a file, not a model directory")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"{name} is no model directory: it has no config.json")
        if not path.is_dir() and name.startswith((".", "/", "~")):
            raise UserError(f"there is no model directory {name}")
    try:
        with _progress_bars(sys.stderr.isatty()), _only_errors():
            # said even if False: else transformers asks on stdin
            return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # of transformers, safetensors, tokenizers, pickle, or own code
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise UserError(
                f"the {what} of {name!r} comes with Python code of its own, which is not run "
                "unasked; read it, and add --trust-remote-code if you trust it"
            ) from error
        where = "" if path.exists() else ", which is no directory here, as a Hub id"
        raise UserError(f"can't load the {what} of {name!r}{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong, where the message of the other library says something else first."""
    if isinstance(error, pickle.UnpicklingError):
        return (
            "a file of weights holds more than tensors, so loading it could run code; "
            "ask for one in the format safetensors"
        )
    if type(error).__name__ == "SafetensorError":
        return f"a file of weights is damaged or cut short ({first_line(error)})"
    if "instantiate the backend tokenizer" in str(error):
        return (
            "there is no tokenizer.json, and none can be made of other files "
            "(some need the package sentencepiece or tiktoken)"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "Validation error for field 'x':" goes on in the next line
    joined = " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
    return joined.rstrip(".:")


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


@contextmanager
def _only_errors() -> Iterator[None]:
    """Without the reports of transformers on what it makes up: `_check_complete` refuses that."""
    logging = optional("transformers").utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        logging.set_verbosity(before)


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes a directory of a model, or of an adapter, and its tokenizer.

    Each file appears under its name only once it is complete, and on the disk.
    """
    temporary = directory / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    options = {}
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "torchao":
        # transformers 5.23 would take back how it loaded such weights, and can't
        options["save_original_format"] = False
    with _progress_bars(False):  # the loop has its own
        model.save_pretrained(temporary, **options)
    tokenizer.save_pretrained(temporary)
    sync_all(temporary)
    mode = (temporary / "tokenizer_config.json").stat().st_mode
    for entry in temporary.iterdir():
        target = directory / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        if entry.is_file():  # safetensors makes files that nobody else can read
            entry.chmod(mode)
        os.replace(entry, target)
    temporary.rmdir()
    sync(directory)
