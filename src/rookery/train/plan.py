"""What a run will take, before it runs: parameters, tokens, memory, time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rookery.models import build
from rookery.registry import configure
from rookery.tokenizers import load_tokenizer
from rookery.train.config import TrainConfig
from rookery.train.parallel import device_of

REACHED = 0.4
"""Share of the speed of a large matrix product that a training step reaches, all else included: a rule of thumb."""
MOMENTS = {"adamw": 8, "muon": 8, "adamw-8bit": 2, "schedule-free": 8}
"""Bytes an optimiser keeps for each weight, at most."""


@dataclass(frozen=True)
class Plan:
    """Estimates for a run on one process."""

    parameters: int
    tokens: int
    """Of the whole run."""
    weights: int
    """Bytes of weights, gradients and the optimiser's moments."""
    activations: int
    """Bytes that the forward pass keeps for the backward pass."""
    seconds: float

    def lines(self) -> str:
        per_token = self.tokens / self.parameters
        return "\n".join(
            (
                f"parameters: {self.parameters:,}",
                f"tokens: {self.tokens:,} ({per_token:.1f} for each parameter)",
                f"memory: about {_bytes(self.weights + self.activations)} ({_bytes(self.weights)} weights, gradients "
                f"and moments, {_bytes(self.activations)} activations)",
                f"time: about {_duration(self.seconds)} on this machine, at {REACHED:.0%} of the speed that a matrix "
                "product was just measured at",
            )
        )


def plan(config: TrainConfig) -> Plan:
    """Estimates for `config`. ValueError, or FileNotFoundError for its tokenizer, where it does not say enough."""
    if type(config) is not TrainConfig or config.initial:
        raise ValueError("estimates are made of language models that are named, not of files and of other tasks")
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    family, model_config = configure(config.model, **{"vocab_size": vocab_size, **config.overrides})
    shapes = family.tensor_shapes(model_config)
    count = sum(map(prod, shapes.values()))
    step = config.batch_size * config.data.sequence_length
    # masters, moments and a float32 gradient; beside float32 masters a bfloat16 model has copies of its own
    each = 4 + MOMENTS[config.optim.name] + 4 + (4 if config.dtype == "bfloat16" else 0)
    # products alone: 2 operations a weight forward, 4 backward; the embedding is looked up
    products = sum(prod(s) for n, s in shapes.items() if sum(d > 1 for d in s) >= 2 and not n.startswith("emb"))
    readings = 8 if config.recompute else 6
    speed = _measured_speed(config, model_config.hidden_size)
    tokens = step * config.steps
    return Plan(
        count, tokens, count * each, _activations(config, family, model_config), readings * products * tokens / speed
    )


def _activations(config: TrainConfig, family: Any, model_config: Any) -> int:
    """Bytes of the tensors that autograd keeps, counted on tensors without memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, int] = {}
    alive: list[Any] = []
    rows = max(1, config.batch_size // config.accumulate)
    length = min(config.data.sequence_length, config.piece_length or config.data.sequence_length)
    tokens = (rows, length // config.context_parallel)
    with FakeTensorMode():
        model = build(family, model_config)
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):  # `to` cannot change tensors without memory
                setattr(module, name, nn.Parameter(p.to(getattr(torch, config.dtype))))

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage.nbytes()
                alive.append(storage)  # or the address might be given to another
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # the head's part is computed in chunks and not kept
            features, _ = model.features(torch.zeros(tokens, dtype=torch.int64), None, None)
    layers = model_config.num_hidden_layers
    total = sum(kept.values())
    # recomputing keeps the two inputs of each block's mixers and, for a while, one block
    return 2 * layers * features.nbytes + total // layers if config.recompute else total


def _measured_speed(config: TrainConfig, width: int) -> float:
    """Operations a second that a training step of this size may reach."""
    device, dtype = device_of(config.device), getattr(torch, config.dtype)
    rows = min(8192, max(64, config.batch_size * config.data.sequence_length // config.accumulate))
    a = torch.ones(rows, width, device=device, dtype=dtype)
    b = torch.ones(width, 4 * width, device=device, dtype=dtype)
    a @ b
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return REACHED * 2 * a.numel() * b.shape[1] / best


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
