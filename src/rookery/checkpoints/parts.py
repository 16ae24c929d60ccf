"""Files that hold part of a model, adapters and tuned states, recognised so that a refusal can say what is missing."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from rookery.checkpoints.source import Stored, short
from rookery.checkpoints.tuned_state import states_among

ADAPTERS = re.compile(r"\.(lora_[AaBb]|lora_M|bone(_[AB])?|disha|lora_embedding_[AB])(\.|$)")
"""Marks of adapter tensors in the names of RWKV-PEFT and peft."""
EMBEDDINGS = ("emb.weight", "embeddings.weight", "token_embd.weight", "embed_tokens.weight")


def explain_part(tensors: Mapping[str, Stored], where: str) -> str | None:
    """Why these tensors are no model but belong to one, and to which; None if they may be a model."""
    if any(name.endswith(EMBEDDINGS) for name in tensors):
        return None
    marked = [name for name in tensors if ADAPTERS.search(name)]
    if marked:
        return (
            f"this is an adapter ({len(marked)} tensors, as {short(marked[0])}), not a model: it changes "
            f"{_base(tensors, marked, where)}; give that model's file, and this one as its adapter (--adapter)"
        )
    states = states_among(tensors)
    layers = [name for name in states if name.endswith(("time_state", "kstate", "_left"))]
    if layers and len(states) == len(tensors):
        heads = " × ".join(map(str, states[layers[0]].shape))
        return (
            f"this is a tuned state ({len(layers)} layers of {heads}), not a model; "
            "give the model's file, and this one as its state (--state)"
        )
    return None


def _base(tensors: Mapping[str, Stored], marked: list[str], where: str) -> str:
    """The base model in words, from adapter_config.json or the shapes."""
    settings = Path(where) / "adapter_config.json"
    if not settings.is_file():
        settings = Path(where).with_name("adapter_config.json")
    if settings.is_file():
        try:
            base = json.loads(settings.read_bytes()).get("base_model_name_or_path")
        except (ValueError, AttributeError, RecursionError):
            base = None
        if base:
            return f"the model {short(base)}"
    layers = [int(found[1]) for name in tensors if (found := re.search(r"(?:blocks|layers)\.([0-9]{1,4})\.", name))]
    widths = [max(tensors[name].shape) for name in marked if ".att" in name and len(tensors[name].shape) == 2]
    width = f" and width {min(widths)}" if widths else ""
    return f"a base model of {1 + max(layers)} layers{width}" if layers else "a base model"
