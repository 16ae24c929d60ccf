"""Compressed torch models to files and back."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from rookery.checkpoints.checkpoint import Checkpoint, open_checkpoint
from rookery.checkpoints.lite import FACTORED, Manifest, compressed, read_manifest
from rookery.checkpoints.safetensors import write_model
from rookery.compress.hierarchical_head import HierarchicalHead
from rookery.compress.low_rank import LowRank
from rookery.compress.sparsity import Guess, GuessedKey, Predictor, Shadow, pack_bits, unpack_bits
from rookery.errors import BadCheckpoint
from rookery.models import load as load_plain
from rookery.state import from_numpy, to_numpy


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    manifest: Manifest,
    *,
    dtype: np.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Writes a compressed model, as `rookery.checkpoints.lite` describes, with numbers of `dtype` (bfloat16)."""
    tensors, told = compressed(file_tensors(model), manifest, dtype or np.dtype(ml_dtypes.bfloat16))
    write_model(
        path,
        tensors,
        family=model.family,
        config=model.config,
        fingerprint=fingerprint or model.fingerprint(),
        metadata={**(metadata or {}), **told},
    )


def file_tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """A model's weights under their names in files, key and value matrices of channel mixes as they are."""
    tensors: dict[str, Tensor] = {}
    special: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            if module.kind != "simple":
                raise ValueError(f"{name} is an enhanced low-rank projection, which no file of ours holds")
            tensors |= {f"{name}1.weight": module.first.weight, f"{name}2.weight": module.second.weight}
        elif isinstance(module, GuessedKey):
            tensors |= {f"{name}.weight": module.key.weight} | _of_guess(name, module.guess)
        elif isinstance(module, HierarchicalHead):
            order = module.labels.argsort(stable=True)
            starts = nn.functional.pad(module.sizes.cumsum(0), (1, 0))
            tensors |= {"head.sorted.weight": module.head.weight[order], "head_l1.weight": module.first.weight}
            tensors |= {"head.order": order.int(), "head.starts": starts.int()}
        else:
            continue
        special.append(f"{name}.")
    for name, parameter in model.named_parameters():
        if not name.startswith(tuple(special)):
            tensors[name] = parameter
    return {name: _floats(tensor) for name, tensor in tensors.items()}


def _floats(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return to_numpy(tensor.float() if tensor.is_floating_point() else tensor)


def _of_guess(key: str, guess: nn.Module) -> dict[str, Tensor]:
    """Tensors of the guess in place of `blocks.{i}.ffn.key`."""
    if not isinstance(guess, Guess):
        raise ValueError(f"the guess of {key} is none that a file can hold")
    block = key.removesuffix(".ffn.key")
    tensors: dict[str, Tensor] = {}
    if guess.predictor is not None:
        tensors[f"{block}.mlp.fc1.weight"] = guess.predictor.fc1.weight
        tensors[f"{block}.mlp.fc2.weight"] = guess.predictor.fc2.weight
    if guess.shadow is not None:
        tensors[f"{block}.ffn.shadow"] = pack_bits(guess.shadow.codes, guess.shadow.bits)
        if guess.shadow.base is not None and guess.shadow.step is not None:
            tensors[f"{block}.ffn.shadow_levels"] = torch.stack([guess.shadow.base, guess.shadow.step])
    return tensors


def load(path: str | os.PathLike[str] | Checkpoint, *, dtype: torch.dtype | None = None) -> Any:
    """The compressed model in a file, computing what the compiled runtime computes; `rookery.load` gives the plain one.

    BadCheckpoint for a model that is not compressed.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise BadCheckpoint(f"{checkpoint.path!r} is not compressed; rookery.load reads it")
    model = load_plain(checkpoint, dtype=dtype)
    kind = model.emb.weight.dtype

    def weight(name: str) -> Tensor:
        if name not in checkpoint.lite:
            raise BadCheckpoint(f"{checkpoint.path!r} lacks the tensor {name}; compress the original again")
        return from_numpy(checkpoint.lite[name].read()).to(kind)

    with torch.no_grad():
        for name in checkpoint.lite:
            if (found := FACTORED.fullmatch(name)) and found[2] == "1":
                _set(model, found[1], _low_rank(weight(name), weight(f"{found[1]}2.weight")))
        for i, block in enumerate(model.blocks):
            if manifest.sparsity is not None and manifest.sparsity.is_sparse(i):
                block.ffn.key = GuessedKey(block.ffn.key, _guess(manifest, i, checkpoint, weight))
        if manifest.head is not None:
            model.head = _head(manifest, model.head, checkpoint, weight)
    return model.requires_grad_(False)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def _low_rank(first: Tensor, second: Tensor) -> LowRank:
    low = LowRank(first.shape[1], second.shape[0], first.shape[0])
    low.first.weight, low.second.weight = nn.Parameter(first), nn.Parameter(second)
    return low


def _guess(manifest: Manifest, layer: int, checkpoint: Checkpoint, weight: Any) -> Guess:
    sparsity, predictor, shadow = manifest.sparsity, None, None
    assert sparsity is not None
    threshold, quantile = sparsity.thresholds[layer], sparsity.quantiles[layer]
    config = checkpoint.config
    if threshold is not None:
        predictor = Predictor(config.hidden_size, config.intermediate_size, sparsity.rank)
        for part in ("fc1", "fc2"):
            getattr(predictor, part).weight = nn.Parameter(weight(f"blocks.{layer}.mlp.{part}.weight"))
    if quantile is not None:
        at = f"blocks.{layer}.ffn.shadow"
        weight(at)  # complains where it is missing
        codes = unpack_bits(from_numpy(checkpoint.lite[at].read()), config.hidden_size)
        levels = weight(f"{at}_levels").float() if sparsity.levels == "row" else (None, None)
        shadow = Shadow(codes, sparsity.bits, *levels)
    return Guess(predictor, shadow, threshold=threshold or 0.0, quantile=1.0 if quantile is None else quantile)


def _head(manifest: Manifest, head: nn.Linear, checkpoint: Checkpoint, weight: Any) -> HierarchicalHead:
    first_weight = weight("head_l1.weight")
    order, starts = (from_numpy(checkpoint.lite[name].read()).long() for name in ("head.order", "head.starts"))
    labels = torch.empty_like(order)
    labels[order] = torch.arange(len(starts) - 1).repeat_interleave(starts.diff())
    first = nn.Linear(head.in_features, len(starts) - 1, bias=False)
    first.weight = nn.Parameter(first_weight)
    settings = {name: value for name, value in asdict(manifest.head).items() if name != "clusters"}
    return HierarchicalHead(head, first, labels, **settings)
