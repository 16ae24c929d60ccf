"""What a model file is, as a dictionary and as text: `rookery inspect FILE`."""

import math
import os
from collections import Counter
from dataclasses import asdict
from typing import Any

from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.checkpoints.tuned_state import states_among
from rookery.errors import BadTokenizer, MissingDependency


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A summary that JSON can hold; BadCheckpoint for anything that is no readable model.

    Keys: `path`, `format`, `layout`, `family`, `config`, `parameters`, `tensors`, `bytes` (encoding -> bytes in the
    file), `tokenizer` (None if nothing tells), `unused`, `tuned_state` (does it carry one), `fingerprint`,
    `metadata`.
    """
    return describe(open_checkpoint(path))


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The summary of an open checkpoint."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.encoding] += tensor.nbytes
    states = states_among(checkpoint.kept)
    own = {"format", "rookery", "family", "config", "fingerprint", "tokenizer", "tokenizer.ggml.tokens"}
    own |= {"tokenizer.ggml.merges", "tokenizer.ggml.token_type"}
    return {
        "path": checkpoint.path,
        "format": checkpoint.format,
        "layout": checkpoint.layout,
        "family": checkpoint.family.name,
        "config": asdict(checkpoint.config),
        "parameters": sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        "tensors": len(checkpoint),
        "bytes": dict(sizes.most_common()),
        "tokenizer": _tokenizer(checkpoint),
        "unused": [name for name in checkpoint.unused if name not in states],
        "tuned_state": bool(states),
        "fingerprint": checkpoint.fingerprint(),
        "metadata": {key: value for key, value in checkpoint.metadata.items() if key not in own},
    }


def _tokenizer(checkpoint: Checkpoint) -> str | None:
    """Name of the tokenizer that the file, what lies beside it, or the vocabulary's size tells."""
    from rookery.tokenizers import resolve

    vocab_size = getattr(checkpoint.config, "vocab_size", None)
    if vocab_size is None:
        return None
    try:
        return resolve(vocab_size=vocab_size, path=checkpoint.path, metadata=checkpoint.metadata).name
    except (BadTokenizer, MissingDependency):
        return None


def render(summary: dict[str, Any]) -> str:
    """The summary as lines of text."""
    naming = "" if summary["layout"] in ("official", summary["format"]) else f", {summary['layout']} names"
    rows = {
        "file": summary["path"],
        "format": summary["format"] + naming,
        "family": summary["family"],
        "parameters": f"{summary['parameters']:,} in {summary['tensors']} tensors",
        "weights": ", ".join(f"{encoding} {readable(size)}" for encoding, size in summary["bytes"].items()),
        "tokenizer": summary["tokenizer"] or "none found; name one with --tokenizer",
        "fingerprint": summary["fingerprint"],
        **({"tuned state": "carried along; texts start from it"} if summary["tuned_state"] else {}),
        **({"not used": ", ".join(summary["unused"])} if summary["unused"] else {}),
        **{f"config.{key}": value for key, value in summary["config"].items()},
        **{f"metadata.{key}": _cut(value) for key, value in summary["metadata"].items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())


def readable(nbytes: int) -> str:
    """Bytes with a unit of 1000s: "3.2 MB"."""
    size, units = float(nbytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{nbytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:200] + " …"
