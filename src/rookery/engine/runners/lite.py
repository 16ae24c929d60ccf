"""Compressed models (RWKV-Lite) as the compiled runtime takes them, and what of them a run reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rookery.checkpoints.checkpoint import Checkpoint
from rookery.checkpoints.lite import NEURONS, Manifest, Sparsity, read_manifest
from rookery.checkpoints.source import Stored
from rookery.errors import BadCheckpoint

SORTED = "head.sorted.weight"


def file_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The weights of a compressed model under the names that the runtime knows; indices and shadows are not weights."""
    others = ("head.order", "head.starts")
    return {
        "head.weight" if name == SORTED else name: tensor
        for name, tensor in checkpoint.lite.items()
        if name not in others and not name.endswith(("ffn.shadow", "ffn.shadow_levels"))
    }


def guessing(checkpoint: Checkpoint, lean: bool = False) -> dict[str, Any]:
    """What `rookery._native.Model` takes as `lite`; BadCheckpoint where manifest and tensors do not fit.

    With `lean` units, rows of the head and of the embedding are read from the file into small buffers when they are
    needed, in place of touching pages of the mapped file.
    """
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    layers, config = checkpoint.config.num_hidden_layers, checkpoint.config
    told: dict[str, Any] = {"embedding_rows": manifest.embedding_rows, "layers": []}
    if lean and (found := _mapped_file(checkpoint.lite["emb.weight"].read())):
        told["file"], told["mapped"] = found
    if manifest.sparsity is not None:
        if len(manifest.sparsity.thresholds) != layers:
            raise BadCheckpoint(
                f"{checkpoint.path!r}: its manifest has thresholds of {len(manifest.sparsity.thresholds)} layers, "
                f"the model has {layers}"
            )
        told["layers"] = [
            _layer(manifest.sparsity, i, checkpoint.lite, config.intermediate_size) for i in range(layers)
        ]
    if manifest.head is not None:
        told["clusters"] = {
            "starts": _numbers(checkpoint.lite, "head.starts"),
            "order": _numbers(checkpoint.lite, "head.order"),
            "mass": manifest.head.mass,
            "fewest": manifest.head.fewest,
            "most": manifest.head.most,
        }
    return told


def _mapped_file(tensor: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Path and bytes of the mapped file that a tensor lies in."""
    memory: Any = tensor
    while isinstance(memory, np.ndarray) and not isinstance(memory, np.memmap):
        memory = memory.base
    if not isinstance(memory, np.memmap) or memory.filename is None:
        return None
    return str(memory.filename), memory.view(np.ndarray)


def _numbers(tensors: Mapping[str, Stored], name: str) -> np.ndarray:
    if name not in tensors:
        raise BadCheckpoint(f"the compressed model lacks the tensor {name}; compress the original again")
    return np.ascontiguousarray(tensors[name].read(), np.int32)


def _layer(sparsity: Sparsity, layer: int, tensors: Mapping[str, Stored], hidden: int) -> dict[str, Any]:
    threshold, quantile = sparsity.thresholds[layer], sparsity.quantiles[layer]
    told: dict[str, Any] = {"rank": 0, "least": 0.0, "kept": 0}
    if threshold is not None:
        told |= {"rank": sparsity.rank, "least": logit(threshold)}
    if quantile is not None:
        at = f"blocks.{layer}.ffn.shadow"
        if at not in tensors:
            raise BadCheckpoint(f"the compressed model lacks the tensor {at}; compress the original again")
        told |= {"kept": kept_units(quantile, hidden), "planes": sparsity.bits, "bits": tensors[at].read()}
        if sparsity.levels == "row":
            levels = tensors[f"{at}_levels"].read().astype(np.float32)
            told |= {"base": np.ascontiguousarray(levels[0]), "step": np.ascontiguousarray(levels[1])}
    return told


def logit(probability: float) -> float:
    """The number whose logistic function this is: a unit is used if its predictor's output is above it."""
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


def kept_units(quantile: float, hidden: int) -> int:
    """How many units a shadow chooses for a token: those whose scores are the largest."""
    return round((1 - quantile) * hidden)


@dataclass(frozen=True)
class Reads:
    """What a compressed model's runs read, as counts of the runtime."""

    units: float
    """Share of the sparse layers' hidden units whose weights a step reads."""
    rows: float
    """Share of the head's rows."""
    clusters: float
    """Clusters of the head, on average."""
    hits: float
    """Share of the look-ups in the embedding that the cache answers."""

    @classmethod
    def between(cls, before: Mapping[str, int], after: Mapping[str, int], vocab_size: int) -> Reads:
        count = {name: after[name] - before[name] for name in after}
        looked_up = count["hits"] + count["misses"]
        return cls(
            units=count["units"] / count["of_units"] if count["of_units"] else 1.0,
            rows=count["head_rows"] / (count["heads"] * vocab_size) if count["heads"] else 1.0,
            clusters=count["head_clusters"] / count["heads"] if count["heads"] else 0.0,
            hits=count["hits"] / looked_up if looked_up else 0.0,
        )


def resident_bytes(checkpoint: Checkpoint, reads: Reads) -> dict[str, int]:
    """Part -> bytes of weights that a step of decoding needs in memory: all but units and rows that it does not read.

    The parts are those of `rookery.engine.memory`.
    """
    from rookery.engine.memory import part_of

    manifest = read_manifest(checkpoint) or Manifest()
    sizes: dict[str, int] = {}
    for name, tensor in (checkpoint.lite or checkpoint.tensors).items():
        nbytes = float(tensor.nbytes)
        if name.endswith(NEURONS):
            nbytes *= reads.units
        elif name == SORTED:
            nbytes *= reads.rows
        elif name == "emb.weight" and manifest.embedding_rows:
            nbytes *= min(1.0, manifest.embedding_rows / tensor.shape[0])
        part = part_of(name)
        sizes[part] = sizes.get(part, 0) + round(nbytes)
    return sizes
