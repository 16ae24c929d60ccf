"""The config.json of folders that transformers and flash-linear-attention read (core.md 2.2)."""

from typing import Any

CONVERTED = {
    "arwkv": ("rwkv_hybrid", "RwkvHybridForCausalLM"),
    "rad-rwkv6": ("rwkv6qwen2", "RWKV6Qwen2ForCausalLM"),
    "rad-rwkv7": ("rwkv7qwen2", "RWKV7Qwen2ForCausalLM"),
}
"""Converted transformers -> model type and class of the published models."""


def config_json(family: str, layout: str, config: Any, dtype: str) -> dict[str, Any]:
    """Settings of a model for the layout "hf" or "fla"; what only we read has the names of our config's fields."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if family in CONVERTED:
        return shared | _converted(family, config)
    if layout == "hf":
        return shared | _hugging_face(family, config)
    heads = {
        "attn_mode": "chunk",
        "num_heads": config.num_heads,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": config.layer_norm_eps,
        "fuse_norm": True,
        "fuse_cross_entropy": True,
        "hidden_act": "sqrelu",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_ratio": config.intermediate_size / config.hidden_size,
    }
    return shared | heads | (_fla_6(config) if family == "rwkv6" else _fla_7(config))


def _hugging_face(family: str, config: Any) -> dict[str, Any]:
    kinds = {"rwkv4": ("rwkv", "RwkvForCausalLM"), "rwkv5": ("rwkv5", "Rwkv5ForCausalLM")}
    kind, name = kinds.get(family, ("rwkv6", "Rwkv6ForCausalLM"))
    settings = {
        "architectures": [name],
        "model_type": kind,
        "attention_hidden_size": config.hidden_size,
        "layer_norm_epsilon": config.layer_norm_eps,
        "rescale_every": 6,
        "context_length": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family != "rwkv4":
        settings |= {"head_size": config.head_dim, "head_size_divisor": 8}
    return settings


def _fla_7(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "head_dim": config.head_dim,
        "decay_low_rank_dim": config.decay_rank,
        "a_low_rank_dim": config.rate_rank,
        "v_low_rank_dim": config.value_rank,
        "gate_low_rank_dim": config.gate_rank,
        "value_dim": [config.hidden_size] * config.num_hidden_layers,
        "use_l2warp": False,
    }


def _fla_6(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["RWKV6ForCausalLM"],
        "model_type": "rwkv6",
        "expand_k": 1.0,
        "expand_v": 1.0,
        "proj_low_rank_dim": config.mix_rank,
        "gate_low_rank_dim": config.decay_rank,  # fla's name for the rank of the decay
        "group_norm_eps": config.group_norm_eps,
    }


def _hybrid(family: str, config: Any) -> dict[str, Any]:
    """Which blocks keep attention, as the published code is told, and the sizes of that attention."""
    kept, layers = config.attention_layers, config.num_hidden_layers
    theta = {"attention_rope_theta": config.attention_rope_theta}
    if family == "arwkv":
        mixed = [i for i in range(layers) if i not in kept]
        sizes = {"attention_head_dim": config.attention_head_dim, "head_dim": config.head_dim}
        heads = {"num_attention_heads": config.attention_heads, "num_key_value_heads": config.attention_kv_heads}
        return theta | sizes | heads | {"wkv_layers": mixed, "rope_theta": config.attention_rope_theta}
    last = kept == tuple(range(layers - len(kept), layers))
    return theta | ({"num_attention_layers": len(kept)} if last else {"attention_layers": list(kept)})


def _converted(family: str, config: Any) -> dict[str, Any]:
    kind, name = CONVERTED[family]
    settings = {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", config.num_heads),
    }
    if config.attention_layers:
        settings |= _hybrid(family, config)
    if family == "arwkv":
        return settings | {
            "head_size": config.head_dim,
            "head_size_divisor": 8,
            "wkv_version": 7,
            "wkv_has_gate": config.gate != "none",
            "wkv_has_group_norm": config.has_group_norm,
            "gate": config.gate,
        }
    settings |= {
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias,
        "attention_output_bias": False,
        "balance_state": config.balance_state,
        "lora_rank_decay": config.decay_rank,
    }
    if family == "rad-rwkv6":
        rank = {"full": 1, "low-rank": 2, "none": 0}[config.gate]
        return settings | {
            "lora_rank_tokenshift": config.mix_rank,
            "lora_rank_gate": config.gate_rank,
            "gate_rank_type": rank,
            "use_tokenshift": True,
            "use_rope": False,
            "groupnorm_att": False,
        }
    return settings | {
        "lora_rank_iclr": config.rate_rank,
        "lora_rank_value_residual_mix": config.value_rank,
        "lora_rank_gate": config.gate_rank,
        "gate_rank_type": 2,
        "use_tokenshift": False,
        "use_rope": config.rope_theta is not None,
        "rope_theta": config.rope_theta or 1e6,
        "groupnorm_att": config.has_group_norm,
    }
