"""State files: what a model remembers, as safetensors with a fingerprint of the model. Both runners share them.

Tensor names are "layers.<i>.<field>" and "shared.<field>" plus "tokens_seen" (int64 [rows]); recurrent matrices are
[rows, head, value, key]. A session's file also has "session.<name>": what a conversation keeps beside the state.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ml_dtypes
import numpy as np

from rookery.checkpoints.atomic import replacing
from rookery.errors import BadState

FORMAT = "rookery-state-1"
SESSION_PREFIX = "session."
"""Begins the names of tensors that are no part of the model's state."""


def sizes(config: Any) -> dict[str, Any]:
    """The whole numbers of a config, and its lists of them: two models share states only if these are equal."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if isinstance(value, int | tuple)
    }


def fingerprint(family: str, config: Any, embedding: np.ndarray, final_norm: np.ndarray) -> str:
    """Names a model by its family, its sizes and a sample of its weights, the same in every format that keeps them.

    `embedding` holds the first 16 rows of the embedding (before any folding), `final_norm` the last norm's weight; both
    are rounded to bfloat16 first, so that a float32 copy of a bfloat16 file is the same model.
    """
    import hashlib  # here: most answers need no fingerprint and should not wait for it

    digest = hashlib.sha256(json.dumps([family, sizes(config)], sort_keys=True).encode())
    for sample in (embedding[:16], final_norm):
        digest.update(np.ascontiguousarray(sample, dtype=np.float32).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()[:32]


def write_state(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], *, model: str) -> None:
    """Writes a state file; `model` is the fingerprint of the model of its owner. OSError on a full disk."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(arrays, temporary, metadata={"format": FORMAT, "model": model, "sha256": _checksum(arrays)})
        except SafetensorError as full:
            raise OSError(f"cannot write {os.fspath(path)!r}: {full}") from None


def read_state(path: str | os.PathLike[str], *, model: str) -> dict[str, np.ndarray]:
    """Tensors of a state file; BadState if it is damaged, no state file, or another model's."""
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise BadState(f"there is no state file {os.fspath(path)!r}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BadState(
                    f"{os.fspath(path)!r} is no state file of this library (format {metadata.get('format')!r})"
                )
            if metadata.get("model") != model:
                raise BadState(
                    f"{os.fspath(path)!r} is the state of another model "
                    f"(fingerprint {metadata.get('model')}, this model has {model}); use the model that made it"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as damage:
        raise BadState(f"{os.fspath(path)!r} is damaged or no state file: {damage}") from None
    if _checksum(arrays) != metadata.get("sha256"):
        raise BadState(f"{os.fspath(path)!r} is damaged: its contents do not match its checksum")
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
