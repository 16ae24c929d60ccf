"""Several adapters on one base in memory: each request is answered with its own, and none is merged.

The base's linear layers are watched by hooks, which add what the adapter in use says. LoRA, PiSSA, MiSS and mini cost
their own small matrices; BAT and DoRA, which change the weights they find, a copy of these weights each.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from rookery.checkpoints import adapter_rules as rules
from rookery.checkpoints.adapter import SHARED, Adapter, digest_of, read_adapter
from rookery.engine.runners.torch import TorchRunner
from rookery.errors import unknown
from rookery.nn.language_model import LanguageModel

Change = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""Layer, its input and its output -> its output with the adapter."""


class HotAdapters:
    """A base and the adapters that it can answer with.

    `adapters.load("mine", path)`, then `LLM.from_runner(adapters.runner("mine"))`; any number of such runners share the
    base's weights. `runner(None)` is the base itself. Runners may belong to several
    threads, which wait for each other; `using` is for one.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model.eval()
        self.changes: dict[str, dict[str, Change]] = {}
        self.digests: dict[str, str] = {}
        self.active: str | None = None
        self.lock = threading.RLock()
        """Held while a runner computes: which adapter is in use holds for the whole model."""
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, layer in self.layers.items():
            layer.register_forward_hook(partial(self._changed, name))

    def _changed(self, name: str, layer: nn.Linear, given: tuple[Tensor, ...], found: Tensor) -> Tensor | None:
        change = self.changes[self.active].get(name) if self.active is not None else None
        return None if change is None else change(layer, given[0], found)

    def load(self, name: str, path: str | os.PathLike[str], *, alpha: float | None = None) -> None:
        """Takes up an adapter in any form that can be merged, under official names; an older one of `name` goes.

        BadCheckpoint where it does not fit, or has weights that were trained whole, which hold for all requests.
        """
        adapter = read_adapter(path, alpha=alpha)
        if adapter.whole:
            raise adapter.fail("it has weights that were trained whole, which cannot be swapped: merge it")
        changes = {}
        for module, factors in adapter.factors.items():
            layer = self.layers.get(module)
            if layer is None:
                raise adapter.fail(f"this {self.model.family} model has no matrix {module!r}")
            values = {key: tensor.read().astype(np.float32) for key, tensor in factors.items()}
            try:
                changes[module] = _change(adapter, module, layer, values)
            except rules.Misfit as misfit:
                raise adapter.fail(f"{module}: {misfit}") from None
        self.changes[name], self.digests[name] = changes, digest_of(adapter)

    def unload(self, name: str) -> None:
        """Forgets an adapter; UnknownName where there is none of that name."""
        self._known(name)
        del self.changes[name], self.digests[name]

    def _known(self, name: str | None) -> None:
        if name is not None and name not in self.changes:
            raise unknown("adapter", name, self.changes, "`HotAdapters.load`")

    @contextmanager
    def using(self, name: str | None) -> Iterator[LanguageModel]:
        """The model as it computes with this adapter, for the time of the block."""
        self._known(name)
        before, self.active = self.active, name
        try:
            yield self.model
        finally:
            self.active = before

    def runner(self, name: str | None) -> TorchRunner:
        """The base with this adapter as the engine wants it."""
        self._known(name)
        return _Runner(self, name)

    def fingerprint(self, name: str | None) -> str:
        """Names the model with the adapter in state files, as the merged model is named."""
        base = self.model.fingerprint()
        return base if name is None else hashlib.sha256(f"{base} {self.digests[name]}".encode()).hexdigest()[:32]


class _Runner(TorchRunner):
    """The base's runner, with one adapter."""

    def __init__(self, adapters: HotAdapters, adapter: str | None) -> None:
        super().__init__(adapters.model)
        self.adapters, self.adapter = adapters, adapter

    def fingerprint(self) -> str:
        return self.adapters.fingerprint(self.adapter)

    def forward(self, *given: Any, **named: Any) -> np.ndarray:
        with self.adapters.lock, self.adapters.using(self.adapter):
            return super().forward(*given, **named)

    def forward_rows(self, *given: Any, **named: Any) -> Sequence[np.ndarray]:
        with self.adapters.lock, self.adapters.using(self.adapter):
            return super().forward_rows(*given, **named)


def _change(adapter: Adapter, module: str, layer: nn.Linear, values: Mapping[str, np.ndarray]) -> Change:
    """What the factors do to a layer's output; Misfit where they cannot belong to it."""
    shape, shapes = tuple(layer.weight.shape), {name: array.shape for name, array in values.items()}
    shared = [name for name in shapes if name in SHARED]
    if shared and len(shapes) == 1:
        block = values[shared[0]]
        if block.ndim == 2:
            turned = shared[0] in ("bone", "disha") and block.shape[1] != shape[0] == block.shape[0]
            block = block.T if turned else block
            rules.check_shards(shape, block.shape)
            return partial(_shards, _like(layer, np.tile(block, (1, shape[0] // block.shape[1]))))
        rules.check_blocks(shape, block.shape, by_rows=SHARED[shared[0]])
        weight = rules.affine_blocks(_weight(layer), block, by_rows=SHARED[shared[0]])
        return partial(_replaced, _like(layer, weight))
    rules.check_low_rank(shape, shapes)
    scale = 1.0 if "init_lora_A" in values else adapter.scale(module, shapes["lora_A"][0])
    if "lora_magnitude_vector" in values:
        return partial(_replaced, _like(layer, rules.low_rank(_weight(layer), values, scale)))
    a, b = values["lora_A"], scale * values["lora_B"]
    if "init_lora_A" in values:  # PiSSA: what it took out of the weights at first is still in them here
        a, b = np.concatenate([a, values["init_lora_A"]]), np.concatenate([b, -values["init_lora_B"]], axis=1)
    return partial(_low_rank, _like(layer, a), _like(layer, b))


def _weight(layer: nn.Linear) -> np.ndarray:
    return layer.weight.detach().float().cpu().numpy()


def _like(layer: nn.Linear, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(layer.weight)


def _low_rank(a: Tensor, b: Tensor, layer: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return y + linear(linear(x, a), b)


def _shards(shared: Tensor, layer: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Inputs j, j + r, j + 2r … are added up and meet row j of D [r, out]."""
    rows = shared.shape[0]
    x = pad(x, (0, -x.shape[-1] % rows))
    return y + x.unflatten(-1, (-1, rows)).sum(-2) @ shared


def _replaced(weight: Tensor, layer: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    return linear(x, weight, layer.bias)
