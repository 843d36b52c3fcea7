"""Tiny models with random weights of the architectures of transformers, and tokenizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import tokenizers
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

# By attribute, whatever the architecture. Windows and chunks are shorter than the tests' texts.
_NAMES: dict[Any, str] = {
    128: "vocab_size vocab_size_per_layer_input audio_vocab_size ngram_vocab_size_base "
    "entity_vocab_size encoder_hash_byte_group_vocab",
    32: "hidden_size d_model n_embd emb_dim embedding_size out_hidden_size input_embedding_size "
    "output_embedding_size hidden_size_global input_size dim backbone_hidden_size entity_emb_size "
    "mm_embed_dim output_proj_dims",
    48: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim dim_ff dff d_inner "
    "ffn_hidden_size feed_forward_size dense_intermediate_size intermediate_size_mlp hidden_dim",
    2: "num_hidden_layers decoder_layers encoder_layers n_layer n_layers num_layers depth "
    "num_encoder_layers num_decoder_layers num_key_value_heads swa_num_key_value_heads "
    "index_n_heads num_experts_per_tok moe_topk moe_k num_blocks",
    4: "num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads "
    "num_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_key_heads "
    "linear_num_value_heads swa_num_attention_heads linear_num_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts sliding_window sliding_window_size "
    "attention_window_size window_size attention_chunk_size chunk_size mamba_chunk_size "
    "local_attention patch_size",
    8: "head_dim d_head dim_head swa_head_dim kv_channels index_head_dim rotary_dim "
    "linear_key_head_dim linear_value_head_dim kv_lora_rank q_lora_rank qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim linear_head_dim attention_head_size state_size mamba_d_state "
    "ssm_state_size hidden_size_per_layer_input adapter_rank laurel_rank router_hidden_size "
    "image_size num_position_embeddings model_patch_size",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size num_centroids",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length "
    "max_target_positions max_source_positions",
    1: "n_shared_experts n_group topk_group first_k_dense_replace num_dense_layers bos_token_id "
    "decoder_start_token_id centroid_intermediate_top_k",
    0: "pad_token_id dropout",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()} | {
    "eos_token_id": 2,
    "sep_token_id": 3,
    "image_token_id": 4,
    "image_token_index": 4,
    "video_token_id": 5,
    "audio_token_id": 6,
    "forced_eos_token_id": None,
}
# Where the default None lets the configuration derive the value.
_DERIVED = ("head_dim", "num_key_value_heads", "q_lora_rank", "sliding_window")

HYBRID = ["linear_attention", "full_attention"]
# What the sizes above don't fit, by kind.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": HYBRID, "mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2)
    | dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen4_exp_text": {"layer_types": HYBRID, "indexer_n_heads": 2, "indexer_kv_heads": 1}
    | {"indexer_head_dim": 64, "indexer_budget": 4, "indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "roc_bert": dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 8)
    | dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), 16),
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"chunk_size": 16},
    "zamba": {"layers_block_type": 2 * ["linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def config(kind: str, **more: Any) -> Any:
    """A tiny configuration of a kind of model."""
    return _shrunk(CONFIG_MAPPING[kind], **more)


def _shrunk(cls: Any, **more: Any) -> Any:
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    values = {
        name: size
        for name, size in SIZES.items()
        if name in fields and not (fields[name] is None and name in _DERIVED)
    }
    if "kv_lora_rank" in fields:  # latent attention has no groups of heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in getattr(cls, "sub_configs", None) or {}:
        part = getattr(cls(), name, None)
        if part is not None:
            values[name] = _shrunk(type(part)).to_dict()
    return cls(**(values | OWN.get(cls.model_type, {}) | more))


def causal_model(kind: str, **more: Any) -> Any:
    """A tiny causal model of a kind."""
    return random_model(AutoModelForCausalLM, config(kind, **more))


def masked_model(kind: str) -> Any:
    """A tiny masked language model of a kind."""
    return random_model(AutoModelForMaskedLM, config(kind))


def random_model(auto: Any, settings: Any) -> Any:
    """A model whose predictions are far from uniform, in eval mode.

    Raises:
        ValueError: it would not be tiny.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(settings).parameters())
    if size > 3_000_000:
        raise ValueError(f"{settings.model_type}: {size} parameters")
    torch.manual_seed(0)
    model = auto.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _byte_level(corpus: list[str], vocab_size: int, special: list[str]) -> Any:
    """Byte-level BPE of the corpus: " great" and "great" are different tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def opt_tokenizer(corpus: list[str], vocab_size: int, **options: Any) -> Any:
    """The bos </s> stands before every text."""
    tokenizer = _byte_level(corpus, vocab_size, ["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def roberta_tokenizer(length: int = 64) -> Any:
    """The mask takes the space before it."""
    corpus = ["film was great . terrible great It was"] * 9
    tokenizer = _byte_level(corpus, 320, ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    ends = [("<s>", 0), ("</s>", 2)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>"}
    names |= {"unk": "<unk>", "mask": "<mask>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        **{f"{name}_token": token for name, token in names.items()},
    )
