"""What a run will take, before it runs: parameters, tokens, memory, time."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from rookery.adapt.config import ADAPTERS, AdaptConfig
from rookery.adapt.peft import adapted_layers, adapter_tensors, attach
from rookery.adapt.state_tuning import StartState
from rookery.checkpoints import open_checkpoint
from rookery.engine.llm import EMBEDDED
from rookery.models import build
from rookery.registry import configure
from rookery.tokenizers import load_tokenizer
from rookery.train.config import FinetuneConfig, TrainConfig
from rookery.train.parallel import device_of

REACHED = 0.4
"""Share of the speed of a large matrix product that a training step reaches, all else included: a rule of thumb."""
MOMENTS = {"adamw": 8, "muon": 8, "adamw-8bit": 2, "schedule-free": 8}
"""Bytes an optimiser keeps for each weight, at most."""


@dataclass(frozen=True)
class Plan:
    """Estimates for a run on one process."""

    parameters: int
    trained: int
    """Of these, or beside them, numbers that learn."""
    tokens: int
    """Of the whole run; of documents, at most."""
    weights: int
    """Bytes of weights, gradients and the optimiser's moments."""
    activations: int
    """Bytes that the forward pass keeps for the backward pass."""
    seconds: float

    def lines(self) -> str:
        per_token = self.tokens / self.parameters
        learn = "" if self.trained == self.parameters else f", {self.trained:,} numbers learn"
        return "\n".join(
            (
                f"parameters: {self.parameters:,}{learn}",
                f"tokens: {self.tokens:,} ({per_token:.1f} for each parameter)",
                f"memory: about {_bytes(self.weights + self.activations)} ({_bytes(self.weights)} weights, gradients "
                f"and moments, {_bytes(self.activations)} activations)",
                f"time: about {_duration(self.seconds)} on this machine, at {REACHED:.0%} of the speed that a matrix "
                "product was just measured at",
            )
        )


def plan(config: TrainConfig) -> Plan:
    """Estimates for `config`. ValueError, or FileNotFoundError for its tokenizer, where it does not say enough."""
    if type(config) not in (TrainConfig, FinetuneConfig) or (config.initial and config.train_only):
        raise ValueError("estimates are made of language models that learn text, answers or preferences")
    family, model_config = _model(config)
    shapes = family.tensor_shapes(model_config)
    count = sum(map(prod, shapes.values()))
    trained, held = _learning(config, family, model_config, count)
    # masters, moments and a float32 gradient; beside float32 masters a bfloat16 model has copies of its own
    each = 4 + MOMENTS[config.optim.name] + 4 + (4 if config.dtype == "bfloat16" else 0)
    # products alone: 2 operations a weight forward, 4 backward, 2 where it stands still; the embedding is looked up
    products = sum(prod(s) for n, s in shapes.items() if sum(d > 1 for d in s) >= 2 and not n.startswith("emb"))
    readings = (6 if trained == count else 4) + (2 if config.recompute else 0)
    speed = _measured_speed(config, model_config.hidden_size)
    tokens = config.batch_size * config.data.sequence_length * config.steps
    activations = _activations(config, family, model_config)
    return Plan(count, trained, tokens, trained * each + int(held), activations, readings * products * tokens / speed)


def _model(config: TrainConfig) -> tuple[Any, Any]:
    """Family and sizes of what is trained."""
    path = config.base if isinstance(config, FinetuneConfig) else config.initial
    if path:
        found = open_checkpoint(EMBEDDED if path == "embedded" else path)
        return found.family, found.config
    if isinstance(config, FinetuneConfig):
        raise ValueError("no model to fine-tune: give base, for example --set base=model.pth or base=embedded")
    vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    return configure(config.model, **{"vocab_size": vocab_size, **config.overrides})


HELD = {"": 0, "int8": 1 + 4 / 64, "int4": 0.5 + 4 / 32}
"""Bytes of a weight under an adapter, scales among them (`rookery.adapt.quantised`); 0: as the rest."""


def _learning(config: TrainConfig, family: Any, model_config: Any, count: int) -> tuple[int, float]:
    """How many numbers learn, and the bytes of the weights that stand still; counted on tensors without memory."""
    adapt = config.adapt if isinstance(config, FinetuneConfig) else AdaptConfig(method="full")
    if adapt.method == "full":
        return count, 0.0
    float_bytes = getattr(torch, config.dtype).itemsize
    with torch.device("meta"):
        model = build(family, model_config)
    if adapt.method == "state":
        if adapt.features:
            raise ValueError("the memory of a kernel state is not estimated; leave out adapt.features to see the rest")
        return sum(p.numel() for p in StartState(model, shifts=adapt.shifts).parameters()), count * float_bytes
    if adapt.method not in ADAPTERS:
        raise ValueError(f"the memory of adapt.method={adapt.method} is not estimated")
    # PiSSA decomposes weights, of which there are none here; its numbers are LoRA's
    attach(model, replace(adapt, method="lora") if adapt.method == "pissa" else adapt)
    adapted = sum(layer.get_base_layer().weight.numel() for layer in adapted_layers(model).values())
    rounded = HELD[adapt.base] or float_bytes
    held = (count - adapted) * float_bytes + adapted * rounded
    return sum(t.numel() for t in adapter_tensors(model).values()), held


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
