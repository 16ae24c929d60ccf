"""The state of a sequence model: everything it remembers, as tensors.

A session is a state: `clone` forks it, `select` reorders beams, `save` sends it elsewhere. No method changes the state
it is called on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rookery.checkpoints.state_file import SESSION_PREFIX, fingerprint, sizes, write_state
from rookery.checkpoints.tuned_state import start_arrays
from rookery.errors import BadState

if TYPE_CHECKING:
    from rookery.nn.language_model import LanguageModel

WIDE_FIELDS = frozenset({"wkv", "kstate", "support", "rule", "chunk_means", "mediums", "att_pool", "ffn_pool"})
"""Fields that accumulate: float32 at least, whatever the model's dtype (core.md 1.11)."""


@dataclass(frozen=True)
class State:
    """What a model carries from one call to the next, for a batch of rows."""

    layers: tuple[NamedTuple, ...]
    """One NamedTuple of tensors per layer, the batch first in each."""
    tokens_seen: Tensor
    """int64 [b]: how many tokens each row has read."""
    config: Any
    """The model's config; it knows the closed form of the state's size."""
    shared: NamedTuple | None = None
    """Tensors that belong to no layer."""

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.tokens_seen.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors but the token counts."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def expected_nbytes(self, tokens_seen: int) -> int:
        """Bytes of a state of this batch and dtype whose longest row has read `tokens_seen` tokens."""
        itemsize = min(t.element_size() for t in self.tensors().values() if t.is_floating_point())
        return self.config.state_nbytes(tokens_seen=tokens_seen, batch=self.batch, itemsize=itemsize)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor but `tokens_seen` under its name in state files: "layers.0.wkv", "shared.keys"."""
        named = {f"layers.{i}.{k}": t for i, layer in enumerate(self.layers) for k, t in layer._asdict().items()}
        if self.shared is not None:
            named |= {f"shared.{k}": t for k, t in self.shared._asdict().items()}
        return named

    def with_tensors(self, tensors: dict[str, Tensor], tokens_seen: Tensor) -> State:
        """A state of this structure that holds `tensors`, named as `tensors()` names them."""
        layers = tuple(
            type(layer)(*(tensors[f"layers.{i}.{k}"] for k in layer._fields)) for i, layer in enumerate(self.layers)
        )
        shared = self.shared
        if shared is not None:
            shared = type(shared)(*(tensors[f"shared.{k}"] for k in shared._fields))
        return replace(self, layers=layers, shared=shared, tokens_seen=tokens_seen)

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """A state with `change` applied to every tensor, the token counts included."""
        return self.with_tensors({k: change(t) for k, t in self.tensors().items()}, change(self.tokens_seen))

    def check_model(self, config: Any) -> None:
        """BadState unless a model of this config could have made this state."""
        if type(config) is type(self.config) and sizes(config) == sizes(self.config):
            return
        mine, theirs = ({"config": type(c).__name__, **sizes(c)} for c in (self.config, config))
        apart = [f"{k} {mine.get(k)} against {theirs.get(k)}" for k in mine if mine.get(k) != theirs.get(k)]
        raise BadState(f"the state belongs to another model: {', '.join(apart)}")

    def clone(self) -> State:
        """An independent copy."""
        return self.map(Tensor.clone)

    def detach(self) -> State:
        """The same values, cut from the autograd graph (truncated backpropagation)."""
        return self.map(Tensor.detach)

    def select(self, rows: Sequence[int] | Tensor) -> State:
        """Rows of the batch by index, in any order and number (beam search, continuous batching)."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.tokens_seen.device)
        return self.map(lambda t: t.index_select(0, index))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """A copy on another device or for a model of another dtype.

        Recurrent matrices become float32, or float64 where `dtype` is; everything else that floats takes `dtype`.
        """
        moved = {}
        for name, tensor in self.tensors().items():
            target = dtype if tensor.is_floating_point() else None
            if target is not None and name.rpartition(".")[2] in WIDE_FIELDS:
                target = torch.promote_types(target, torch.float32)
            moved[name] = tensor.to(device=device, dtype=target)
        return self.with_tensors(moved, self.tokens_seen.to(device=device))

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors, "tokens_seen" included, as state files hold them; on the CPU the memory is shared."""
        named = self.tensors() | {"tokens_seen": self.tokens_seen}
        return {name: to_numpy(tensor) for name, tensor in named.items()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], model: LanguageModel) -> State:
        """The state of `model` that these arrays hold; BadState where their names are not those of its state."""
        expected = {"tokens_seen", *model.init_state(0).tensors()}
        if arrays.keys() != expected:
            raise BadState(f"the state holds {sorted(arrays)}, this model's state is {sorted(expected)}")
        fresh = model.init_state(len(arrays["tokens_seen"]))
        like = {name: (t.device, t.dtype) for name, t in fresh.tensors().items()}
        tensors = {name: from_numpy(arrays[name]).to(*like[name]) for name in like}
        return fresh.with_tensors(tensors, from_numpy(arrays["tokens_seen"]).to(fresh.tokens_seen.device))

    def save(self, path: str | os.PathLike[str], model: LanguageModel) -> None:
        """Writes the state to `path` with the fingerprint of `model`; the file is whole or absent."""
        write_state(path, self.arrays(), model=model.fingerprint())

    @staticmethod
    def load(path: str | os.PathLike[str], model: LanguageModel) -> State:
        """The state in a file that `model` (or the native runtime on it) wrote, or a tuned state; BadState for another.

        A session's file will do, too: what it keeps besides the state is left out. A tuned state has one row; `select`
        makes as many as a batch needs.
        """
        fingerprint = model.fingerprint()
        arrays = start_arrays(
            path, lambda: model.init_state(1).arrays(), family=model.family, config=model.config, model=fingerprint
        )
        arrays = {name: array for name, array in arrays.items() if not name.startswith(SESSION_PREFIX)}
        try:
            return State.from_arrays(arrays, model)
        except BadState as other:
            raise BadState(f"{os.fspath(path)!r} does not fit: {other}") from None


def cat(states: Sequence[State]) -> State:
    """One state whose rows are those of `states` one after the other.

    Growing caches of unequal length are filled up with zeros at their end: what lies beyond a row's `tokens_seen` is
    never read. Raises BadState for states of models of different sizes.
    """
    if not states:
        raise ValueError("there is no state to join; give at least one")
    for state in states[1:]:
        states[0].check_model(state.config)
    named = [state.tensors() for state in states]
    joined = {}
    for name in named[0]:
        parts = [tensors[name] for tensors in named]
        longest = [max(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
        joined[name] = torch.cat([_filled_up(p, longest) for p in parts])
    return states[0].with_tensors(joined, torch.cat([state.tokens_seen for state in states]))


def _filled_up(tensor: Tensor, sizes: list[int]) -> Tensor:
    missing = [want - have for want, have in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return pad(tensor, [n for m in reversed(missing) for n in (0, m)])


def fingerprint_of(family: str, config: Any, embedding: Tensor, final_norm: Tensor) -> str:
    """`rookery.checkpoints.state_file.fingerprint` of a model's weights, of which the first 16 rows will do."""
    samples = (to_numpy(weight.detach().to(torch.float32)) for weight in (embedding[:16], final_norm))
    return fingerprint(family, config, *samples)


def to_numpy(tensor: Tensor) -> Any:
    """The tensor's values as a numpy array on the CPU; bfloat16 becomes ml_dtypes.bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def from_numpy(array: Any) -> Tensor:
    """A tensor of the array's values (shared memory where the array is writable); knows ml_dtypes.bfloat16."""
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)
