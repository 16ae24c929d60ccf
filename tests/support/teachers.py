"""Tiny transformers to be converted, in memory and as folders of Hugging Face's shape."""

import json
from pathlib import Path

import numpy as np
import torch
from support.language import randomise

from rookery.checkpoints.safetensors import write_safetensors
from rookery.models import create_model
from rookery.models.transformer import Transformer

LOW = {"decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 8}
"""Ranks of RWKV-7 students as small as these teachers."""
RANKS = {"arwkv": {**LOW, "head_dim": 8}, "rad-rwkv7": LOW, "rad-rwkv6": {"mix_rank": 4, "decay_rank": 4}}
"""Settings of each student."""


def teacher(dtype: torch.dtype = torch.float32, **overrides) -> Transformer:
    """Two blocks, 32 wide, four query heads that share two key heads; away from its initial weights."""
    model = create_model("transformer-test", dtype=dtype, **overrides)
    return randomise(model).requires_grad_(False).eval()


def folder(path: Path, model: Transformer, shards: int = 1, **settings) -> Path:
    """The model as transformers writes it: config.json and one or several files of weights."""
    path.mkdir(parents=True, exist_ok=True)
    config = model.config
    tensors = {name: weight.numpy().copy() for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    told = {
        "model_type": "qwen2" if config.qkv_bias else "llama",
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    (path / "config.json").write_text(json.dumps(told | settings))
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
        return path
    places = {}
    for i, names in enumerate(np.array_split(list(tensors), shards)):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(path / file, {str(name): tensors[name] for name in names}, {"format": "pt"})
        places |= {str(name): file for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path
