"""Small models of transformers, a row a family."""

from __future__ import annotations

from typing import Any

import pytest

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40,
}  # fmt: skip
OPT_SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "ffn_dim": 32, "max_position_embeddings": 40,
}  # fmt: skip

# name: class, configuration, prefix of the layers, a name before them, one behind them
MODELS: dict[str, tuple[str, str, dict[str, Any], str, str, str]] = {
    "OPT": (
        "OPTForCausalLM", "OPTConfig", {**OPT_SMALL, "word_embed_proj_dim": 8},
        "model.decoder.layers.", "model.decoder.embed_positions.weight",
        "model.decoder.final_layer_norm.weight",
    ),
    "Llama": (
        "LlamaForCausalLM", "LlamaConfig", SMALL,
        "model.layers.", "model.embed_tokens.weight", "lm_head.weight",
    ),
    "Qwen2": (
        "Qwen2ForCausalLM", "Qwen2Config", {**SMALL, "num_key_value_heads": 1},
        "model.layers.", "model.embed_tokens.weight", "model.norm.weight",
    ),
    "GPT-2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 0,
         "eos_token_id": 0},
        "transformer.h.", "transformer.wpe.weight", "transformer.ln_f.bias",
    ),
    "RoBERTa": (
        "RobertaForSequenceClassification", "RobertaConfig", SMALL,
        "roberta.encoder.layer.", "roberta.embeddings.LayerNorm.weight",
        "classifier.out_proj.weight",
    ),
    "Mixtral": (
        "MixtralForCausalLM", "MixtralConfig",
        {**SMALL, "num_local_experts": 8, "num_key_value_heads": 1},
        "model.layers.", "model.embed_tokens.weight", "lm_head.weight",
    ),
}  # fmt: skip


def make(name: str) -> Any:
    """A model of transformers with three layers and random weights."""
    transformers = pytest.importorskip("transformers")
    cls, config, options, *_ = MODELS[name]
    return getattr(transformers, cls)(getattr(transformers, config)(**options))
