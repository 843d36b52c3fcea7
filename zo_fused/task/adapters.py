"""Adapters of peft: small trainable parts beside a frozen model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zo_fused.task.errors import UserError, first_line, optional
from zo_fused.task.models import fills_masks, load_model

SCHEMES = ("lora", "prefix", "prompt")


def load_adapted(
    name: str,
    dtype: str | torch.dtype,
    device: torch.device,
    scheme: str,
    seed: int,
    saved: Path | None = None,
    **loading: Any,
) -> Any:
    """A model with an adapter, in eval mode; only the adapter requires gradients.

    A new adapter is a function of model, scheme and seed. It is made on the CPU, whatever the
    device: the same bits everywhere, but for a prefix, which comes out of a forward pass.

    Args:
        scheme: one of `SCHEMES`.
        saved: a directory with the weights of such an adapter, to go on from.
        loading: further arguments of `load_model`.

    Raises:
        UserError: model or adapter can't be loaded, or peft has no such adapter for the model.
    """
    peft = optional("peft")
    model = load_model(name, dtype, torch.device("cpu"), **loading)
    if fills_masks(model.config) and scheme != "lora":
        raise UserError(
            f"{name!r} is a masked language model, which peft gives no {scheme} adapter; "
            "take --peft lora"
        )
    try:
        with _quiet():
            adapted = _fresh(peft, model, scheme, seed)
            if saved is not None:
                weights = peft.load_peft_weights(str(saved), device="cpu")
                peft.set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # of peft, transformers, safetensors or pickle
        what = f"load the adapter {saved}" if saved else f"put a {scheme} adapter on {name!r}"
        raise UserError(f"can't {what}: {first_line(error)}") from error
    return adapted.to(device).eval()


def made_for(directory: str) -> str:
    """The model that a saved adapter is for, as the adapter's config names it.

    Raises:
        UserError: the directory holds no adapter, or names no model.
    """
    if not (Path(directory) / "adapter_config.json").is_file():
        raise UserError(f"{directory} is no directory of an adapter: no adapter_config.json")
    try:
        name = optional("peft").PeftConfig.from_pretrained(directory).base_model_name_or_path
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"can't load the adapter {directory}: {first_line(error)}") from error
    if not name:
        raise UserError(f"the adapter {directory} does not say which model it is for; give --model")
    return str(name)


def load_saved(
    directory: str, name: str, dtype: str | torch.dtype, device: torch.device, **loading: Any
) -> Any:
    """A model with a saved adapter of any kind, in eval mode.

    Args:
        directory: of the adapter, as `zo-fused finetune --peft` writes it.
        name: of the model.
        loading: further arguments of `load_model`.

    Raises:
        UserError: model or adapter can't be loaded.
    """
    peft = optional("peft")
    model = load_model(name, dtype, torch.device("cpu"), **loading)
    try:
        with _quiet():
            adapted = peft.PeftModel.from_pretrained(model, directory, torch_device="cpu")
    except Exception as error:  # of peft, safetensors or pickle
        raise UserError(f"can't load the adapter {directory}: {first_line(error)}") from error
    return adapted.to(device).eval()


def _fresh(peft: Any, model: Any, scheme: str, seed: int) -> Any:
    """The adapters of MeZO (arXiv 2305.17333): LoRA with r 8 and alpha 16, and five tokens of
    prefix that start as what the model makes of random tokens. Ten tokens of prompt.

    LoRA goes to the layers that peft knows for the architecture, else to all linear ones.
    """
    task = {} if fills_masks(model.config) else {"task_type": "CAUSAL_LM"}
    configs = {
        "lora": lambda **more: peft.LoraConfig(**task, r=8, lora_alpha=16, **more),
        "prefix": lambda: peft.PrefixTuningConfig(**task, num_virtual_tokens=5),
        "prompt": lambda: peft.PromptTuningConfig(**task, num_virtual_tokens=10),
    }
    targets = _lora_targets(model) if scheme == "lora" else {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, configs[scheme](**targets))
        if scheme == "prefix":
            vocabulary = model.config.get_text_config().vocab_size
            tokens = torch.randint(0, vocabulary, (1, virtual_tokens(adapted)), device="cpu")
            cache = model(input_ids=tokens, use_cache=True).past_key_values
            peft.initialize_kv_prefix_from_past_key_values(adapted, past_key_values=cache)
    return adapted


def _lora_targets(model: Any) -> dict[str, Any]:
    """Which layers get LoRA: those that peft knows for the architecture, else all linear ones."""
    known = optional("peft.utils").TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    if model.config.model_type in known:
        return {"target_modules": known[model.config.model_type]}
    # subclasses of Linear return other things (routers), and kernels of state-space models read
    # the weight of out_proj themselves
    special = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear)
        or (getattr(model, "_is_stateful", False) and name.endswith(".out_proj"))
    ]
    return {"target_modules": "all-linear", "exclude_modules": special or None}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers tells peft, and peft its users, about what they put right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def is_adapted(model: Any) -> bool:
    """Whether peft has put an adapter on a model."""
    return hasattr(model, "active_peft_config")


def base_model(model: Any) -> Any:
    """The model behind an adapter, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def virtual_tokens(model: Any) -> int:
    """Positions that an adapter takes before every text."""
    return getattr(model.active_peft_config, "num_virtual_tokens", 0) if is_adapted(model) else 0


def prepended_logits(model: Any) -> int:
    """Logits that an adapter adds before those of a text: of a prompt, not of a prefix."""
    if not is_adapted(model) or model.active_peft_config.peft_type != "PROMPT_TUNING":
        return 0
    return virtual_tokens(model)
