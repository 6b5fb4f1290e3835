"""Tiny random models of the causal-LM classes of transformers, from their configurations alone.

`SIZES` holds a small value for every usual field of a configuration; a type takes those its configuration has. `MORE`
holds what a type needs besides, so that its sizes agree with each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from intaglio.checkpoint import Checkpoint, load
from intaglio.cli.generate import generate
from intaglio.errors import IntaglioError
from intaglio.masks.visualize import groups
from intaglio.methods.weights.wanda import Wanda
from tests.families import BOS, EOS, MAX_POSITIONS, PAD, VOCAB, _fill, tiny_tokenizer

PROMPT = "the quick brown fox jumps over the lazy dog and the quick"
NEW_TOKENS = 24
MAX_PARAMETERS = 2_000_000
_LAYERS, _WIDTH, _HEADS, _HEAD_DIM, _INNER, _EXPERTS = 2, 32, 4, 8, 48, 4

SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "num_blocks", "depth"), _LAYERS),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size",
                     "word_embed_proj_dim", "lru_width", "attention_hidden_size", "input_embedding_size",
                     "output_embedding_size", "embed_dim"), _WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads",
                     "attention_heads", "linear_num_heads", "swa_num_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "swa_head_dim", "global_head_dim", "dim_head", "d_head",
                     "attention_head_size", "linear_head_dim", "kv_channels", "index_head_dim", "v_head_dim",
                     "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "linear_key_head_dim",
                     "linear_value_head_dim", "q_lora_rank", "kv_lora_rank"), _HEAD_DIM),
    "qk_head_dim": 2 * _HEAD_DIM,
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner",
                     "ffn_dim", "dff", "dim_ff", "d_inner", "ffn_hidden_size", "feed_forward_size",
                     "shared_expert_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size",
                     "shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp",
                     "moe_shared_expert_intermediate_size"), _INNER),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "zero_expert_num"),
                    _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "n_shared_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length", "context_length",
                     "max_target_positions", "original_max_position_embeddings", "n_ctx", "rel_extent"),
                    MAX_POSITIONS),
    **dict.fromkeys(("sliding_window", "attention_window_size", "sliding_window_size", "window_size",
                     "local_attention", "attention_chunk_size"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads",
                     "n_mamba_heads"), _HEADS),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_chunk_size", "chunk_size",
                     "hidden_size_per_layer_input", "laurel_rank", "adapter_rank", "router_hidden_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim", "time_step_rank", "mamba_dt_rank"), 16),
    "mamba_d_ssm": 64,
    "num_kv_shared_layers": 0,
    "first_k_dense_replace": 1,
    "max_window_layers": 1,
    "prompt_length": 4,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "sep_token_id": EOS, "cls_token_id": BOS,
    "decoder_start_token_id": BOS,
    "is_decoder": True,
}  # fmt: skip

_HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
"""One layer of each kind, as every released model of these families has."""

MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("bailing_hybrid", "granitemoehybrid", "kimi_linear", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), _HYBRID
    ),
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"head_dim": _HEAD_DIM},
    "dots3_note_text": {"num_key_value_heads": _HEADS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cpmant": {"prompt_types": 2, "prompt_length": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minicpm3": {"num_key_value_heads": _HEADS},
    "ministral": {"head_dim": _HEAD_DIM},
    "nemotron": {"head_dim": _HEAD_DIM},
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16)},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {"num_key_value_heads": _HEADS},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def model_types() -> list[str]:
    """Return a type of each causal-LM class, the first of those that share a class."""
    kinds: dict[str, str] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        kinds.setdefault(name, kind)
    return list(kinds.values())


def tiny_config(kind: str, **more: Any) -> Any:
    """Return a small configuration of a model type, with further fields."""
    return _small(CONFIG_MAPPING[kind], **more)


def _small(cls: type[PreTrainedConfig], **more: Any) -> Any:
    stock = cls()
    held = vars(stock)
    values = {name: value for name, value in SIZES.items() if held.get(name) is not None}
    for name in cls.sub_configs:
        if isinstance(held.get(name), PreTrainedConfig):
            values[name] = _small(type(held[name])).to_dict()
    if "kv_lora_rank" in values:  # multi-head latent attention has no groups
        values["num_key_value_heads"] = _HEADS
    return cls(**values | MORE.get(cls.model_type, {}) | more)


def tiny_lm(kind: str, seed: int = 0, **more: Any) -> Any:
    """Return a random model of a type in eval mode, with further fields of its configuration.

    Raises:
        Exception: whatever the family raises for this configuration; it cannot be built from one.
    """
    config = tiny_config(kind, **more)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"{kind} has {parameters:,} parameters at its smallest")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    _fill(model, seed)
    return model.eval()


def outcomes(kind: str, directory: Path) -> dict[str, str]:
    """Return what comes of loading, drafting, pruning and mask inspection of a type: `works`, or the refusal.

    Raises:
        AssertionError: a drafted continuation other than stock greedy's.
    """
    tiny_lm(kind).save_pretrained(directory)
    tiny_tokenizer("llama").save_pretrained(directory)
    result = {"load": _outcome(lambda: load(directory))}
    if result["load"] == "works":
        result |= {name: _outcome(functools.partial(_on_copy, run, directory)) for name, run in OPERATIONS.items()}
    return result


def _on_copy(run: Callable[[Checkpoint], None], directory: Path) -> None:
    run(load(directory))


def _outcome(action: Callable[[], Any]) -> str:
    try:
        action()
    except IntaglioError as error:
        return str(error)
    return "works"


def _draft(checkpoint: Checkpoint) -> None:
    aded = generate(checkpoint, PROMPT, decoder="aded", max_new_tokens=NEW_TOKENS)
    stock = generate(checkpoint, PROMPT, decoder="greedy", max_new_tokens=NEW_TOKENS)
    assert aded["token_ids"] == stock["token_ids"], "ADED differs from stock greedy"


def _masks(checkpoint: Checkpoint) -> None:
    groups(checkpoint.model, 24)


def _wanda(checkpoint: Checkpoint) -> None:
    ids_NT = torch.randint(8, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    Wanda(sparsity=0.5).apply(checkpoint, ids_NT)


OPERATIONS: dict[str, Callable[[Checkpoint], None]] = {"draft": _draft, "masks": _masks, "wanda": _wanda}
