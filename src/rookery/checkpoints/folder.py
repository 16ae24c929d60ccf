"""Folders of Hugging Face's shape: weights in one file or in shards with an index, beside them a config.json."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rookery.checkpoints.detect import read_file
from rookery.checkpoints.source import Source, short
from rookery.errors import BadCheckpoint
from rookery.families import based

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAIN = ("model.safetensors", "pytorch_model.bin")
SINGLE = ("*.safetensors", "*.pth")


def read_folder(path: str | os.PathLike[str]) -> Source:
    """The tensors of the one model in a folder; BadCheckpoint if there is none or more than one."""
    folder = Path(path)
    hints = _hints(folder / "config.json")
    for index in INDEXES:
        if (folder / index).is_file():
            source = _sharded(folder, _json(folder / index).get("weight_map"))
            break
    else:
        source = read_file(_only_file(folder))
    return replace(source, hints=hints)


def _only_file(folder: Path) -> Path:
    for name in MAIN:
        if (folder / name).is_file():
            return folder / name
    found: list[Path] = []
    for pattern in SINGLE:
        found += sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise BadCheckpoint(
            f"{str(folder)!r} should hold model.safetensors, its index, or one other .safetensors or .pth file; "
            f"found: {names}. Name the file itself"
        )
    return found[0]


def _sharded(folder: Path, weight_map: Any) -> Source:
    where = str(folder)
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise BadCheckpoint(f"{where!r}: the index does not say which file each tensor is in (weight_map)")
    shards: dict[str, Source] = {}
    for shard in dict.fromkeys(weight_map.values()):
        # an index may name files beside it and nothing else: "../../secret" or "/etc/x" is an attack
        if Path(shard).name != shard or "\\" in shard or not (folder / shard).is_file():
            raise BadCheckpoint(f"{where!r}: the index names the file {short(shard)}, which is not in the folder")
        shards[shard] = read_file(folder / shard)
    tensors = {}
    for name, shard in weight_map.items():
        if name not in shards[shard].tensors:
            raise BadCheckpoint(f"{where!r}: the index puts {short(name)} into {short(shard)}, where it is not")
        tensors[name] = shards[shard].tensors[name]
    first = next(iter(shards.values()))
    return Source(first.format, tensors, first.metadata)


def _hints(config: Path) -> dict[str, Any]:
    """Settings of a config.json, the head size among them where it is only implied."""
    if not config.is_file():
        return {}
    hints = _json(config)
    if "alt_mixer" in hints:
        hints |= based.hints(hints)
    # how often transformers halves the stream when it runs the model; the weights in the file are not divided for it
    hints.pop("rescale_every", None)
    width, heads = hints.get("hidden_size"), hints.get("num_attention_heads")
    if type(width) is int and type(heads) is int and heads > 0:
        hints.setdefault("head_dim", width // heads)
    if isinstance(positions := hints.get("rope_parameters"), dict) and "rope_theta" in positions:
        hints.setdefault("rope_theta", positions["rope_theta"])  # where transformers 5 writes it
    if "rope_theta" in hints:  # of attention that hybrids keep, whatever their time mix does
        hints.setdefault("attention_rope_theta", hints["rope_theta"])
    if "head_dim" in hints:
        hints.setdefault("attention_head_dim", hints["head_dim"])
    if hints.get("use_rope") is False:
        hints["rope_theta"] = None
    names = (
        ("layer_norm_epsilon", "layer_norm_eps"),
        ("norm_eps", "layer_norm_eps"),
        ("groupnorm_att", "has_group_norm"),
    )
    for theirs, ours in names:
        if theirs in hints:
            hints.setdefault(ours, hints[theirs])
    return hints


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise BadCheckpoint(f"{str(path)!r} is damaged: it is not JSON") from None
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{str(path)!r} is damaged: it is not a JSON table")
    return content
