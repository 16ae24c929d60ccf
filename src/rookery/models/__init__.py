"""Torch models by name or from a file."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.checkpoints.safetensors import write_model
from rookery.checkpoints.source import BFLOAT16, Stored
from rookery.checkpoints.tuned_state import states_among
from rookery.nn.initial import WithoutInit
from rookery.registry import Family, configure, families
from rookery.state import from_numpy, to_numpy

log = logging.getLogger("rookery")

DTYPES = {
    np.dtype(np.float64): torch.float64,
    np.dtype(np.float16): torch.float16,
    BFLOAT16: torch.bfloat16,
}
"""Type of a file's numbers -> type of the model loaded from it; float32 for all others."""


def build(family: Family, config: Any) -> torch.nn.Module:
    """The family's module for `config`, its weights not yet set."""
    module, _, name = family.builder.partition(":")
    model = getattr(importlib.import_module(module), name)
    with WithoutInit():
        return model(config)


def create_model(
    name: str, *, seed: int = 0, device: str | None = None, dtype: torch.dtype | None = None, **overrides: Any
):
    """A model with its published initial weights.

    `name` is a preset ("rwkv7-0.1b") or a family ("rwkv7"); `overrides` replace fields of its config. The weights are
    the same for the same `seed`, whatever the device, and rounded for a narrower `dtype`. On `device="meta"` nothing is
    allocated. Raises UnknownName for a name or field that does not exist.
    """
    family, config = configure(name, **overrides)
    with torch.device(device or "cpu"):
        model = build(family, config)
    model = model.to(dtype=dtype)
    if device != "meta":
        model.init_weights(seed)
    return model


def load(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    adapter: str | os.PathLike[str] | None = None,
    adapter_alpha: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """The model in a file or folder of any readable format, with the file's precision unless `dtype` is given.

    `adapter` is a file of RWKV-PEFT or a folder of peft that is merged into the weights; `adapter_alpha` the alpha of a
    LoRA whose file does not say it. `settings` are fields of the config that no file tells, as {"bits": 4} for ROSA.
    `path` may be an open checkpoint.

    A model has one dtype: that of most numbers in the file; quantised weights become float32. Nothing in the file is
    executed. Raises BadCheckpoint for a file that is damaged, of no registered family, or with weights missing, unknown
    or of the wrong shape.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path, settings=settings)
    if adapter is not None:
        from rookery.checkpoints.adapter import adapted

        checkpoint = adapted(checkpoint, adapter, alpha=adapter_alpha)
    states = states_among(checkpoint.kept)
    if states:
        log.info("%s carries a tuned state; State.load(path, model) gives it", checkpoint.path)
    if unused := [name for name in checkpoint.unused if name not in states]:
        log.info("%s: not used by %s: %s", checkpoint.path, checkpoint.family.name, ", ".join(unused))
    if checkpoint.lite:
        log.info("%s is compressed; this is the plain model, rookery.compress.load gives the other", checkpoint.path)
    dtype = dtype or DTYPES.get(checkpoint.dtype, torch.float32)
    with torch.device("cpu"):
        model = build(checkpoint.family, checkpoint.config)
    _fill(model, checkpoint, torch.device(device or "cpu"), dtype)
    if "fingerprint" in checkpoint.metadata and hasattr(model, "known_as"):
        model.known_as(checkpoint.metadata["fingerprint"])
    return model


def save_model(
    model: torch.nn.Module, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a model as safetensors under official names, with its family, config and fingerprint in the metadata.

    `metadata` adds text, such as "tokenizer". The file is whole or absent.
    """
    family = families()[model.family]
    weights = model.state_dict()
    tensors = {name: _unwritten(weights[name]) for name in family.tensor_shapes(model.config)}
    write_model(
        path,
        tensors,
        family=family.name,
        config=model.config,
        fingerprint=model.fingerprint(),
        metadata=metadata,
    )


def _unwritten(weight: torch.Tensor) -> Stored:
    """The weight as a tensor that is copied to the CPU when it is written."""
    dtype = to_numpy(weight.new_empty(0)).dtype
    return Stored(tuple(weight.shape), dtype, lambda: to_numpy(weight), dtype.name, weight.numel() * dtype.itemsize)


@torch.no_grad()
def _fill(model: torch.nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Puts the file's tensors into the model, one at a time, so that memory never holds two copies of the weights."""
    parameters = dict(model.named_parameters())
    for name in checkpoint:
        # `.data` keeps the Parameter itself, and with it weights that two modules share
        parameters.pop(name).data = from_numpy(checkpoint[name]).to(device=device, dtype=dtype)
    assert not parameters, f"{checkpoint.family.name}: tensor_shapes leaves out {sorted(parameters)}"
    model.to(device=device, dtype=dtype)  # buffers
