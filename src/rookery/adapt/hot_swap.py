"""Several adapters on one torch model in memory: each request is answered with its own, and none is merged.

The model's linear layers are watched by hooks, which add what the adapter in use says. LoRA, PiSSA, MiSS and mini cost
their own small matrices; BAT and DoRA, which change the weights they find, a copy of these weights each.
`TorchRunner.adapted` is how the engine uses this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from rookery.checkpoints import adapter_rules as rules
from rookery.checkpoints.adapter import SHARED, Adapter
from rookery.checkpoints.swapped import changes_of, low_rank_pair, shared_factor, strength
from rookery.nn.language_model import LanguageModel

Change = Callable[[nn.Linear, Tensor, Tensor], Tensor]
"""Layer, its input and its output -> its output with the adapter."""
Changes = Mapping[str, Change]
"""Layer's name -> what is done to its output."""


class HotSwap:
    """A model whose linear layers do what the adapter in use says. For one thread at a time: others wait."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._active: Changes = {}
        self._lock = threading.RLock()  # which adapter is in use holds for the whole model
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        for name, layer in self._layers.items():
            layer.register_forward_hook(partial(self._changed, name))

    def _changed(self, name: str, layer: nn.Linear, given: tuple[Tensor, ...], found: Tensor) -> Tensor | None:
        change = self._active.get(name)
        return None if change is None else change(layer, given[0], found)

    def changes(self, adapter: Adapter) -> Changes:
        """What an adapter in any form that can be merged does to the layers; BadCheckpoint where it does not fit."""
        shapes = {name: tuple(layer.weight.shape) for name, layer in self._layers.items()}
        return changes_of(
            adapter,
            shapes,
            self.model.family,
            lambda name, _, values: _change(adapter, name, self._layers[name], values),
        )

    @contextmanager
    def using(self, changes: Changes | None) -> Iterator[LanguageModel]:
        """The model as it computes with these changes, for the time of the block."""
        with self._lock:
            before, self._active = self._active, changes or {}
            try:
                yield self.model
            finally:
                self._active = before


def _change(adapter: Adapter, module: str, layer: nn.Linear, values: rules.Factors) -> Change:
    """What the factors do to a layer's output; Misfit where they cannot belong to it."""
    shape, shared = tuple(layer.weight.shape), shared_factor(values)
    if shared is not None and values[shared].ndim == 2:
        rows = rules.shared_rows(shape, values[shared], shared)
        return partial(_shards, _like(layer, rules.repeated(rows, shape[0])))
    if shared is not None:
        by_rows = SHARED[shared]
        rules.check_blocks(shape, values[shared].shape, by_rows=by_rows)
        weight = rules.affine_blocks(_weight(layer), values[shared], by_rows=by_rows)
        return partial(_replaced, _like(layer, weight))
    if "bone_A" in values or "bone_B" in values:
        by_rows = rules.check_two_blocks(shape, {name: array.shape for name, array in values.items()})
        weight = rules.affine_blocks(_weight(layer), values["bone_A"], values["bone_B"], by_rows=by_rows)
        return partial(_replaced, _like(layer, weight))
    a, b = low_rank_pair(adapter, module, shape, values)
    if "lora_magnitude_vector" in values:
        scale = strength(adapter, module, values)
        return partial(_replaced, _like(layer, rules.low_rank(_weight(layer), values, scale)))
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
