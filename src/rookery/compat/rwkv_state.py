"""State lists of the `rwkv` package: all layers' tensors one after the other, without a batch.

| family | per layer |
|---|---|
| RWKV-4 | time mix's last input, aa, bb, pp, channel mix's last input, each [width] |
| RWKV-5, 6 | time mix's last input, matrices [head, key, value], channel mix's last input |
| RWKV-7, 7a | the same with matrices [head, value, key] |
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from rookery.errors import BadState, UnknownName

FAMILIES = ("rwkv4", "rwkv5", "rwkv6", "rwkv7", "rwkv7a")


def check_family(family: str) -> None:
    """UnknownName for a family that has no state list."""
    if family not in FAMILIES:
        raise UnknownName(
            f"the rwkv package has no state list for {family} (it has for {', '.join(FAMILIES)}); use rookery.LLM"
        )


def to_list(row: Any, runner: Any) -> list[Any]:
    """The engine's state of one row as a state list: torch tensors where torch is installed, else arrays."""
    named, tensor = _tensors(row)
    return [tensor(part) for i in range(runner.config.num_hidden_layers) for part in _parts(named, i, runner.family)]


def from_list(state: list[Any], runner: Any) -> Any:
    """The engine's state for a state list, which stays as it is; BadState where it does not fit the model."""
    layers, family = runner.config.num_hidden_layers, runner.family
    each = 5 if family == "rwkv4" else 3
    if len(state) != each * layers:
        raise BadState(f"the state list has {len(state)} tensors, {layers} layers of {family} have {each * layers}")
    fresh = runner.init_state().tensors()
    arrays = {"tokens_seen": fresh["tokens_seen"]}
    for i in range(layers):
        parts = [_array(part) for part in state[each * i : each * (i + 1)]]
        at = f"layers.{i}."
        arrays[at + "att_shift"], arrays[at + "ffn_shift"] = parts[0], parts[-1]
        arrays[at + "wkv"] = np.stack(parts[1:4]) if each == 5 else _turned(parts[1], family)
    for name, values in arrays.items():
        if name != "tokens_seen":
            if values.shape != fresh[name].shape[1:]:
                raise BadState(f"{name} has shape {list(values.shape)}, this model's {list(fresh[name].shape[1:])}")
            arrays[name] = values[None].astype(fresh[name].dtype)
    return runner.init_state(arrays)


def _parts(named: dict[str, Any], layer: int, family: str) -> list[Any]:
    att, wkv, ffn = (named[f"layers.{layer}.{name}"][0] for name in ("att_shift", "wkv", "ffn_shift"))
    return [att, *wkv, ffn] if family == "rwkv4" else [att, _turned(wkv, family), ffn]


def _turned(matrices: Any, family: str) -> Any:
    return matrices.swapaxes(-1, -2) if family in ("rwkv5", "rwkv6") else matrices


def _tensors(row: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """The row's tensors by name, and what makes one of them the user's own."""
    if hasattr(row, "state"):  # a torch runner's: stays on its device
        return row.state.tensors(), lambda tensor: tensor.contiguous().clone()
    try:
        import torch
    except ImportError:
        return row.tensors(), np.array
    return row.tensors(), lambda array: torch.from_numpy(np.array(array))


def _array(part: Any) -> np.ndarray:
    if hasattr(part, "detach"):
        part = part.detach().float().cpu()
    return np.asarray(part, np.float32)
