"""Parameter shapes of the models that the benchmarks use, with random weights."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# hidden, layers, ffn: the published OPT configurations (arXiv 2205.01068, table 1), and one for
# tests.
OPT = {
    "opt-tiny": (16, 1, 32),
    "opt-125m": (768, 12, 3072),
    "opt-1.3b": (2048, 24, 8192),
    "opt-13b": (5120, 40, 20480),
}
VOCABULARY, POSITIONS = 50272, 2050


def opt_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an OPT model's parameters (lm_head is tied to the embedding)."""
    hidden, layers, ffn = OPT[model]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCABULARY, hidden),
        "embed_positions.weight": (POSITIONS, hidden),
    }
    linear = {
        "k_proj": (hidden, hidden),
        "v_proj": (hidden, hidden),
        "q_proj": (hidden, hidden),
        "out_proj": (hidden, hidden),
        "fc1": (ffn, hidden),
        "fc2": (hidden, ffn),
    }
    for layer in range(layers):
        for name, shape in linear.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            shapes[f"layers.{layer}.{norm}.weight"] = (hidden,)
            shapes[f"layers.{layer}.{norm}.bias"] = (hidden,)
    shapes["final_layer_norm.weight"] = shapes["final_layer_norm.bias"] = (hidden,)
    return shapes


def opt_parameters(model: str, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Random weights N(0, 0.02^2) of those shapes."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(
            torch.empty(shape).normal_(0, 0.02, generator=generator).to(dtype), requires_grad=True
        )
        for name, shape in opt_shapes(model).items()
    }
