"""Rows of tokens for a forward pass: where the answers are in them, and which models bear what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zo_fused.task.adapters import base_model, virtual_tokens
from zo_fused.task.encoding import Tokens
from zo_fused.task.errors import optional

# Architectures whose rows may hold several answers, if they have no windows (`bears_packing`).
PACKED = {"cohere", "deepseek_v3", "gemma", "glm", "gpt2", "gpt_neox", "gptj", "granite", "llama"}
PACKED |= {"mistral", "mixtral", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe"}
PACKED |= {"qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"}
_PAD, _PROMPT = -2, -1  # what a token of such a row is; else the number of its answer


@dataclass(frozen=True)
class Rows:
    """Padded rows for one forward pass, and where the answers are in them."""

    inputs: dict[str, Tensor]  # what the model is called with
    positions: Tensor  # [answers, tokens] which of the kept logits predict the answers' tokens
    targets: Tensor  # [answers, tokens] answer tokens
    mask: Tensor  # [answers, tokens] 1.0 for an answer token, 0.0 for padding
    of: Tensor | None = None  # [answers] the row that an answer is in; None: each has its own


def bears_left_padding(model: Any) -> bool:
    """Whether padding on the left, with `position_ids`, leaves a model's numbers as they are.

    So it does in the causal models of transformers (a test goes through them), but for those with
    a state that runs over the padding, and for decoders made of encoders, which number tokens in
    their own way. Of other models nothing is known.
    """
    auto = optional("transformers.models.auto.modeling_auto")
    kind = type(getattr(model, "config", None))
    return (
        type(model).__module__.startswith("transformers.")
        and kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING
        and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
        and not getattr(model, "_is_stateful", False)
    )


def bears_packing(model: Any) -> bool:
    """Whether a row may hold several answers to one prompt, kept apart by the attention mask.

    In causal models that take a mask [rows, 1, queries, keys] for what they attend to, and know
    distances from `position_ids` alone: no windows, which such a mask would undo, no ALiBi. Those
    are the ones that a test has been through.
    """
    base = base_model(model)
    config = getattr(base, "config", None)
    return (
        getattr(config, "model_type", None) in PACKED
        and bears_left_padding(base)
        and not virtual_tokens(model)
        and getattr(config, "_attn_implementation", None) in ("eager", "sdpa")
        and not getattr(config, "sliding_window", None)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
    )


def packed_rows(
    prompts: Sequence[Tokens],
    answers: Sequence[Sequence[Tokens]],
    pad_id: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Rows:
    """A row for each prompt, and behind it its answers without their last tokens.

    An answer sees the prompt and itself, and is numbered as if it followed the prompt alone. The
    logits that are kept begin with those of the prompt's last token.

    Args:
        answers: of each prompt.
        pad_id: any token id that the model has an embedding for.
        dtype: of the model.
    """
    width = max(map(len, prompts))
    tail = max(sum(len(answer) - 1 for answer in of) for of in answers)
    span = max(len(answer) for of in answers for answer in of)
    ids, numbers, parts, places, owner = [], [], [], [], []
    for row, (prompt, of) in enumerate(zip(prompts, answers, strict=True)):
        gap, used = width - len(prompt), 0
        ids.append([pad_id] * gap + prompt)
        numbers.append([0] * gap + list(range(len(prompt))))
        parts.append([_PAD] * gap + [_PROMPT] * len(prompt))
        for number, answer in enumerate(of):
            ids[-1] += answer[:-1]
            numbers[-1] += range(len(prompt), len(prompt) + len(answer) - 1)
            parts[-1] += [number] * (len(answer) - 1)
            own = [0, *range(used + 1, used + len(answer))]
            places.append([own[min(k, len(own) - 1)] for k in range(span)])
            owner.append(row)
            used += len(answer) - 1
        ids[-1] += [pad_id] * (tail - used)
        numbers[-1] += [0] * (tail - used)
        parts[-1] += [_PAD] * (tail - used)
    every = [answer for of in answers for answer in of]
    targets = [answer + [0] * (span - len(answer)) for answer in every]
    present = [[1.0] * len(answer) + [0.0] * (span - len(answer)) for answer in every]
    inputs = {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": _apart(torch.tensor(parts, device=device), dtype),
        "position_ids": torch.tensor(numbers, device=device),
        "logits_to_keep": torch.arange(width - 1, width + tail, device=device),
    }
    return Rows(
        inputs,
        torch.tensor(places, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(present, device=device),
        torch.tensor(owner, device=device),
    )


def _apart(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [rows, 1, queries, keys] by which a token sees those before it, of the prompt and of
    its own part: 0, or else the dtype's lowest number."""
    query, key = parts.unsqueeze(2), parts.unsqueeze(1)
    seen = ((key == _PROMPT) | (key == query)).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=parts.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)
